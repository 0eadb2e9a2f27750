"""Merging the content index: it stays small, whatever fails, and never says less than before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import RepositoryError
from dbmodule.ports import Buffer, never_cancelled
from dbmodule.repository import index, merge
from dbmodule.repository.index import Hit, check, encode
from dbmodule.repository.lookup import ContentIndex
from dbmodule.repository.merge import tidy
from dbmodule.repository.pack import ENCODING_RAW, Footer, PackBuilder, name_of
from dbmodule.storage import MemoryStore
from tests.fault.fault_store import Fault, FaultStore
from tests.unit.strategies import KEY, quick

Known = dict[bytes, set[tuple[str, int, int]]]
"""Hash of a page → where it may be found: pack, frame, slot."""


def hash_of(number: int) -> bytes:
    return random.Random(number).randbytes(16)


def pack_of(pages: list[list[int]]) -> Footer:
    """A pack of one frame per list of pages, the hash of a page made from its number."""
    builder = PackBuilder()
    for numbers in pages:
        hashes = b"".join(map(hash_of, numbers))
        builder.add(b"", 0, ENCODING_RAW, random.Random(str(numbers)).randbytes(32), hashes)
    return builder.seal(KEY)[1]


def add(store: MemoryStore, footers: list[Footer], known: Known) -> None:
    """Write the packs' names, and segments over them."""
    for footer in footers:
        if name_of(footer.pack) not in set(store.list("packs/")):
            store.put_new(name_of(footer.pack), [b""])
        for frame, first in enumerate(footer.first_hash.tolist()):
            for slot in range(int(footer.entries["hashed_pages"][frame])):
                digest = bytes(footer.page_hashes[first + slot])
                known.setdefault(digest, set()).add((footer.pack, frame, slot))
    for name, chunks in encode(footers, KEY):
        store.put_new(name, chunks)


