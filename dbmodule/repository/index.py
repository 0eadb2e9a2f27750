"""The content index: from the hash of a frame or page to where its bytes already are.

    segment = header, pack table, fan-out, entries, hash
    header  = magic "DBMINDX1", format u32, packs u32, entries u64                    (24 bytes)
    packs   = per pack: id 32, object size u64, footer length u32                     (44 bytes)
    fan-out = 257 x u32: entries whose first hash byte is below i start at fan-out[i]
    entries = hash 16, pack u32 (row of the pack table), frame << 8 | slot u32        (24 bytes)
    hash    = keyed BLAKE3 of all before                                              (32 bytes)

Entries are sorted by hash; slot 255 means the whole frame. Invariant: the index is a hint and
never the truth. A hit counts only after the pack's own footer, which is authenticated by the
pack's name, has confirmed it. So a stale or damaged index can cost space, never a byte of data.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, FormatVersionError, ObjectMissingError
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.registry import HASH_BYTES
from dbmodule.repository.document import FORMAT
from dbmodule.repository.pack import Footer, PackId, keyed

log = logging.getLogger(__name__)

PREFIX = "index/"
MAGIC = b"DBMINDX1"
HEADER = struct.Struct("<8sIIQ")
PACK = np.dtype([("id", "V32"), ("size", "<u8"), ("footer", "<u4")])
# numpy orders S16 as memcmp does, V16 not at all.
ENTRY = np.dtype([("hash", "S16"), ("pack", "<u4"), ("place", "<u4")])
FAN_OUT = 257
WHOLE = 255
"""As a slot: the frame as a whole, not one of its pages."""


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


def _entries_of(ordinal: int, footer: Footer) -> NDArray[Any]:
    """Index entries of a pack: one per frame, one per hashed page."""
    frames = np.arange(len(footer.entries), dtype=np.uint32)
    counts = footer.entries["hashed_pages"].astype(np.int64)
    slots = np.arange(len(footer.page_hashes)) - np.repeat(footer.first_hash, counts)
    out = np.empty(len(frames) + len(slots), ENTRY)
    whole = np.ascontiguousarray(footer.entries["hash"]).view("V16").reshape(-1, 2)[:, 0]
    out["hash"] = np.concatenate((whole, footer.page_hashes)).view("S16")
    out["pack"] = ordinal
    out["place"] = np.concatenate(
        (frames << 8 | WHOLE, np.repeat(frames, counts) << 8 | slots.astype(np.uint32))
    )
    return out


def encode(footers: Iterable[Footer], key: bytes) -> tuple[str, list[Buffer]]:
    """One segment over `footers`: its object name and its bytes."""
    listed = list(footers)
    packs = np.empty(len(listed), PACK)
    packs["id"] = np.array([bytes.fromhex(f.pack) for f in listed], "V32")
    packs["size"] = [f.object_size for f in listed]
    packs["footer"] = [f.length for f in listed]
    entries = np.concatenate([_entries_of(i, f) for i, f in enumerate(listed)])
    entries = entries[np.argsort(entries["hash"], kind="stable")]
    first_bytes = np.ascontiguousarray(entries["hash"]).view(np.uint8).reshape(-1, HASH_BYTES)[:, 0]
    fan_out = np.searchsorted(first_bytes, np.arange(FAN_OUT)).astype("<u4")
    body: list[Buffer] = [
        HEADER.pack(MAGIC, FORMAT, len(packs), len(entries)),
        packs.tobytes(),
        fan_out.tobytes(),
        entries.tobytes(),
    ]
    digest = keyed(key, b"".join(body))
    return PREFIX + digest.hex(), [*body, digest]


def check(name: str, data: bytes, key: bytes) -> list[PackRef]:
    """The packs that a whole segment refers to; `CorruptObjectError` when any byte is off."""
    digest = keyed(key, data[:-32])
    if data[-32:] != digest or name != PREFIX + digest.hex():
        raise CorruptObjectError(f"{name}: its bytes do not match its hash")
    return _Segment.parse_packs(name, data)


def packs_of(store: ObjectStore, name: str) -> list[PackRef]:
    """The packs that a segment lists; `CorruptObjectError`, `ObjectMissingError`."""
    return _Segment(store, name).packs


class _Segment:
    """One segment, read shard by shard."""

    SMALL = 1 << 16
    """Segments of up to this many entries are read in one piece."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        head = store.get(name, 0, HEADER.size)
        packs, self.entries = _Segment._header(name, head)
        table = store.get(name, HEADER.size, packs * PACK.itemsize + FAN_OUT * 4)
        self.packs = _Segment.parse_packs(name, head + table)
        if len(table) < packs * PACK.itemsize + FAN_OUT * 4:
            raise CorruptObjectError(f"{name}: cut off")
        self._fan_out = np.frombuffer(table, "<u4", FAN_OUT, packs * PACK.itemsize)
        self._start = HEADER.size + len(table)

    @staticmethod
    def _header(name: str, data: bytes) -> tuple[int, int]:
        if len(data) < HEADER.size:
            raise CorruptObjectError(f"{name}: too short to be an index")
        magic, version, packs, entries = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise CorruptObjectError(f"{name}: not an index")
        if version != FORMAT:
            raise FormatVersionError(f"{name}: index format {version} is not known")
        return packs, entries

    @staticmethod
    def parse_packs(name: str, data: bytes) -> list[PackRef]:
        count, _ = _Segment._header(name, data)
        if len(data) < HEADER.size + count * PACK.itemsize:
            raise CorruptObjectError(f"{name}: cut off")
        rows = np.frombuffer(data, PACK, count, HEADER.size)
        return [
            PackRef(PackId(bytes(r["id"]).hex()), int(r["size"]), int(r["footer"])) for r in rows
        ]

    def shard_of(self, first_byte: int) -> int:
        return 0 if self.entries <= self.SMALL else first_byte

    def load(self, shard: int) -> NDArray[Any]:
        if self.entries <= self.SMALL:
            first, last = 0, self.entries
        else:
            first, last = int(self._fan_out[shard]), int(self._fan_out[shard + 1])
        if last <= first:
            return np.empty(0, ENTRY)
        size = ENTRY.itemsize
        data = self._store.get(self._name, self._start + first * size, (last - first) * size)
        return np.frombuffer(data, ENTRY, len(data) // size)


class ContentIndex:
    """All segments of a repository, looked up within a bound of memory. Safe for threads."""

    CACHE_BYTES = 64 << 20

    def __init__(self, store: ObjectStore) -> None:
        self._segments: list[_Segment] = []
        for name in store.list(PREFIX):
            try:
                self._segments.append(_Segment(store, name))
            except ObjectMissingError:
                continue  # an expiry has replaced it since it was listed
            except (CorruptObjectError, FormatVersionError) as error:
                # A hint that cannot be read is none; `verify` reports it as the damage it is.
                log.warning("the index is used without one segment: %s", error)
        self._cache: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def _shard(self, segment: int, shard: int) -> NDArray[Any]:
        with self._lock:
            found = self._cache.get((segment, shard))
            if found is not None:
                self._cache.move_to_end((segment, shard))
                return found
        try:
            entries = self._segments[segment].load(shard)
        except CorruptObjectError as error:
            # As above: in an encrypted repository damage is found when the entries are read.
            log.warning("the index is used without a part of one segment: %s", error)
            entries = np.empty(0, ENTRY)
        except ObjectMissingError:
            entries = np.empty(0, ENTRY)  # an expiry has replaced it since it was opened
        with self._lock:
            self._cache[segment, shard] = entries
            self._cached += entries.nbytes
            while self._cached > self.CACHE_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return entries

    def find(self, digest: bytes, *, whole: bool) -> Hit | None:
        """Where a frame (`whole`) or page with this 16-byte hash is said to be; newest first."""
        wanted = np.frombuffer(digest, "S16")
        for number in reversed(range(len(self._segments))):
            segment = self._segments[number]
            entries = self._shard(number, segment.shard_of(digest[0]))
            row = int(np.searchsorted(entries["hash"], wanted)[0])
            while row < len(entries) and entries["hash"][row : row + 1].tobytes() == digest:
                place, pack = int(entries["place"][row]), int(entries["pack"][row])
                if (place & 0xFF == WHOLE) == whole and pack < len(segment.packs):
                    return Hit(segment.packs[pack], place >> 8, place & 0xFF)
                row += 1
        return None
