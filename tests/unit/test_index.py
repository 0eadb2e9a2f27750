"""The content index: it finds what is there, and when it lies, only space is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from dbmodule.delta import FRAME_PAGES
from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.ident import PAGE_SIZE
from dbmodule.repository import index
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.index import Hit, PackRef, check, encode
from dbmodule.repository.lookup import ContentIndex
from dbmodule.repository.pack import (
    ENCODING_RAW,
    Footer,
    PackBuilder,
    keyed,
    name_of,
    open_whole,
)
from dbmodule.storage import MemoryStore
from tests.unit.strategies import KEY, chunk, random_bytes, writer


def pack_of(frames: list[list[bytes]], store: MemoryStore | None = None) -> Footer:
    """A pack of one frame per list of pages, each page hashed."""
    builder = PackBuilder()
    for pages in frames:
        raw = b"".join(pages)
        hashes = b"".join([keyed(KEY, page, 16) for page in pages])
        builder.add(raw, len(raw), ENCODING_RAW, keyed(KEY, raw), hashes)
    chunks, footer = builder.seal(KEY)
    if store is not None:
        store.put_new(name_of(footer.pack), chunks)
    return footer


def indexed(footers: list[Footer]) -> tuple[MemoryStore, str]:
    store = MemoryStore()
    ((name, chunks),) = encode(footers, KEY)
    store.put_new(name, chunks)
    return store, name


def find(index: ContentIndex, digest: bytes, *, whole: bool) -> Hit | None:
    (hit,) = index.find_many([digest], whole=whole)
    return hit


def ref_of(footer: Footer) -> PackRef:
    return PackRef(footer.pack, footer.object_size, footer.length)


def test_frames_and_pages_are_found_where_they_are() -> None:
    first = pack_of([[b"a", b"b"], [b"c"]])
    second = pack_of([[b"d"], [b"e", b"f"]])
    store, _ = indexed([first, second])
    found = ContentIndex(store, KEY)
    assert find(found, keyed(KEY, b"b", 16), whole=False) == Hit(ref_of(first), 0, 1)
    assert find(found, keyed(KEY, b"e", 16), whole=False) == Hit(ref_of(second), 1, 0)
    assert find(found, keyed(KEY, b"ef", 16), whole=True) == Hit(ref_of(second), 1, 255)
    # A frame of one page has that page's hash: both kinds of entry are told apart.
    assert find(found, keyed(KEY, b"c", 16), whole=True) == Hit(ref_of(first), 1, 255)
    assert find(found, keyed(KEY, b"c", 16), whole=False) == Hit(ref_of(first), 1, 0)
    assert find(found, keyed(KEY, b"a", 16), whole=True) is None
    assert find(found, keyed(KEY, b"nothing", 16), whole=False) is None


def test_a_repository_without_segments_finds_nothing() -> None:
    assert find(ContentIndex(MemoryStore(), KEY), bytes(16), whole=True) is None


def test_hashes_of_zero_bytes_are_sorted_and_found_like_others() -> None:
    builder = PackBuilder()
    hashes = [bytes(16), b"\0" * 15 + b"\1", b"\1" + bytes(15), b"\xff" * 16, b"\xff" + bytes(15)]
    for at, digest in enumerate(hashes):
        builder.add(bytes([at]), 1, ENCODING_RAW, digest + bytes(16), b"")
    footer = builder.seal(KEY)[1]
    store, _ = indexed([footer])
    for at, digest in enumerate(hashes):
        assert find(ContentIndex(store, KEY), digest, whole=True) == Hit(ref_of(footer), at, 255)


def huge_footer(frames: int) -> Footer:
    """`frames` frames of 32 hashed pages, all hashes random."""
    builder = PackBuilder()
    digests = random_bytes(frames, frames * 32)
    hashes = random_bytes(frames + 1, frames * FRAME_PAGES * 16)
    size = FRAME_PAGES * 16
    for at in range(frames):
        digest, pages = digests[at * 32 : at * 32 + 32], hashes[at * size : (at + 1) * size]
        builder.add(b"", 0, ENCODING_RAW, digest, pages)
    return builder.seal(KEY)[1]


class CountingStore(MemoryStore):
    """Notes the length of every read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(name, offset, length)
        self.reads.append(len(data))
        return data