def filled(segments: int, pages: int) -> tuple[MemoryStore, Known]:
    """A repository with segments of one pack each, which share a few pages."""
    store, known, numbers = MemoryStore(), Known(), count()
    for at in range(segments):
        frames = [[next(numbers) for _ in range(10)] for _ in range(pages // 10)]
        frames[0][0] = 1_000_000 + at // 2  # two packs have this page
        add(store, [pack_of(frames)], known)
    return store, known


def assert_complete(store: MemoryStore, known: Known) -> None:
    """Everything known is found in one of its places, and nothing else is found."""
    hashes = [*known, hash_of(-1), bytes(16), b"\xff" * 16]
    hits = ContentIndex(store, KEY).find_many(hashes, whole=False)
    for digest, hit in zip(hashes, hits, strict=True):
        if digest in known:
            assert hit is not None
            assert (hit.pack.pack, hit.frame, hit.slot) in known[digest]
        else:
            assert hit is None


def segments_in(store: MemoryStore) -> list[str]:
    return list(store.list(index.PREFIX))


def lanes_in(store: MemoryStore) -> int:
    segments, unusable = index.open_segments(store, KEY)
    assert not unusable
    old = index.superseded(segments)
    return len(index.lanes(s for s in segments if s.name not in old))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and pieces so small that all of the merge's machinery is in use."""
    monkeypatch.setattr(index, "SEGMENT_ENTRIES", 300)
    monkeypatch.setattr(merge, "MERGE_BYTES", 4 * 256 * 24)


def test_segments_become_one_run_that_says_the_same() -> None:
    store, known = filled(6, 400)
    before = {ref.pack for n in segments_in(store) for ref in check(n, store.get(n), KEY)}
    tidy(store, KEY, never_cancelled)
    assert_complete(store, known)
    assert lanes_in(store) == 1
    merged = [check(name, store.get(name), KEY) for name in segments_in(store)]
    assert len(merged) > 5  # in segments of bounded size
    assert all({ref.pack for ref in refs} == before for refs in merged)
    # Duplicates are gone: one entry per page, and one per frame.
    opened, _ = index.open_segments(store, KEY)
    assert sum(s.head.entries for s in opened) == len(known) + 6 * 40


@given(
    st.lists(
        st.lists(
            st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6), min_size=1, max_size=4),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 2**32),
)
@quick(60)
def test_any_history_of_segments_and_merges_equals_a_dictionary(
    runs: list[list[list[list[int]]]], seed: int
) -> None:
    store, known, chance = MemoryStore(), Known(), random.Random(seed)
    for packs in runs:
        add_new(store, [pack_of(frames) for frames in packs], known)
        if chance.random() < 0.5:
            tidy(store, KEY, never_cancelled)
        assert_complete(store, known)
    tidy(store, KEY, never_cancelled)
    assert_complete(store, known)
    assert lanes_in(store) <= 4


def add_new(store: MemoryStore, footers: list[Footer], known: Known) -> None:
    """As `add`, where the very same segment may be there already."""
    names = {name for name, _ in encode(footers, KEY)}
    if not names & set(segments_in(store)):
        add(store, footers, known)


def test_the_number_of_lanes_grows_as_a_logarithm() -> None:
    store, known, numbers = MemoryStore(), Known(), count()
    written = 0
    for _ in range(120):
        add(store, [pack_of([[next(numbers) for _ in range(20)]])], known)
        before = set(segments_in(store))
        tidy(store, KEY, never_cancelled)
        assert lanes_in(store) <= 5
        written += sum(store.size(name) for name in set(segments_in(store)) - before)
    assert_complete(store, known)
    # Each entry is rewritten a few times, not with every backup.
    assert written < 12 * sum(store.size(name) for name in segments_in(store))


def test_a_merge_that_is_cut_off_anywhere_loses_nothing() -> None:
    for fault in (Fault.BEFORE, Fault.AFTER, Fault.FULL):
        for at in count(1):
            store, known = filled(3, 300)
            failing = FaultStore(store, at, fault)
            tidy(failing, KEY, never_cancelled)  # an error of the store is no error of the backup
            assert_complete(store, known)
            tidy(store, KEY, never_cancelled)
            assert_complete(store, known)
            assert lanes_in(store) == 1
            assert all(check(name, store.get(name), KEY) for name in segments_in(store))
            if not failing.struck:
                break
        assert at > 3


class DeletingStore(MemoryStore):
    """Deletes so many objects, and refuses to delete more; -1 deletes all."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.allowed = allowed
        self.refused = 0

    def delete(self, name: str) -> None:
        if self.allowed == 0:
            self.refused += 1
            raise RepositoryError(f"cannot delete {name}: the object is locked")
        self.allowed -= 1
        super().delete(name)


def test_deletion_may_end_after_any_segment() -> None:
    for allowed in range(4):
        full, known = filled(3, 300)
        store = DeletingStore(allowed)
        for name in full.list(""):
            store.put_new(name, [full.get(name)])
        tidy(store, KEY, never_cancelled)
        assert_complete(store, known)
        store.allowed = -1
        tidy(store, KEY, never_cancelled)
        assert_complete(store, known)
        assert lanes_in(store) == 1
        opened, _ = index.open_segments(store, KEY)
        assert not index.superseded(opened)


def test_where_nothing_can_be_deleted_nothing_is_merged_twice() -> None:
    full, known = filled(4, 200)
    store = DeletingStore(0)
    for name in full.list(""):
        store.put_new(name, [full.get(name)])
    tidy(store, KEY, never_cancelled)
    after = segments_in(store)
    for _ in range(3):
        tidy(store, KEY, never_cancelled)
    assert segments_in(store) == after
    assert store.refused
    assert lanes_in(store) == 1
    assert_complete(store, known)
    add(store, [pack_of([[7_000_000 + at for at in range(300)][:200]])], known)
    tidy(store, KEY, never_cancelled)
    assert lanes_in(store) <= 2
    assert_complete(store, known)


def test_a_reader_that_was_there_before_still_finds_everything() -> None:
    store, known = filled(4, 300)
    reader = ContentIndex(store, KEY)
    names = segments_in(store)
    tidy(store, KEY, never_cancelled)
    assert not set(names) & set(segments_in(store))
    hits = reader.find_many(list(known), whole=False)
    assert None not in hits


def test_a_reader_whose_index_is_gone_finds_nothing_and_goes_on() -> None:
    store, known = filled(2, 100)
    reader = ContentIndex(store, KEY)
    for name in segments_in(store):
        store.delete(name)
    assert set(reader.find_many(list(known), whole=False)) == {None}


class Interfering(MemoryStore):
    """Lets another run do something before the Nth read of a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, Callable[[], None]] = {}
        self.reads = 0

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads += 1
        if (action := self.before.pop(self.reads, None)) is not None:
            action()
        return super().get(name, offset, length)


