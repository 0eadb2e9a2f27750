"""Segments of the content index: which frame or page, by its hash, lies where.

    segment   = header, directory, replaced, head hash, packs, entries, hash
    header    = magic "DBMINDX2", format u32, packs u32, entries u64, first u32, last u32,
                replaced u32, zero u32, hash of the pack table 16                     (56 bytes)
    directory = per block of 256 entries: prefix u32 of its first entry
    replaced  = per segment whose entries this one repeats: first half of its id      (16 bytes)
    head hash = keyed BLAKE3 of all before, first half                                (16 bytes)
    packs     = per pack: id 32, object size u64, footer length u32                   (44 bytes)
    entries   = hash 16, pack u32 (row of the pack table), frame << 8 | slot u32      (24 bytes)
    hash      = keyed BLAKE3 of all before                                            (32 bytes)

The *prefix* of a hash is its first four bytes as a big-endian number. A segment covers the hashes
whose prefixes are `first` to `last`, has one entry for a hash at most (two where it is a frame's
and a page's), in ascending order, and no more than `SEGMENT_ENTRIES` of them, so it fits into one
put: a longer sorted run is several segments, each with a range of its own. Slot 255 means the
whole frame.

Invariant: the index is a hint and never the truth. A hit counts only after the pack's own footer,
which is authenticated by the pack's name, has confirmed it. So a stale or damaged index can cost
space, never a byte of data. Look-ups are in `lookup`, merging in `merge`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, FormatVersionError, ObjectMissingError
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.registry import HASH_BYTES
from dbmodule.repository.document import FORMAT
from dbmodule.repository.pack import Footer, PackId, keyed

PREFIX = "index/"
MAGIC = b"DBMINDX2"
HEADER = struct.Struct("<8sIIQIIII16s")
PACK = np.dtype([("id", "V32"), ("size", "<u8"), ("footer", "<u4")])
# The hash as two big-endian halves: so numbers sort as the byte strings do.
ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("pack", "<u4"), ("place", "<u4")])
WHOLE = 255
"""As a slot: the frame as a whole, not one of its pages."""
BLOCK_ENTRIES = 256
SEGMENT_ENTRIES = 1 << 20
LAST_PREFIX = 0xFFFFFFFF

_HEAD_BYTES = 20 << 10
"""Enough for header and directory of the longest segment, and for what it replaces."""
_MAX_HEAD_BYTES = 1 << 28
_OPENED_AT_ONCE = 8

Packs = NDArray[Any]
"""Shape (packs,), dtype `PACK`."""
Entries = NDArray[Any]
"""Shape (n,), dtype `ENTRY`, ascending by hash, a page's before a frame's."""


@dataclass(frozen=True, slots=True)
class PackRef:
    """What a reader must know to open a pack with one ranged read."""

    pack: PackId
    size: int
    footer: int


@dataclass(frozen=True, slots=True)
class Hit:
    pack: PackRef
    frame: int
    slot: int


def prefixes(entries: Entries) -> NDArray[np.uint32]:
    """The first four bytes of each entry's hash, as a number."""
    return (entries["high"].astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def ordered(entries: Entries) -> Entries:
    """Entries in the order of a segment; of equal ones the first."""
    high = entries["high"].astype(np.uint64)
    order = np.argsort(high, kind="stable")
    high = high[order]
    if not (high[1:] == high[:-1]).any():
        return entries[order]
    # Equal hashes, or a frame of one page: rare, and then ordered by all that tells them apart.
    whole = entries["place"] & 0xFF == WHOLE
    order = np.lexsort((whole, entries["low"].astype(np.uint64), entries["high"]))
    entries, whole = entries[order], whole[order]
    again = (
        (entries["high"][1:] == entries["high"][:-1])
        & (entries["low"][1:] == entries["low"][:-1])
        & (whole[1:] == whole[:-1])
    )
    return entries[np.concatenate(([True], ~again))] if len(entries) else entries


def _entries_of(ordinal: int, footer: Footer) -> Entries:
    """Index entries of a pack: one per frame, one per hashed page."""
    frames = np.arange(len(footer.entries), dtype=np.uint32)
    counts = footer.entries["hashed_pages"].astype(np.int64)
    slots = np.arange(len(footer.page_hashes)) - np.repeat(footer.first_hash, counts)
    out = np.empty(len(frames) + len(slots), ENTRY)
    halves = np.ascontiguousarray(footer.entries["hash"]).view(">u8").reshape(-1, 4)
    pages = np.ascontiguousarray(footer.page_hashes).view(">u8").reshape(-1, 2)
    out["high"] = np.concatenate((halves[:, 0], pages[:, 0]))
    out["low"] = np.concatenate((halves[:, 1], pages[:, 1]))
    out["pack"] = ordinal
    out["place"] = np.concatenate(
        (frames << 8 | WHOLE, np.repeat(frames, counts) << 8 | slots.astype(np.uint32))
    )
    return out


def encode(footers: Iterable[Footer], key: bytes) -> Iterator[tuple[str, list[Buffer]]]:
    """Segments over `footers`: their object names and bytes. There is one, unless they are many.

    One must be written before the next one is asked for.
    """
    listed = list(footers)
    packs = np.empty(len(listed), PACK)
    packs["id"] = np.array([bytes.fromhex(f.pack) for f in listed], "V32")
    packs["size"] = [f.object_size for f in listed]
    packs["footer"] = [f.length for f in listed]
    entries = ordered(np.concatenate([_entries_of(i, f) for i, f in enumerate(listed)]))
    for part, first, last in cut([entries]):
        yield seal(packs, part, first, last, [], key)


def cut(stretches: Iterable[Entries]) -> Iterator[tuple[Entries, int, int]]:
    """Ascending entries in parts that segments can hold, with the prefixes that each covers.

    Together the parts cover all prefixes, and none twice (but where one prefix alone would be too
    much). A part must be done with before the next one is asked for: its memory is used again.
    """
    buffer = np.empty(SEGMENT_ENTRIES, ENTRY)
    filled = first = 0
    for stretch in stretches:
        at = 0
        while at < len(stretch):
            if filled == len(buffer):
                final = int(prefixes(buffer[-1:])[0])
                kept = int(np.searchsorted(prefixes(buffer), final, "left"))
                if kept:
                    yield buffer[:kept], first, final - 1
                else:
                    yield buffer, first, final
                    kept = filled
                buffer[: filled - kept] = buffer[kept:]
                filled, first = filled - kept, final
            count = min(len(buffer) - filled, len(stretch) - at)
            buffer[filled : filled + count] = stretch[at : at + count]
            filled, at = filled + count, at + count
    if filled:
        yield buffer[:filled], first, LAST_PREFIX


def seal(
    packs: Packs, entries: Entries, first: int, last: int, replaced: Iterable[str], key: bytes
) -> tuple[str, list[Buffer]]:
    """The segment of these entries: its object name and its bytes."""
    table = packs.tobytes()
    ids = [bytes.fromhex(name.removeprefix(PREFIX))[:HASH_BYTES] for name in replaced]
    header = HEADER.pack(
        MAGIC,
        FORMAT,
        len(packs),
        len(entries),
        first,
        last,
        len(ids),
        0,
        keyed(key, table, HASH_BYTES),
    )
    directory = prefixes(entries[::BLOCK_ENTRIES]).astype("<u4")
    head = b"".join([header, directory.tobytes(), *ids])
    body: list[Buffer] = [
        head,
        keyed(key, head, HASH_BYTES),
        table,
        # numpy joins arrays into the machine's own byte order.
        np.ascontiguousarray(entries, ENTRY).view(np.uint8).data,
    ]
    hasher = blake3(key=key)
    for chunk in body:
        hasher.update(chunk)
    digest = hasher.digest()
    return PREFIX + digest.hex(), [*body, digest]


@dataclass(frozen=True, slots=True)
class Head:
    """What a segment says of itself."""

    packs: int
    entries: int
    first: int
    last: int
    replaced: int
    pack_table: bytes
    """Keyed hash of the pack table: segments that were merged together share it."""

    @classmethod
    def parse(cls, name: str, data: bytes) -> Head:
        """Raises `CorruptObjectError` or `FormatVersionError`."""
        if len(data) < HEADER.size:
            raise CorruptObjectError(f"{name}: too short to be an index")
        magic, version, packs, entries, first, last, replaced, zero, table = HEADER.unpack_from(
            data
        )
        if magic != MAGIC:
            raise CorruptObjectError(f"{name}: not an index")
        if version != FORMAT:
            raise FormatVersionError(f"{name}: index format {version} is not known")
        if zero or first > last or not 0 < entries < 1 << 32:
            raise CorruptObjectError(f"{name}: its header makes no sense")
        return cls(packs, entries, first, last, replaced, table)

    @property
    def blocks(self) -> int:
        return -(-self.entries // BLOCK_ENTRIES)

    @property
    def replaced_at(self) -> int:
        return HEADER.size + 4 * self.blocks

    @property
    def hash_at(self) -> int:
        return self.replaced_at + HASH_BYTES * self.replaced

    @property
    def packs_at(self) -> int:
        return self.hash_at + HASH_BYTES

    @property
    def entries_at(self) -> int:
        return self.packs_at + PACK.itemsize * self.packs

    @property
    def size(self) -> int:
        return self.entries_at + ENTRY.itemsize * self.entries + 32


def check(name: str, data: bytes, key: bytes) -> list[PackRef]:
    """The packs that a whole segment refers to; `CorruptObjectError` when any byte is off."""
    body = memoryview(data)[:-32]
    digest = keyed(key, body)
    if data[-32:] != digest or name != PREFIX + digest.hex():
        raise CorruptObjectError(f"{name}: its bytes do not match its hash")
    head = Head.parse(name, data)
    if len(data) != head.size:
        raise CorruptObjectError(f"{name}: does not have the length that it states")
    return [ref_of(row) for row in np.frombuffer(data, PACK, head.packs, head.packs_at)]


def ref_of(row: Any) -> PackRef:
    """A row of a pack table."""
    return PackRef(PackId(bytes(row["id"]).hex()), int(row["size"]), int(row["footer"]))


class Segment:
    """One segment, of which only the head is in memory; the rest is read in pieces.

    Pieces come as they are stored: nothing proves them but the hash of the whole. Every method
    raises `ObjectMissingError` when the segment is not there any more.
    """

    def __init__(self, store: ObjectStore, name: str, key: bytes) -> None:
        """Raises `CorruptObjectError` or `FormatVersionError` where the head is not sound."""
        self._store = store
        self.name = name
        data = store.get(name, 0, _HEAD_BYTES)
        self.head = head = Head.parse(name, data)
        if len(data) < head.packs_at <= _MAX_HEAD_BYTES:
            data = store.get(name, 0, head.packs_at)
        if keyed(key, data[: head.hash_at], HASH_BYTES) != data[head.hash_at : head.packs_at]:
            raise CorruptObjectError(f"{name}: its head does not match its hash")
        self.directory = np.frombuffer(data, "<u4", head.blocks, HEADER.size).astype(np.uint32)
        """Prefix of the first hash of each block; shape (blocks,)."""
        self.replaced = frozenset(
            data[at : at + HASH_BYTES].hex()
            for at in range(head.replaced_at, head.hash_at, HASH_BYTES)
        )

    @property
    def short_name(self) -> str:
        """What a segment that replaces this one calls it."""
        return self.name.removeprefix(PREFIX)[: 2 * HASH_BYTES]

    def blocks(self, first: int, count: int) -> Entries:
        """The entries of some blocks; fewer when the object is cut off."""
        start = first * BLOCK_ENTRIES
        wanted = min(self.head.entries, (first + count) * BLOCK_ENTRIES) - start
        size = ENTRY.itemsize
        data = self._store.get(self.name, self.head.entries_at + start * size, wanted * size)
        return np.frombuffer(data, ENTRY, len(data) // size)

    def packs(self, first: int, count: int) -> Packs:
        """Rows of the pack table; fewer at its end, and when the object is cut off."""
        wanted = min(self.head.packs, first + count) - first
        if wanted <= 0:
            return np.empty(0, PACK)
        size = PACK.itemsize
        data = self._store.get(self.name, self.head.packs_at + first * size, wanted * size)
        return np.frombuffer(data, PACK, len(data) // size)

    def raw(self, start: int, stop: int) -> bytes:
        """Bytes of the object as they are, to check its hash."""
        return self._store.get(self.name, start, stop - start)


def open_segments(store: ObjectStore, key: bytes) -> tuple[list[Segment], list[Exception]]:
    """All segments of a repository that can be used, and why others cannot.

    What vanishes meanwhile was merged: the segment that took its place was there before.
    """
    segments: list[Segment] = []
    unusable: list[Exception] = []
    with ThreadPoolExecutor(_OPENED_AT_ONCE, thread_name_prefix="index") as pool:

        def read(name: str) -> Segment | Exception:
            try:
                return Segment(store, name, key)
            except (CorruptObjectError, FormatVersionError, ObjectMissingError) as error:
                return error

        for found in pool.map(read, list(store.list(PREFIX))):
            if isinstance(found, Segment):
                segments.append(found)
            elif not isinstance(found, ObjectMissingError):
                unusable.append(found)
    return segments, unusable


def superseded(segments: Iterable[Segment]) -> set[str]:
    """Names of segments all of whose entries others repeat, as far as these cover their range."""
    listed = list(segments)
    covers: dict[str, list[tuple[int, int]]] = {}
    for segment in listed:
        for short in segment.replaced:
            covers.setdefault(short, []).append((segment.head.first, segment.head.last))
    gone: set[str] = set()
    for segment in listed:
        reached = segment.head.first
        for first, last in sorted(covers.get(segment.short_name, ())):
            if first > reached:
                break
            reached = max(reached, last + 1)
        if reached > segment.head.last:
            gone.add(segment.name)
    return gone


def lanes(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Segments in as few rows as may be, none of which covers a prefix twice; shortest row first.

    The number of rows is what a look-up that finds nothing costs.
    """
    rows: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.head.first, s.head.last, s.name)):
        for row in rows:
            if row[-1].head.last < segment.head.first:
                row.append(segment)
                break
        else:
            rows.append([segment])
    return sorted(rows, key=entries_in)


def entries_in(row: Iterable[Segment]) -> int:
    return sum(segment.head.entries for segment in row)
