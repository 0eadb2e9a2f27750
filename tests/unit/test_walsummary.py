"""WAL summaries: which cover a stretch of WAL, and which blocks they name."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import SourceError
from dbmodule.ident import Lsn, Timeline
from dbmodule.walsummary import ChangedBlocks, Stretch, Summary, cover, parse_name, stretches

CHUNK = 1 << 16
NO_LIMIT = 0xFFFFFFFF
RELATION = (1663, 5, 16384)
Forks = Mapping[tuple[int, int, int, int], tuple[int, set[int]]]
"""(tablespace, database, relfilenode, fork) → limit block, blocks."""


def encode(forks: Forks) -> bytes:
    """A summary file, as the server writes it."""
    data = bytearray(struct.pack("<I", 0x652B137B))
    for key, (limit, blocks) in forks.items():
        chunks = [
            [block % CHUNK for block in blocks if block // CHUNK == chunk]
            for chunk in range(max(blocks, default=-1) // CHUNK + 1)
        ]
        data += struct.pack("<IIIiII", *key, limit, len(chunks))
        data += struct.pack(f"<{len(chunks)}H", *(min(len(c), 4096) for c in chunks))
        for chunk in chunks:
            if len(chunk) < 4096:
                data += struct.pack(f"<{len(chunk)}H", *chunk)
            else:
                words = [0] * 4096
                for block in chunk:
                    words[block // 16] |= 1 << block % 16
                data += struct.pack("<4096H", *words)
    data += bytes(24)
    return bytes(data) + struct.pack("<I", crc32c(bytes(data)))


def changed(*files: Forks) -> ChangedBlocks:
    found = ChangedBlocks()
    for number, forks in enumerate(files):
        found.add(str(number), encode(forks))
    return found


def summary(timeline: int, start: int, end: int) -> Summary:
    return Summary(f"{timeline}-{start}-{end}", Timeline(timeline), Lsn(start), Lsn(end))


def test_names_are_read_and_others_passed_over() -> None:
    found = parse_name("0000000200000000016EED70000000010000002A.summary")
    assert found is not None
    assert (found.timeline, found.start, found.end) == (2, 0x16EED70, 0x10000002A)
    assert parse_name("temp.summary") is None
    assert parse_name("0000000200000000016EED70000000010000002A.summary.tmp") is None


BLOCKS = st.sets(
    st.one_of(st.integers(0, 50), st.integers(CHUNK - 20, CHUNK + 20), st.integers(0, 3 * CHUNK))
)


@given(
    st.lists(
        st.tuples(st.one_of(st.just(NO_LIMIT), st.integers(0, 3 * CHUNK)), BLOCKS), max_size=4
    ),
    st.integers(0, 2 * CHUNK),
    st.integers(0, 2 * CHUNK),
)
def test_files_are_joined(files: list[tuple[int, set[int]]], first: int, count: int) -> None:
    found = changed(*({(*RELATION, 0): fork} for fork in files))
    limit = min((limit for limit, _ in files), default=NO_LIMIT)
    named = set().union(*(blocks for _, blocks in files))
    expected = [b - first for b in sorted(named) if first <= b < min(limit, first + count)]
    expected += range(max(limit - first, 0), count)
    assert found.within(RELATION, first, count).tolist() == expected


def test_dense_and_sparse_chunks_are_joined() -> None:
    odd, few = set(range(1, CHUNK, 2)), {0, 4, 5}
    for files in ((odd, few), (few, odd), (odd, odd), (set(range(4090)), set(range(3000, 5000)))):
        found = changed(*({(*RELATION, 0): (NO_LIMIT, blocks)} for blocks in files))
        assert found.within(RELATION, 0, CHUNK).tolist() == sorted(files[0] | files[1])


def test_only_the_main_fork_and_the_relation_itself_count() -> None:
    found = changed(
        {
            (*RELATION, 0): (NO_LIMIT, {3}),
            (*RELATION, 2): (0, {9}),
            (1663, 5, 16385, 0): (0, {7}),
            (1700, 5, 16384, 0): (0, {8}),
        }
    )
    assert found.within(RELATION, 0, 100).tolist() == [3]
    assert found.within((1663, 6, 16384), 0, 100).tolist() == []


def test_of_a_database_that_was_copied_everything_changed() -> None:
    found = changed({(1663, 5, 0, 0): (0, set())})
    assert found.within(RELATION, 131072, 3).tolist() == [0, 1, 2]
    assert found.within((1663, 6, 16384), 0, 3).tolist() == []


@given(st.binary(min_size=1, max_size=3), st.integers(0, 10_000))
def test_any_change_to_a_file_is_found(piece: bytes, at: int) -> None:
    data = bytearray(encode({(*RELATION, 0): (NO_LIMIT, {1, 2, CHUNK + 3})}))
    at %= len(data) - len(piece)
    if data[at : at + len(piece)] == piece:
        return
    data[at : at + len(piece)] = piece
    with pytest.raises(SourceError, match="WAL summary here is damaged"):
        ChangedBlocks().add("here", bytes(data))


@pytest.mark.parametrize("cut", [0, 3, 4, 27, 31, 40])
def test_a_file_that_ends_early_is_damaged(cut: int) -> None:
    data = encode({(*RELATION, 0): (NO_LIMIT, {1})})[:cut]
    sealed = data[:-4] + struct.pack("<I", crc32c(data[:-4])) if cut > 4 else data
    with pytest.raises(SourceError, match="damaged"):
        ChangedBlocks().add("here", sealed)


def test_what_covers_a_stretch_leaves_no_gap() -> None:
    stretch = Stretch(Timeline(1), Lsn(100), Lsn(300))
    files = [summary(1, 50, 150), summary(1, 150, 200), summary(1, 200, 300), summary(2, 0, 999)]
    assert cover(stretch, files[::-1]) == (files[:3], 300)
    assert cover(stretch, [*files[:1], files[2]]) == (files[:1], 150)
    assert cover(stretch, files[1:]) == ([], 100)
    assert cover(stretch, [summary(1, 0, 120), summary(1, 90, 400)])[1] == 400
    assert cover(stretch, [summary(1, 0, 100), summary(1, 300, 400)]) == ([], 100)


def test_stretches_follow_the_timelines() -> None:
    history = [(Timeline(1), Lsn(100)), (Timeline(2), Lsn(250)), (Timeline(4), Lsn(300))]
    assert stretches(Timeline(1), Lsn(60), Timeline(5), Lsn(400), history) == [
        Stretch(Timeline(1), Lsn(60), Lsn(100)),
        Stretch(Timeline(2), Lsn(100), Lsn(250)),
        Stretch(Timeline(4), Lsn(250), Lsn(300)),
        Stretch(Timeline(5), Lsn(300), Lsn(400)),
    ]
    assert stretches(Timeline(5), Lsn(320), Timeline(5), Lsn(400), history) == [
        Stretch(Timeline(5), Lsn(320), Lsn(400))
    ]
    assert stretches(Timeline(5), Lsn(400), Timeline(5), Lsn(400), history) == []