def test_two_runs_may_merge_at_once() -> None:
    for at in count(1):
        full, known = filled(3, 300)
        store = Interfering()
        for name in full.list(""):
            store.put_new(name, [full.get(name)])
        store.before[at] = lambda store=store: tidy(store, KEY, never_cancelled)  # type: ignore[misc]
        tidy(store, KEY, never_cancelled)
        happened = not store.before
        store.before.clear()
        assert_complete(store, known)
        tidy(store, KEY, never_cancelled)
        assert_complete(store, known)
        assert lanes_in(store) == 1
        if not happened:
            break
    assert at > 10


def test_a_damaged_segment_is_left_for_verify_and_the_others_are_merged() -> None:
    full, known = filled(3, 200)
    damaged = max(segments_in(full), key=full.size)
    size = full.size(damaged)
    for at in [0, 9, 30, 60, 70, 95, 100, 130, 150, 200, size // 2, size - 40, size - 1]:
        store = MemoryStore()
        for name in full.list(""):
            data = bytearray(full.get(name))
            if name == damaged:
                data[at] ^= 0x40
            store.put_new(name, [data])
        tidy(store, KEY, never_cancelled)
        assert damaged in segments_in(store)
        lost = {ref.pack for ref in check(damaged, full.get(damaged), KEY)}
        still = {h: p for h, p in known.items() if not {pack for pack, _, _ in p} & lost}
        hits = ContentIndex(store, KEY).find_many(list(still), whole=False)
        assert None not in hits
        for name in set(segments_in(store)) - {damaged}:
            assert lost.isdisjoint(ref.pack for ref in check(name, store.get(name), KEY))


@pytest.mark.parametrize("length", [0, 20, 56, 100, 200, 1000, 7000])
def test_a_segment_cut_short_is_left_out(length: int) -> None:
    store, _ = filled(3, 300)
    damaged = max(segments_in(store), key=store.size)
    data = store.get(damaged)
    assert length < len(data)
    store.delete(damaged)
    store.put_new(damaged, [data[:length]])
    tidy(store, KEY, never_cancelled)
    assert store.get(damaged) == data[:length]
    assert len(segments_in(store)) > 1


def test_packs_that_are_gone_are_forgotten_when_all_is_merged() -> None:
    store, known = filled(4, 300)
    gone = next(iter(store.list("packs/")))
    store.delete(gone)
    identity = gone.rpartition("/")[2]
    tidy(store, KEY, never_cancelled)
    for name in segments_in(store):
        assert identity not in {ref.pack for ref in check(name, store.get(name), KEY)}
    kept = {h: {p for p in places if p[0] != identity} for h, places in known.items()}
    assert_complete(store, {h: places for h, places in kept.items() if places})


def test_an_index_of_which_no_pack_is_left_goes_away() -> None:
    store, _ = filled(2, 100)
    for name in list(store.list("packs/")):
        store.delete(name)
    tidy(store, KEY, never_cancelled)
    assert segments_in(store) == []


def test_cancelling_a_merge_stops_it_and_loses_nothing() -> None:
    store, known = filled(3, 300)
    asked = count()
    tidy(store, KEY, lambda: next(asked) == 2)
    assert next(asked) == 3
    assert lanes_in(store) > 1
    assert_complete(store, known)


class MeasuringStore(MemoryStore):
    """The longest read and the longest object."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_read = 0
        self.longest_object = 0

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(name, offset, length)
        self.longest_read = max(self.longest_read, len(data))
        return data

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        size = super().put_new(name, chunks)
        self.longest_object = max(self.longest_object, size)
        return size


def test_a_merge_never_holds_much_at_a_time() -> None:
    store, numbers = MeasuringStore(), count()
    for _ in range(4):
        add(store, [pack_of([[next(numbers) for _ in range(30)] for _ in range(100)])], Known())
    total = sum(store.size(name) for name in segments_in(store))
    store.longest_read = store.longest_object = 0
    tidy(store, KEY, never_cancelled)
    assert lanes_in(store) == 1
    assert store.longest_read <= 2 * 256 * 24
    assert store.longest_object <= 300 * 24 + 1000
    assert total > 40 * store.longest_read


def test_hits_of_merged_segments_name_the_right_pack() -> None:
    store, known = filled(3, 300)
    refs = {
        ref.pack: ref for name in segments_in(store) for ref in check(name, store.get(name), KEY)
    }
    tidy(store, KEY, never_cancelled)
    for hit in ContentIndex(store, KEY).find_many(list(known), whole=False):
        assert isinstance(hit, Hit)
        assert hit.pack == refs[hit.pack.pack]
