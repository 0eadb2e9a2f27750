"""Storing and reading frames: nothing twice, nothing lost, and no hang when the store fails."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.delta import FRAME_BYTES, FRAME_PAGES, Refs
from dbmodule.errors import (
    CorruptObjectError,
    ObjectMissingError,
    RepositoryError,
)
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import Buffer
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import PackId, name_of
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import MemoryStore
from tests.unit.strategies import KEY, LEVEL, chunk, quick, random_bytes, writer


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def frames(store: MemoryStore) -> Iterator[FrameWriter]:
    made = writer(store)
    yield made
    made.close()


def fetch(store: MemoryStore, packs: list[PackRef], refs: Refs) -> list[bytes]:
    """The chunk behind each reference."""
    reader = FrameReader(store, KEY)
    return [
        reader.frame(packs[pack], frame)[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]
        for pack, frame, slot in refs.tolist()
    ]


def put(frames: FrameWriter, data: bytes) -> Refs:
    return frames.store_pages(data, frames.hashes(data))


def test_a_frame_is_stored_once(store: MemoryStore, frames: FrameWriter) -> None:
    assert frames.store_frame(b"abc") == frames.store_frame(b"abc")
    assert frames.store_frame(b"abd") != frames.store_frame(b"abc")
    assert frames.counts.frames_stored == 2
    packs = frames.flush()
    assert FrameReader(store, KEY).frame(packs[0], 0) == b"abc"
    assert writer(store).store_frame(b"abc") == (0, 0)


@pytest.mark.parametrize("data", [b"", b"x", bytes(FRAME_BYTES), random_bytes(1, FRAME_BYTES)])
def test_any_bytes_make_a_frame(store: MemoryStore, frames: FrameWriter, data: bytes) -> None:
    pack, frame = frames.store_frame(data)
    packs = frames.flush()
    assert FrameReader(store, KEY).frame(packs[pack], frame) == data
    assert len(store.get(name_of(packs[pack].pack))) <= len(data) + 200


def test_a_run_is_found_again_as_a_whole_only(store: MemoryStore, frames: FrameWriter) -> None:
    run = b"".join(chunk(number) for number in range(FRAME_PAGES))
    first = frames.store_run(run)
    assert first["slot"].tolist() == list(range(FRAME_PAGES))
    assert frames.store_run(memoryview(bytearray(run))).tolist() == first.tolist()
    assert frames.counts.pages_stored == FRAME_PAGES
    put(frames, run[: 3 * PAGE_SIZE])
    assert frames.counts.pages_stored == FRAME_PAGES + 3
    assert b"".join(fetch(store, frames.flush(), first)) == run


def test_pages_are_found_one_by_one(store: MemoryStore, frames: FrameWriter) -> None:
    put(frames, chunk(1) + chunk(2) + chunk(3))
    refs = put(frames, chunk(3) + chunk(9) + chunk(1))
    assert frames.counts.pages_stored == 4
    assert fetch(store, frames.flush(), refs) == [chunk(3), chunk(9), chunk(1)]
    second = writer(store)
    refs = put(second, chunk(2) + chunk(8) + chunk(9) + chunk(7))
    packs = second.flush()
    second.check_references()
    second.close()
    assert second.counts.pages_stored == 2
    assert fetch(store, packs, refs) == [chunk(2), chunk(8), chunk(9), chunk(7)]


def test_new_pages_between_known_ones_are_gathered(store: MemoryStore, frames: FrameWriter) -> None:
    known = [chunk(number) for number in range(0, 80, 2)]
    put(frames, b"".join(known))
    mixed = [chunk(number) for number in range(80)]
    refs = put(frames, b"".join(mixed))
    assert frames.counts.pages_stored == 80
    assert frames.counts.frames_stored == 4
    assert fetch(store, frames.flush(), refs) == mixed


def test_a_short_last_chunk_is_its_own(store: MemoryStore, frames: FrameWriter) -> None:
    tail = chunk(5, 100)
    refs = put(frames, chunk(4) + tail)
    again = put(frames, chunk(4) + chunk(5, 101))
    assert refs[0].tolist() == again[0].tolist()
    assert refs[1].tolist() != again[1].tolist()
    assert put(frames, tail).tolist() == refs[1:].tolist()
    packs = frames.flush()
    assert fetch(store, packs, refs) == [chunk(4), tail]
    assert fetch(store, packs, again) == [chunk(4), chunk(5, 101)]


chunks = st.tuples(st.lists(st.integers(0, 9), max_size=70), st.integers(1, PAGE_SIZE))


@quick(40)
@given(st.lists(st.lists(chunks, max_size=3), max_size=3))
def test_runs_of_a_writer_share_what_they_have(runs: list[list[tuple[list[int], int]]]) -> None:
    store, seen = MemoryStore(), set[bytes]()
    for run in runs:
        frames, expected, found = writer(store), list[bytes](), list[Refs]()
        new = set[bytes]()
        for numbers, tail in run:
            pieces = [chunk(number) for number in numbers[:-1]]
            pieces += [chunk(number, tail) for number in numbers[-1:]]
            new.update(piece for piece in pieces if piece not in seen)
            found.append(put(frames, b"".join(pieces)))
            expected += pieces
        packs = frames.flush()
        frames.close()
        assert frames.counts.pages_stored == len(new)
        assert [c for refs in found for c in fetch(store, packs, refs)] == expected
        seen |= new


def test_many_threads_store_the_same_pages(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 40_000)
    frames = writer(store)
    pages = [random_bytes(number, PAGE_SIZE) for number in range(60)]
    ready = threading.Barrier(4)

    def work(thread: int) -> list[tuple[list[int], Refs]]:
        chance = np.random.default_rng(thread)
        ready.wait(30)
        stored = []
        for _ in range(12):
            numbers = chance.integers(0, len(pages), 10).tolist()
            stored.append((numbers, put(frames, b"".join(pages[n] for n in numbers))))
        return stored

    with ThreadPoolExecutor(4) as pool:
        results = [future.result(60) for future in [pool.submit(work, t) for t in range(4)]]
    packs = frames.flush()
    frames.close()
    assert len(packs) > 3
    for result in results:
        for numbers, refs in result:
            assert fetch(store, packs, refs) == [pages[number] for number in numbers]
    assert frames.counts.bytes_stored == sum(store.size(name) for name in store.list(""))


def test_packs_roll_over_when_they_are_full(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 100_000)
    monkeypatch.setattr(FrameWriter, "INDEX_ENTRIES", 40)
    frames = writer(store)
    data = [random_bytes(number, PAGE_SIZE) for number in range(100)]
    refs = [put(frames, page)[0].tolist() for page in data]
    packs = frames.flush()
    frames.close()
    assert len(packs) == 8
    assert sorted({pack for pack, _, _ in refs}) == list(range(8))
    assert all(pack.size < 100_000 + PAGE_SIZE + 5000 for pack in packs)
    assert len(list(store.list("packs/"))) == 8
    assert len(list(store.list("index/"))) > 1
    reader = FrameReader(store, KEY)
    assert [reader.frame(packs[pack], frame) for pack, frame, _ in refs] == data
    again = writer(store)
    for page in data:
        put(again, page)
    assert again.flush() and again.counts.pages_stored == 0
    again.close()


def test_what_is_to_be_avoided_is_stored_again(store: MemoryStore, frames: FrameWriter) -> None:
    put(frames, chunk(1))
    (pack,) = frames.flush()
    frames.store_root(b"root")
    second = FrameWriter(store, KEY, FrameReader(store, KEY), LEVEL, avoid={pack.pack})
    put(second, chunk(1))
    (again,) = second.flush()
    assert again.pack != pack.pack
    assert second.store_root(b"root").pack != frames.store_root(b"root").pack
    second.close()


def test_nothing_condemned_may_be_referred_to(store: MemoryStore, frames: FrameWriter) -> None:
    put(frames, chunk(1))
    (pack,) = frames.flush()
    condemned: set[PackId] = set()
    second = FrameWriter(store, KEY, FrameReader(store, KEY), LEVEL, condemned=lambda: condemned)
    put(second, chunk(1))
    second.flush()
    second.check_references()
    condemned.add(pack.pack)
    with pytest.raises(RepositoryError, match="was condemned"):
        second.check_references()
    second.close()


def test_the_index_is_written_while_a_run_goes_on(
    store: MemoryStore, frames: FrameWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next run finds what this one has stored, if it is killed; but not too often."""
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 1)
    for number in range(200):
        put(frames, chunk(number))
    frames.flush()
    segments = list(store.list("index/"))
    assert 20 < len(segments) < 80


