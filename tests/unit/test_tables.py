"""Tables: whatever is written over any number of groups is read back row for row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dbmodule.delta import EXTENT
from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, FileIdentity
from dbmodule.repository import tables
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.tables import (
    DTYPES,
    GROUP_ROWS,
    FileEntry,
    TableReader,
    TableWriter,
    encode_root,
)
from dbmodule.storage import MemoryStore
from tests.unit.strategies import KEY, entry, quick, random_bytes, writer

paths = st.binary(min_size=1, max_size=30).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
wide = st.integers(0, 2**64 - 1)
times = st.integers(-(2**63), 2**63 - 1)


@st.composite
def entries(draw: st.DrawFn) -> FileEntry:
    size = draw(wide)
    return FileEntry(
        draw(paths),
        draw(st.sampled_from(EntryKind)),
        EntryFlag(draw(st.integers(0, 15))),
        draw(st.integers(0, 0xFFFF)),
        size,
        FileIdentity(size, draw(times), draw(times), draw(wide), draw(wide)),
        draw(paths),
        draw(wide),
        draw(st.integers(0, 2**32 - 1)),
        draw(wide),
        draw(st.integers(0, 2**32 - 1)),
    )


class Written:
    """A backup's tables in a repository of their own."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.frames = writer(self.store)
        self.tables = TableWriter(self.frames)

    def read(self) -> TableReader:
        described = self.tables.finish()
        packs = self.frames.flush()
        root = self.frames.store_root(encode_root(described, packs))
        self.frames.close()
        return TableReader(FrameReader(self.store, KEY), root)


@quick(60)
@given(st.lists(entries(), max_size=10))
def test_file_rows_come_back_as_they_were(listed: list[FileEntry]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GROUP_ROWS, "files", 3)
        written = Written()
        for row in listed:
            written.tables.add_file(row)
        reader = written.read()
    assert list(reader.files()) == listed
    assert reader.rows("files") == len(listed)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 9000])
def test_many_files_cross_the_borders_of_groups(count: int) -> None:
    listed = [
        entry(f"base/5/{number}_\udcff\u00e9", EntryKind.RELATION, first_extent=number)
        for number in range(count)
    ]
    written = Written()
    for row in listed:
        written.tables.add_file(row)
    assert list(written.read().files()) == listed


def rows_of(table: str, count: int) -> NDArray[np.void]:
    dtype = DTYPES[table]
    return np.frombuffer(random_bytes(count, count * dtype.itemsize), dtype, count)


@pytest.mark.parametrize("table", sorted(DTYPES))
@quick(60)
@given(
    st.lists(st.integers(0, 12), max_size=8),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8),
)
def test_slices_are_those_of_one_long_array(
    table: str, sizes: list[int], wanted: list[tuple[int, int]]
) -> None:
    everything = rows_of(table, sum(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GROUP_ROWS, table, 5)
        patch.setattr(TableReader, "GROUPS", 2)
        written = Written()
        done = 0
        for size in sizes:
            assert written.tables.add(table, everything[done : done + size]) == done
            done += size
        reader = written.read()
        assert reader.rows(table) == len(everything)
        for first, count in wanted:
            if count and first + count > len(everything):
                with pytest.raises(CorruptObjectError, match="has no row"):
                    reader.slice(table, first, count)
            else:
                found = reader.slice(table, first, count)
                assert found.dtype == DTYPES[table]
                assert found.tobytes() == everything[first : first + count].tobytes()


def test_whole_groups_leave_memory_as_they_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUP_ROWS, "marks", 10)
    written = Written()
    for _ in range(100):
        written.tables.add("marks", rows_of("marks", 7))
        assert sum(len(rows) for rows in written.tables._pending["marks"]) < 10
    assert written.read().rows("marks") == 700


def test_a_group_that_is_there_already_is_not_stored_again() -> None:
    written = Written()
    same = rows_of("marks", GROUP_ROWS["marks"])
    written.tables.add("marks", same)
    written.tables.add("marks", same)
    reader = written.read()
    assert written.frames.counts.frames_stored == 1
    assert reader.slice("marks", 0, 2 * len(same)).tobytes() == same.tobytes() * 2


def test_plain_hashes_are_taken_as_rows() -> None:
    written = Written()
    hashes = np.frombuffer(b"a" * 16 + bytes(16), HASH)
    written.tables.add("hashes", hashes)
    assert written.read().slice("hashes", 0, 2)["hash"].tobytes() == hashes.tobytes()
    with pytest.raises((TypeError, ValueError)):
        Written().tables.add("hashes", np.empty(3, MARK))


def test_rows_do_not_depend_on_what_the_caller_does_later() -> None:
    written = Written()
    rows = np.zeros(3, EXTENT)
    rows["block"] = 7
    written.tables.add("extents", rows.copy())
    rows["block"] = 9
    assert written.read().slice("extents", 0, 3)["block"].tolist() == [7, 7, 7]


def rooted(tables_of: dict[str, object], format_version: int = 1) -> TableReader:
    store = MemoryStore()
    frames = writer(store)
    root = encode_root(tables_of, frames.flush())
    root = root.replace(b'"format":1', b'"format":%d' % format_version)
    ref = frames.store_root(root)
    frames.close()
    return TableReader(FrameReader(store, KEY), ref)


def empty_tables() -> dict[str, dict[str, object]]:
    return {name: {"rows": 0, "group_rows": 5, "groups": []} for name in GROUP_ROWS}


def test_a_table_with_fewer_groups_than_rows_is_refused() -> None:
    described: dict[str, object] = dict(empty_tables())
    described["files"] = {"rows": 2, "group_rows": 5, "groups": []}
    described["marks"] = {"rows": 2, "group_rows": 5, "groups": []}
    reader = rooted(described)
    with pytest.raises(CorruptObjectError):
        list(reader.files())
    with pytest.raises(CorruptObjectError):
        reader.slice("marks", 0, 2)


def test_tables_of_a_later_format_are_refused() -> None:
    assert list(rooted(dict(empty_tables())).files()) == []
    with pytest.raises(FormatVersionError):
        rooted(dict(empty_tables()), format_version=2)


def test_the_fixed_columns_hold_the_widest_values() -> None:
    row = dataclasses.replace(
        entry("x"),
        mode=0o177777,
        size=2**64 - 1,
        identity=FileIdentity(2**64 - 1, -(2**63), 2**63 - 1, 2**64 - 1, 2**64 - 1),
        first_extent=2**64 - 1,
        extents=2**32 - 1,
    )
    data = tables._encode_files([row])
    assert tables._decode_files(data, 1) == [row]
