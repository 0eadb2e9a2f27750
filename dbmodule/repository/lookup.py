"""Looking hashes up in the content index, many at a time and within a bound of memory.

In memory are the directories of all segments, four bytes for 256 entries, and a cache of blocks.
Look-ups are sorted, and go to the *lanes* one after the other: rows of segments of which none
covers a hash twice, of which merging keeps only a few. In a lane the directory names the one block
that can hold a hash, so a look-up costs one small read at most; where the whole index fits into
the cache it is read in larger pieces. A segment that vanishes was merged by another run: then the
index is opened again, once, and what is missing after that was just not found.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, ObjectMissingError
from dbmodule.ports import ObjectStore
from dbmodule.repository.index import (
    BLOCK_ENTRIES,
    ENTRY,
    WHOLE,
    Entries,
    Hit,
    PackRef,
    Packs,
    Segment,
    lanes,
    open_segments,
    ref_of,
    superseded,
)

log = logging.getLogger(__name__)

_HASH = np.dtype([("high", ">u8"), ("low", ">u8")])
_READ_AHEAD = 64
"""Blocks that are read at once where all of the index fits into the cache."""
_READERS = 16
_SLOW_SECONDS = 0.002
"""Reads that take longer each wait for a disk or a network: others can wait beside them."""
_PACK_ROWS = 1024

K = TypeVar("K")
R = TypeVar("R")
T = TypeVar("T")
V = TypeVar("V", bound=NDArray[Any])


class _Cache(Generic[K, V]):
    """Arrays by key, the least recently used dropped beyond a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, key: K) -> V | None:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: K, value: V) -> None:
        with self._lock:
            before = self._held.pop(key, None)
            self.bytes += value.nbytes - (0 if before is None else before.nbytes)
            self._held[key] = value
            while self.bytes > self._limit and len(self._held) > 1:
                self.bytes -= self._held.popitem(last=False)[1].nbytes