def test_references_are_checked_before_a_commit(store: MemoryStore, frames: FrameWriter) -> None:
    put(frames, chunk(1))
    (pack,) = frames.flush()
    second = writer(store)
    put(second, chunk(1))
    second.flush()
    second.check_references()
    content = store.get(name_of(pack.pack))
    store.delete(name_of(pack.pack))
    with pytest.raises(ObjectMissingError):
        second.check_references()
    store.put_new(name_of(pack.pack), [content[:-1]])
    with pytest.raises(RepositoryError, match="does not have the size"):
        second.check_references()
    second.close()


class FailingStore(MemoryStore):
    """Every write fails from the given one on."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self._left = good
        self._count = threading.Lock()

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        with self._count:
            self._left -= 1
            if self._left < 0:
                raise RepositoryError("the disk is full")
        return super().put_new(name, chunks)


@pytest.mark.parametrize("good", [0, 1, 2, 5])
def test_a_failing_store_surfaces_and_nothing_hangs(
    good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 20_000)
    frames = writer(FailingStore(good))

    def work(thread: int) -> None:
        for number in range(40):
            put(frames, random_bytes(1000 * thread + number, PAGE_SIZE))

    with ThreadPoolExecutor(4) as pool:
        outcomes = [future.exception(60) for future in [pool.submit(work, t) for t in range(4)]]
    assert any(isinstance(outcome, RepositoryError) for outcome in outcomes)
    assert all(outcome is None or isinstance(outcome, RepositoryError) for outcome in outcomes)
    # Whoever goes on all the same gets no pack table.
    with pytest.raises(RepositoryError):
        frames.flush()
    frames.close()


def test_a_failure_of_the_last_pack_surfaces_in_flush() -> None:
    frames = writer(FailingStore(0))
    put(frames, chunk(1))
    with pytest.raises(RepositoryError, match="the disk is full"):
        frames.flush()
    frames.close()


def test_a_failure_of_the_index_or_the_root_surfaces() -> None:
    frames = writer(FailingStore(1))
    put(frames, chunk(1))
    with pytest.raises(RepositoryError, match="the disk is full"):
        frames.flush()
    with pytest.raises(RepositoryError, match="the disk is full"):
        frames.store_root(b"root")
    frames.close()


def test_memory_of_recent_pages_is_bounded(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "RECENT", 8)
    frames = writer(store)
    for number in range(50):
        put(frames, chunk(number))
        assert len(frames._recent) <= 8
    put(frames, chunk(49))
    assert frames.counts.pages_stored == 50
    put(frames, chunk(0))
    assert frames.counts.pages_stored == 51
    frames.close()


@pytest.fixture
def ten(store: MemoryStore, frames: FrameWriter) -> PackRef:
    """A pack of ten frames of one page each, some compressed."""
    for number in range(10):
        put(frames, chunk(number) if number % 2 else random_bytes(number, PAGE_SIZE))
    (pack,) = frames.flush()
    return pack


@pytest.mark.parametrize("read", [0, 20_000, 1 << 20])
@pytest.mark.parametrize("gap", [0, 9_000, 1 << 20])
def test_neighbours_are_read_together(
    store: MemoryStore, ten: PackRef, read: int, gap: int
) -> None:
    reader = FrameReader(store, KEY)
    every = [reader.frame(ten, number) for number in range(10)]
    for wanted in ([], [3], [0, 9], [0, 1, 2, 5, 8, 9], list(range(10))):
        found = list(reader.frames(ten, wanted, read, gap))
        assert found == [(number, every[number]) for number in wanted]


def test_a_frame_that_is_not_there_is_refused(store: MemoryStore, ten: PackRef) -> None:
    reader = FrameReader(store, KEY)
    with pytest.raises(CorruptObjectError, match="has no frame 10"):
        reader.frame(ten, 10)
    with pytest.raises(CorruptObjectError, match="has no frame 11"):
        list(reader.frames(ten, [1, 11], 0, 0))
    with pytest.raises(ObjectMissingError):
        reader.footer(PackRef(PackId("0" * 64), ten.size, ten.footer))


@pytest.mark.parametrize(("size", "footer"), [(1, 0), (0, 4), (0, -4), (-4000, 0), (0, 100_000)])
def test_a_wrong_reference_is_refused(
    store: MemoryStore, ten: PackRef, size: int, footer: int
) -> None:
    wrong = PackRef(ten.pack, ten.size + size, ten.footer + footer)
    with pytest.raises(CorruptObjectError):
        FrameReader(store, KEY).footer(wrong)


def test_no_flipped_byte_of_a_frame_is_read(store: MemoryStore, ten: PackRef) -> None:
    name = name_of(ten.pack)
    data = store.get(name)
    footer = FrameReader(store, KEY).footer(ten)
    for number in range(10):
        start, length = int(footer.offsets[number]), int(footer.entries["stored"][number])
        for at in {start, start + 4, start + length // 2, start + length - 1}:
            flipped = bytearray(data)
            flipped[at] ^= 0x04
            store.delete(name)
            store.put_new(name, [flipped])
            with pytest.raises(CorruptObjectError):
                FrameReader(store, KEY).frame(ten, number)


def test_footers_in_memory_are_bounded(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 1000)
    frames = writer(store)
    for number in range(10):
        put(frames, random_bytes(number, PAGE_SIZE))
    packs = frames.flush()
    frames.close()
    reader = FrameReader(store, KEY)
    monkeypatch.setattr(FrameReader, "FOOTER_BYTES", 3 * packs[0].footer)
    for pack in [*packs, *packs[::-1]]:
        assert reader.footer(pack).pack == pack.pack
        assert 1 <= len(reader._footers) <= 3
        assert reader._footer_bytes == sum(f.length for f in reader._footers.values())


def test_what_waits_for_its_pack_takes_no_more_memory_than_its_bytes(store: MemoryStore) -> None:
    frames = writer(store)
    page = bytes(range(256)) * 32
    tracemalloc.start()
    try:
        for number in range(200):
            frames.store_run(number.to_bytes(2, "big") * 16 + page[32:] + page * 31)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert frames.counts.bytes_compressed < 1 << 20
    assert held < 4 << 20  # and not 200 times 256 kB
    frames.flush()
    frames.close()
