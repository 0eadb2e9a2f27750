"""WAL summaries (PostgreSQL 17 and later): which blocks the WAL of a stretch has changed.

The server's WAL summariser leaves files in ``pg_wal/summaries``, each for a stretch of one
timeline's WAL: for every fork of a relation the blocks that records name, and the lowest length
that it was cut to. Here their names are chosen so that they cover a stretch without a gap, and
their contents are joined into one `ChangedBlocks`. The format is that of the server's
``src/common/blkreftable.c``.

What is held in memory is at most one bit per block of the relations that changed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from dbmodule.errors import SourceError
from dbmodule.ident import Lsn, Timeline, format_lsn

DIRECTORY = "pg_wal/summaries"
FIRST_MAJOR = 17

_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{16})([0-9A-F]{16})\.summary")
_MAGIC = 0x652B137B
# OIDs of tablespace and database, relfilenode, fork, limit block, number of chunks.
_ENTRY = struct.Struct("<IIIiII")
_END = bytes(_ENTRY.size)
_CHUNK_BLOCKS = 1 << 16
_BITMAP_WORDS = _CHUNK_BLOCKS // 16
"""A chunk with this many 16-bit words is a bitmap; with fewer, they are offsets of blocks."""
_NO_LIMIT = 0xFFFFFFFF
_MAIN_FORK = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary file, as its name describes it."""

    name: str
    timeline: Timeline
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class Stretch:
    """WAL of one timeline from `start` up to `end`."""

    timeline: Timeline
    start: Lsn
    end: Lsn


def parse_name(name: str) -> Summary | None:
    """None for any other file, such as one that is still being written."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    timeline, start, end = (int(part, 16) for part in match.groups())
    return Summary(name, Timeline(timeline), Lsn(start), Lsn(end))


def stretches(
    timeline: Timeline,
    start: Lsn,
    now: Timeline,
    end: Lsn,
    history: Sequence[tuple[Timeline, Lsn]],
) -> list[Stretch]:
    """The WAL from `start` on `timeline` to `end` on the timeline `now`, whose history is given.

    `timeline` must lie on it (see `dbmodule.wal.lies_on_history`).
    """
    found = []
    for ancestor, switch in history:
        if timeline <= ancestor < now:
            found.append(Stretch(ancestor, start, switch))
            start = switch
    return [s for s in [*found, Stretch(now, start, end)] if s.start < s.end]


def cover(stretch: Stretch, summaries: Iterable[Summary]) -> tuple[list[Summary], Lsn]:
    """The summaries of a stretch, in order, and the LSN up to which they leave no gap."""
    of_timeline = [
        s
        for s in summaries
        if s.timeline == stretch.timeline and s.end > stretch.start and s.start < stretch.end
    ]
    chosen: list[Summary] = []
    reached = stretch.start
    for summary in sorted(of_timeline, key=lambda s: (s.start, s.end)):
        if summary.start > reached:
            break
        chosen.append(summary)
        reached = Lsn(max(reached, summary.end))
    return chosen, reached


class ChangedBlocks:
    """The blocks of main forks that a stretch of WAL has changed; fork-wide, across segments."""

    def __init__(self) -> None:
        self._limits: dict[tuple[int, int, int], int] = {}
        self._chunks: dict[tuple[int, int, int], dict[int, NDArray[np.uint16]]] = {}
        self._databases: set[tuple[int, int]] = set()

    def add(self, name: str, data: bytes) -> None:
        """Join the contents of the summary file `name`; raises `SourceError` when damaged."""
        if len(data) < 4 + _ENTRY.size + 4 or struct.unpack_from("<I", data)[0] != _MAGIC:
            raise _damaged(name, "it does not begin or end as one")
        if crc32c(memoryview(data)[:-4]) != struct.unpack_from("<I", data, len(data) - 4)[0]:
            raise _damaged(name, "it does not match its CRC")
        try:
            end = self._add_entries(data, 4)
        except (struct.error, ValueError) as error:
            raise _damaged(name, str(error)) from error
        if end != len(data) - 4:
            raise _damaged(name, "something follows its last entry")

    def _add_entries(self, data: bytes, at: int) -> int:
        while data[at : at + _ENTRY.size] != _END:
            tablespace, database, relfilenode, fork, limit, chunks = _ENTRY.unpack_from(data, at)
            at += _ENTRY.size
            sizes = np.frombuffer(data, "<u2", chunks, at).tolist()
            at += 2 * chunks
            relation = tablespace, database, relfilenode
            if fork == _MAIN_FORK:
                if relfilenode == 0:  # copied or dropped as a whole
                    self._databases.add((tablespace, database))
                self._limits[relation] = min(limit, self._limits.get(relation, _NO_LIMIT))
            for chunk, size in enumerate(sizes):
                words = np.frombuffer(data, "<u2", size, at)
                at += 2 * size
                if fork == _MAIN_FORK and size:
                    self._join(relation, chunk, words)
        return at + _ENTRY.size

    def _join(self, relation: tuple[int, int, int], chunk: int, words: NDArray[np.uint16]) -> None:
        chunks = self._chunks.setdefault(relation, {})
        known = chunks.get(chunk)
        if known is None:
            chunks[chunk] = words.copy()
        elif len(known) < _BITMAP_WORDS and len(words) < _BITMAP_WORDS:
            both = np.union1d(known, words)
            chunks[chunk] = both if len(both) < _BITMAP_WORDS else _bitmap(both)
        else:
            chunks[chunk] = _bitmap(known) | _bitmap(words)

    def within(self, relation: tuple[int, int, int], first: int, count: int) -> NDArray[np.int64]:
        """Which of `count` blocks from `first` on changed, ascending, counted from `first`.

        `relation` is (tablespace, database, relfilenode), with the OID 1663 for the default
        tablespace and 1664 with database 0 for shared relations. Blocks from the lowest length
        that the relation was cut to count as changed, and all of a relation whose database was
        copied as a whole.
        """
        if relation[:2] in self._databases:
            return np.arange(count, dtype=np.int64)
        limit = min(max(self._limits.get(relation, _NO_LIMIT) - first, 0), count)
        parts = [np.empty(0, np.int64)]
        chunks = self._chunks.get(relation, {})
        for chunk in range(first // _CHUNK_BLOCKS, -(-(first + limit) // _CHUNK_BLOCKS)):
            words = chunks.get(chunk)
            if words is not None:
                parts.append(_offsets(words).astype(np.int64) + chunk * _CHUNK_BLOCKS - first)
        blocks = np.concatenate(parts)
        blocks = blocks[(blocks >= 0) & (blocks < limit)]
        return np.concatenate([blocks, np.arange(limit, count, dtype=np.int64)])


def _bitmap(words: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """A chunk's offsets as one bit per block; a bitmap as it is."""
    if len(words) == _BITMAP_WORDS:
        return words
    bits = np.zeros(_CHUNK_BLOCKS, np.uint8)
    bits[words] = 1
    return np.packbits(bits, bitorder="little").view("<u2")


def _offsets(words: NDArray[np.uint16]) -> NDArray[np.int64]:
    """A chunk's blocks, ascending."""
    if len(words) < _BITMAP_WORDS:
        return np.unique(words).astype(np.int64)
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def _damaged(name: str, reason: str) -> SourceError:
    return SourceError(f"the WAL summary {name} is damaged: {reason}")


def describe_gap(stretch: Stretch, reached: Lsn) -> str:
    """Why summaries that end at `reached` are not enough."""
    return (
        f"WAL summaries of timeline {stretch.timeline} reach {format_lsn(reached)},"
        f" not {format_lsn(stretch.end)}"
    )