class _Lane:
    """Segments whose ranges do not overlap, as one directory."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.directory = np.concatenate([s.directory for s in segments])
        for segment in segments:
            segment.directory = segment.directory[:0]
        counts = np.array([s.head.blocks for s in segments], np.int64)
        self.starts = np.cumsum(counts) - counts
        """Number, in the lane, of each segment's first block."""

    def blocks_for(self, prefixes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Numbers of the blocks that can hold hashes of these ascending prefixes."""
        first = np.searchsorted(self.directory, prefixes, "left") - 1
        last = np.searchsorted(self.directory, prefixes, "right") - 1
        first = np.maximum(first, 0)
        counts = np.maximum(last - first + 1, 0)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.unique(np.repeat(first, counts) + within)


class _Opened:
    """The segments as they were when the index was opened."""

    def __init__(self, store: ObjectStore, key: bytes) -> None:
        segments, unusable = open_segments(store, key)
        for error in unusable:
            # A hint that cannot be read is none; `verify` reports it as the damage it is.
            log.warning("the index is used without one segment: %s", error)
        old = superseded(segments)
        rows = lanes(segment for segment in segments if segment.name not in old)
        self.lanes = [_Lane(row) for row in rows]
        self.bytes = sum(s.head.entries for row in rows for s in row) * ENTRY.itemsize


class ContentIndex:
    """All segments of a repository. Safe for threads."""

    CACHE_BYTES = 32 << 20
    PACK_CACHE_BYTES = 8 << 20

    def __init__(self, store: ObjectStore, key: bytes) -> None:
        self._store = store
        self._key = key
        self._lock = threading.Lock()
        self._blocks: _Cache[tuple[str, int], Entries] = _Cache(self.CACHE_BYTES)
        self._packs: _Cache[tuple[bytes, int], Packs] = _Cache(self.PACK_CACHE_BYTES)
        self._opened = _Opened(store, key)

    def find_many(self, hashes: Sequence[bytes], *, whole: bool) -> list[Hit | None]:
        """Where frames (`whole`) or pages with these 16-byte hashes are said to be."""
        opened = self._opened
        if not hashes or not opened.lanes:
            return [None] * len(hashes)
        found, lost = self._find(opened, hashes, whole)
        if lost:
            with self._lock:
                if self._opened is opened:
                    self._opened = _Opened(self._store, self._key)
            again, _ = self._find(self._opened, hashes, whole)
            found = [new or old for new, old in zip(again, found, strict=True)]
        return found

    def _find(
        self, opened: _Opened, hashes: Sequence[bytes], whole: bool
    ) -> tuple[list[Hit | None], bool]:
        """What is found, and whether a segment was missing."""
        hits: list[Hit | None] = [None] * len(hashes)
        wanted = np.frombuffer(b"".join(hashes), _HASH)
        order = np.argsort(wanted["high"], kind="stable")
        high = wanted["high"].astype(np.uint64)[order]
        low = wanted["low"].astype(np.uint64)[order]
        left = np.arange(len(order))
        ahead = _READ_AHEAD if opened.bytes <= self.CACHE_BYTES else 1
        lost = False
        for lane in opened.lanes:
            prefixes = (high[left] >> np.uint64(32)).astype(np.uint32)
            pieces, gone = self._pieces(lane, lane.blocks_for(prefixes), ahead)
            lost |= gone
            if not pieces:
                continue
            entries = np.concatenate([entries for _, entries in pieces])
            ends = np.cumsum([len(entries) for _, entries in pieces])
            rows = _rows_of(entries, high[left], low[left], whole)
            at = np.flatnonzero(rows >= 0)
            hit = entries[rows[at]]
            for position, piece, row, place in zip(
                order[left[at]].tolist(),
                np.searchsorted(ends, rows[at], "right").tolist(),
                hit["pack"].tolist(),
                hit["place"].tolist(),
                strict=True,
            ):
                try:
                    pack = self._pack(pieces[piece][0], row)
                except ObjectMissingError:
                    lost, pack = True, None
                except CorruptObjectError:
                    pack = None
                if pack is not None:
                    hits[position] = Hit(pack, place >> 8, place & 0xFF)
            left = left[[hits[position] is None for position in order[left].tolist()]]
            if not len(left):
                break
        return hits, lost

    def _pieces(
        self, lane: _Lane, blocks: NDArray[np.int64], ahead: int
    ) -> tuple[list[tuple[Segment, Entries]], bool]:
        """The entries of `blocks`, in order, and whether some are lost; reads `ahead` at once."""
        if not len(blocks):
            return [], False
        segments = np.searchsorted(lane.starts, blocks, "right") - 1
        numbers = (blocks - lane.starts[segments]).tolist()
        wanted = [
            (lane.segments[segment], number // ahead)
            for segment, number in zip(segments.tolist(), numbers, strict=True)
        ]
        held = {key: self._blocks.get((key[0].name, key[1])) for key in wanted}
        missing = [key for key, entries in held.items() if entries is None]

        def read(key: tuple[Segment, int]) -> Entries | None:
            segment, unit = key
            try:
                entries: Entries = segment.blocks(unit * ahead, ahead)
                return entries
            except ObjectMissingError:
                return None
            except CorruptObjectError as error:
                # In an encrypted repository damage is found when a piece is read.
                log.warning("the index is used without a part of one segment: %s", error)
                return np.empty(0, ENTRY)

        lost = False
        for key, entries in zip(missing, _together(read, missing), strict=True):
            held[key] = entries
            if entries is None:
                lost = True
            else:
                self._blocks.put((key[0].name, key[1]), entries)
        pieces: list[tuple[Segment, Entries]] = []
        for key, number in zip(wanted, numbers, strict=True):
            entries = held[key]
            if entries is not None:
                at = number % ahead * BLOCK_ENTRIES
                pieces.append((key[0], entries[at : at + BLOCK_ENTRIES]))
        return pieces, lost

    def _pack(self, segment: Segment, row: int) -> PackRef | None:
        """A row of a segment's pack table; None where it has no such row."""
        unit, within = divmod(row, _PACK_ROWS)
        key = segment.head.pack_table, unit
        rows = self._packs.get(key)
        if rows is None:
            rows = segment.packs(unit * _PACK_ROWS, _PACK_ROWS)
            self._packs.put(key, rows)
        return ref_of(rows[within]) if within < len(rows) else None


def _rows_of(
    entries: Entries, high: NDArray[np.uint64], low: NDArray[np.uint64], whole: bool
) -> NDArray[np.int64]:
    """The row of each hash among ascending `entries`, or -1."""
    highs = entries["high"].astype(np.uint64)
    rows = np.searchsorted(highs, high, "left")
    found = np.full(len(high), -1, np.int64)
    looking = np.arange(len(high))
    while True:
        rows_now = rows[looking]
        looking = looking[rows_now < len(entries)]
        looking = looking[highs[rows[looking]] == high[looking]]
        if not len(looking):
            return found
        now = entries[rows[looking]]
        match = (now["low"] == low[looking]) & ((now["place"] & 0xFF == WHOLE) == whole)
        found[looking[match]] = rows[looking[match]]
        looking = looking[~match]
        rows[looking] += 1


def _together(read: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`read` of each item; side by side as soon as one of them has kept us waiting."""
    results: list[R] = []
    began = time.perf_counter()
    for number, item in enumerate(items, 1):
        results.append(read(item))
        slow = time.perf_counter() - began > number * _SLOW_SECONDS
        if slow and number + 1 < len(items):
            with ThreadPoolExecutor(_READERS, thread_name_prefix="index") as pool:
                return results + list(pool.map(read, items[number:]))
    return results
