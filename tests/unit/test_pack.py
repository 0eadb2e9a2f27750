"""Packs: whoever knows the name can check every byte."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.ident import PAGE_SIZE
from dbmodule.repository.pack import (
    ENCODING_RAW,
    ENCODING_ZSTD,
    FOOTER,
    HEADER,
    TRAILER,
    Footer,
    PackBuilder,
    PackId,
    footer_length,
    keyed,
    name_of,
    open_whole,
    page_slices,
)
from tests.unit.strategies import KEY, quick

Frames = list[tuple[bytes, int, bytes]]
"""Stored bytes, raw length, and the hashes of the pages."""

frames = st.lists(
    st.tuples(
        st.binary(max_size=60),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32).flatmap(lambda n: st.binary(min_size=16 * n, max_size=16 * n)),
    ),
    max_size=5,
)


def sealed(contents: Frames, key: bytes = KEY) -> tuple[bytes, Footer]:
    builder = PackBuilder()
    for number, (stored, raw, hashes) in enumerate(contents):
        encoding = ENCODING_ZSTD if number % 2 else ENCODING_RAW
        assert builder.add(stored, raw, encoding, keyed(key, stored), hashes) == number
    assert len(builder) == len(contents)
    chunks, footer = builder.seal(key)
    return b"".join(chunks), footer


@quick(100)
@given(frames)
def test_what_is_sealed_can_be_opened(contents: Frames) -> None:
    data, footer = sealed(contents)
    opened = open_whole(name_of(footer.pack), memoryview(data), KEY)
    assert len(data) == opened.object_size == footer.object_size
    assert footer_length("p", data[-TRAILER.size :]) == opened.length
    assert len(opened.entries) == len(contents)
    for number, (stored, raw, hashes) in enumerate(contents):
        start, row = int(opened.offsets[number]), opened.entries[number]
        assert data[start : start + int(row["stored"])] == stored
        assert (int(row["raw"]), int(row["encoding"])) == (raw, number % 2)
        assert opened.frame_hash(number) == keyed(KEY, stored)
        pages = len(hashes) // 16
        found = [opened.page_hash(number, slot) for slot in range(pages)]
        assert found == [hashes[16 * slot : 16 * slot + 16] for slot in range(pages)]
        assert opened.page_hash(number, pages) is None
        assert opened.page_hash(number, 255) is None


def test_hashes_that_end_in_zeroes_keep_their_zeroes() -> None:
    builder = PackBuilder()
    builder.add(b"x", 1, ENCODING_RAW, b"\x01" + bytes(31), bytes(16) + b"\x02" + bytes(15))
    footer = builder.seal(KEY)[1]
    assert footer.frame_hash(0) == b"\x01" + bytes(31)
    assert footer.page_hash(0, 0) == bytes(16)
    assert footer.page_hash(0, 1) == b"\x02" + bytes(15)


SMALL: Frames = [(b"frame one", 9, b"h" * 32), (b"", 0, b""), (b"three", 5, b"")]


def test_every_flipped_byte_is_noticed() -> None:
    data, footer = sealed(SMALL)
    name = name_of(footer.pack)
    for at in range(len(data)):
        for bit in (0x01, 0x80):
            flipped = bytearray(data)
            flipped[at] ^= bit
            with pytest.raises((CorruptObjectError, FormatVersionError)):
                open_whole(name, memoryview(flipped), KEY)


def test_every_missing_or_added_byte_is_noticed() -> None:
    data, footer = sealed(SMALL)
    name = name_of(footer.pack)
    for at in range(len(data)):
        for wrong in (data[:at], data[at + 1 :], data[:at] + data[at + 1 :]):
            with pytest.raises((CorruptObjectError, FormatVersionError)):
                open_whole(name, memoryview(wrong), KEY)
        with pytest.raises((CorruptObjectError, FormatVersionError)):
            open_whole(name, memoryview(data[:at] + b"\0" + data[at:]), KEY)
    for wrong in (data + b"\0", data + data, data + data[-TRAILER.size :]):
        with pytest.raises((CorruptObjectError, FormatVersionError)):
            open_whole(name, memoryview(wrong), KEY)


def test_a_pack_under_another_name_is_refused() -> None:
    data, footer = sealed(SMALL)
    other, other_footer = sealed([(b"other", 5, b"")])
    with pytest.raises(CorruptObjectError, match="does not match its name"):
        open_whole(name_of(other_footer.pack), memoryview(data), KEY)
    with pytest.raises(CorruptObjectError, match="does not match its name"):
        open_whole(name_of(footer.pack), memoryview(other), KEY)
    for place in (f"packs/zz/{footer.pack}", footer.pack, f"packs/{footer.pack}"):
        with pytest.raises(CorruptObjectError, match="not where a pack of that name belongs"):
            open_whole(place, memoryview(data), KEY)


def test_a_pack_needs_the_key_of_its_repository() -> None:
    data, footer = sealed(SMALL)
    with pytest.raises(CorruptObjectError):
        open_whole(name_of(footer.pack), memoryview(data), bytes(32))


def test_no_two_packs_have_one_name() -> None:
    """One that was removed must not come back: its removal may be on its way still."""
    assert len({sealed(SMALL)[1].pack for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("frames", "hashes", "body", "more"),
    [(0, 0, HEADER.size + 1, b""), (1, 0, HEADER.size, b""), (0, 1, HEADER.size, bytes(16))],
)
def test_a_footer_whose_parts_do_not_add_up_is_refused(
    frames: int, hashes: int, body: int, more: bytes
) -> None:
    footer = FOOTER.pack(frames, hashes, body, bytes(32)) + more
    with pytest.raises(CorruptObjectError):
        Footer.open(PackId(keyed(KEY, footer).hex()), footer, KEY)


def test_a_short_footer_is_refused() -> None:
    with pytest.raises(CorruptObjectError, match="too short"):
        Footer.open(PackId(keyed(KEY, b"x").hex()), b"x", KEY)


def test_offsets_do_not_wrap_where_a_column_would() -> None:
    parsed = sealed([(b"a", 1, b"")] * 3)[1]
    entries = parsed.entries.copy()
    entries["stored"] = 0xFFFFFFFF
    footer = FOOTER.pack(3, 0, HEADER.size + 3 * 0xFFFFFFFF, bytes(32)) + entries.tobytes()
    huge = Footer.parse(parsed.pack, footer)
    assert huge.offsets.dtype == np.int64
    assert int(huge.offsets[2]) == HEADER.size + 2 * 0xFFFFFFFF
    assert dataclasses.replace(huge).object_size > 3 * 0xFFFFFFFF


@quick(50)
@given(st.integers(0, 4 * PAGE_SIZE))
def test_page_slices_cover_all_bytes_once(length: int) -> None:
    slices = page_slices(length)
    assert [s.start for s in slices] == list(range(0, length, PAGE_SIZE))
    assert sum(s.stop - s.start for s in slices) == length