@pytest.mark.parametrize("cache", [20_000, 1 << 30])
def test_a_large_segment_is_read_in_small_pieces(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    footers = [huge_footer(2100), huge_footer(3)]
    store = CountingStore()
    ((name, chunks),) = encode(footers, KEY)
    store.put_new(name, chunks)
    # A cache that holds a few blocks, and one that holds them all: both find everything.
    monkeypatch.setattr(ContentIndex, "CACHE_BYTES", cache)
    found = ContentIndex(store, KEY)
    assert store.reads == [min(20 << 10, store.size(name))]
    chance = random.Random(1)
    for footer in footers:
        for _ in range(200):
            frame, slot = chance.randrange(len(footer.entries)), chance.randrange(FRAME_PAGES)
            page = footer.page_hash(frame, slot)
            assert page is not None
            assert find(found, page, whole=False) == Hit(ref_of(footer), frame, slot)
            digest = footer.frame_hash(frame)[:16]
            assert find(found, digest, whole=True) == Hit(ref_of(footer), frame, 255)
            assert find(found, digest, whole=False) is None
    blocks = store.reads[1:]
    if cache == 20_000:
        assert max(blocks) <= index.BLOCK_ENTRIES * index.ENTRY.itemsize
        assert found._blocks.bytes <= 20_000
        assert sum(blocks) <= 1300 * max(blocks)
    else:
        assert sum(blocks) <= store.size(name)  # nothing is read twice
    assert check(name, store.get(name), KEY) == [ref_of(f) for f in footers]


def test_many_are_found_at_once_in_any_order() -> None:
    footers = [huge_footer(40), huge_footer(90)]
    store, _ = indexed(footers)
    wanted = [(f, at) for f in footers for at in range(0, len(f.page_hashes), 7)]
    random.Random(5).shuffle(wanted)
    hashes = [bytes(f.page_hashes[at]) for f, at in wanted]
    hashes[3] = hashes[4]
    hashes[9] = b"\0" * 16
    hits = ContentIndex(store, KEY).find_many(hashes, whole=False)
    for number, ((footer, at), hit) in enumerate(zip(wanted, hits, strict=True)):
        if number == 3:
            assert hit == hits[4]
        elif number == 9:
            assert hit is None
        else:
            assert hit == Hit(ref_of(footer), at // FRAME_PAGES, at % FRAME_PAGES)


def test_entries_beyond_one_segment_go_into_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SEGMENT_ENTRIES", 1000)
    footer = huge_footer(100)
    store = MemoryStore()
    for name, chunks in encode([footer], KEY):
        store.put_new(name, chunks)
        assert check(name, store.get(name), KEY) == [ref_of(footer)]
    opened, _ = index.open_segments(store, KEY)
    assert sorted(s.head.entries for s in opened) == [303, 999, 999, 999]
    assert [len(row) for row in index.lanes(opened)] == [4]
    (row,) = index.lanes(opened)
    assert row[0].head.first == 0
    assert [a.head.last + 1 for a in row[:-1]] == [b.head.first for b in row[1:]]
    assert row[-1].head.last == index.LAST_PREFIX
    hashes = [bytes(page) for page in footer.page_hashes]
    assert None not in ContentIndex(store, KEY).find_many(hashes, whole=False)


def test_the_last_frame_number_and_slot_fit() -> None:
    place = np.uint32((1 << 24) - 1) << np.uint32(8) | np.uint32(index.WHOLE)
    assert int(place) >> 8 == (1 << 24) - 1
    assert int(place) & 0xFF == index.WHOLE
    assert FRAME_PAGES <= index.WHOLE


def test_every_flipped_missing_or_added_byte_is_noticed() -> None:
    store, name = indexed([pack_of([[b"a", b"b"], [b"c"]])])
    data = store.get(name)
    assert [ref.size for ref in check(name, data, KEY)] == [
        pack_of([[b"a", b"b"], [b"c"]]).object_size
    ]
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        for wrong in (bytes(flipped), data[:at]):
            with pytest.raises(CorruptObjectError):
                check(name, wrong, KEY)
    for wrong_name, wrong in ((name, data + b"\0"), ("index/" + "0" * 64, data)):
        with pytest.raises(CorruptObjectError):
            check(wrong_name, wrong, KEY)


def stored_after(store: MemoryStore) -> int:
    """Store two chunks in a run of its own, prove that they can be read; pages newly stored."""
    frames = writer(store)
    try:
        data = chunk(1) + chunk(2)
        refs = frames.store_pages(data, frames.hashes(data))
        packs = frames.flush()
        frames.check_references()
    finally:
        frames.close()
    reader = FrameReader(store, KEY)
    for slot, (pack, frame, at) in enumerate(refs.tolist()):
        raw = reader.frame(packs[pack], frame)
        assert raw[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] == chunk(slot + 1)
    return frames.counts.pages_stored


def test_what_the_index_knows_is_not_stored_again() -> None:
    store = MemoryStore()
    assert stored_after(store) == 2
    assert stored_after(store) == 0


def test_a_hit_in_a_missing_pack_costs_only_space() -> None:
    store = MemoryStore()
    stored_after(store)
    for name in list(store.list("packs/")):
        store.delete(name)
    assert stored_after(store) == 2


def test_a_hit_in_a_damaged_pack_costs_only_space() -> None:
    store = MemoryStore()
    other = pack_of([[b"other"]], store)
    wanted = pack_of([[chunk(1)], [chunk(2)]])
    # The index names a pack of another size under which other bytes lie.
    store.put_new(name_of(wanted.pack), [store.get(name_of(other.pack))])
    ((name, chunks),) = encode([wanted], KEY)
    store.put_new(name, chunks)
    assert stored_after(store) == 2


def segment_with(change: dict[str, int], pack_change: dict[str, int]) -> MemoryStore:
    """A repository whose index says something else of the chunks than their pack does."""
    store = MemoryStore()
    wanted = pack_of([[chunk(1)], [chunk(2)]], store)
    ((name, chunks),) = encode([wanted], KEY)
    parts = [bytearray(part) for part in chunks]
    packs, entries = np.frombuffer(parts[2], index.PACK), np.frombuffer(parts[3], index.ENTRY)
    for field, value in pack_change.items():
        packs[field] = value
    for field, value in change.items():
        entries[field] = value
    store.put_new(name, parts)
    return store


@pytest.mark.parametrize(
    ("entry", "pack"),
    [
        ({"pack": 1}, {}),
        ({"pack": 0xFFFFFFFF}, {}),
        ({"place": 7 << 8}, {}),
        ({"place": 0}, {"size": 0}),
        ({}, {"size": 0}),
        ({}, {"size": 2**63}),
        ({}, {"footer": 0}),
        ({}, {"footer": 0xFFFFFFFF}),
        ({"place": 5}, {}),
    ],
)
def test_a_wrong_entry_costs_only_space(entry: dict[str, int], pack: dict[str, int]) -> None:
    assert stored_after(segment_with(entry, pack)) == 2


class Vanishing(MemoryStore):
    """Lists objects that an expiry removes right then."""

    def list(self, prefix: str) -> Iterator[str]:
        return iter([*super().list(prefix), f"{prefix}{'0' * 64}"])


def test_a_segment_that_is_removed_while_it_is_used_is_as_none() -> None:
    store = MemoryStore()
    assert stored_after(store) == 2
    frames = writer(store)
    (name,) = store.list(index.PREFIX)
    store.delete(name)
    data = chunk(1) + chunk(2)
    frames.store_pages(data, frames.hashes(data))
    frames.flush()
    assert frames.counts.pages_stored == 2
    frames.close()
    assert stored_after(Vanishing()) == 2


def test_a_wrong_size_is_noticed_though_the_footer_is_at_hand() -> None:
    store = segment_with({}, {"footer": 9})
    (name,) = store.list("packs/")
    footer = open_whole(name, memoryview(store.get(name)), KEY)
    frames = writer(store)
    frames._reader.footer(ref_of(footer))
    data = chunk(1)
    frames.store_pages(data, frames.hashes(data))
    packs = frames.flush()
    frames.close()
    reader = FrameReader(store, KEY)
    assert all(reader.footer(ref).pack == ref.pack for ref in packs)


def test_no_flipped_byte_of_a_segment_costs_more_than_space() -> None:
    stored = MemoryStore()
    stored_after(stored)
    (name,) = stored.list(index.PREFIX)
    packs = {pack: stored.get(pack) for pack in stored.list("packs/")}
    data = stored.get(name)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 0x81
        store = MemoryStore()
        for pack, content in packs.items():
            store.put_new(pack, [content])
        store.put_new(name, [flipped])
        assert stored_after(store) in (0, 1, 2)


@pytest.mark.parametrize("length", [0, 10, 55, 60, 80, 110, 150, 190])
def test_a_segment_cut_short_costs_only_space(length: int) -> None:
    store = MemoryStore()
    stored_after(store)
    (name,) = store.list(index.PREFIX)
    data = store.get(name)
    store.delete(name)
    store.put_new(name, [data[:length]])
    assert stored_after(store) in (1, 2)
    assert length < len(data)


def test_the_check_says_when_a_segment_is_of_another_version() -> None:
    store, name = indexed([pack_of([[b"a"]])])
    data = bytearray(store.get(name))
    data[8] = 9  # the version
    body = bytes(data[:-32])
    digest = keyed(KEY, body)
    with pytest.raises(FormatVersionError):
        check(index.PREFIX + digest.hex(), body + digest, KEY)
