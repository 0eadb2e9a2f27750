"""Merging segments of the content index, so that a look-up meets only a few of them.

Which ones is decided by size: of the lanes, from the shortest on, each is merged that is not
`GROWTH` times as long as all shorter ones together. So there are never more than about
log(entries) lanes, and an entry is rewritten about as often.

The merged segments are written, all of them, before those that they replace are deleted, and they
name what they replace. A crash in between leaves both: what is covered by its replacements is
neither looked into nor merged again, and the next merge deletes it. Where nothing can be deleted
that state stays, and does no harm. Another run may merge the same segments at the same time: then
both write the same bytes, or one finds its input gone and gives up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dbmodule.errors import (
    CancelledError,
    CorruptObjectError,
    ObjectExistsError,
    RepositoryError,
)
from dbmodule.ports import Cancelled, ObjectStore
from dbmodule.repository.index import (
    BLOCK_ENTRIES,
    ENTRY,
    PACK,
    Entries,
    Packs,
    Segment,
    cut,
    entries_in,
    lanes,
    open_segments,
    ordered,
    seal,
    superseded,
)

log = logging.getLogger(__name__)

GROWTH = 4
MAX_LANES = 64
"""Merged at once; of more lanes, the shortest first."""
MERGE_BYTES = 8 << 20
"""Entries in memory of all lanes together."""
_PACKS = "packs/"
_DROPPED = 0xFFFFFFFF


def choose(rows: Sequence[Sequence[Segment]]) -> Sequence[Sequence[Segment]]:
    """Which lanes, shortest first, are to become one; none where that would not be worth it."""
    total, count = 0, 0
    for number, row in enumerate(rows[:MAX_LANES]):
        if number and entries_in(row) < GROWTH * total:
            count = number + 1
        total += entries_in(row)
    return rows[:count]


def tidy(store: ObjectStore, key: bytes, cancelled: Cancelled, *, everything: bool = False) -> None:
    """Merge what is to be merged, and delete what was; `everything` after packs were removed.

    The index is a hint: whatever keeps it from being merged is logged and no error, and a merge
    that is cancelled just ends.
    """
    damaged: set[str] = set()
    before: tuple[int, int] | None = None
    try:
        while True:
            segments, _ = open_segments(store, key)
            old = superseded(segments)
            _delete(store, sorted(old))
            rows = lanes(s for s in segments if s.name not in old | damaged)
            chosen = rows[:MAX_LANES] if everything else choose(rows)
            now = len(rows), -len(damaged)
            # Each round makes lanes fewer, or leaves damage out; else somebody else is at it.
            if not chosen or (before is not None and now[0] >= before[0] and now[1] >= before[1]):
                return
            before, everything = now, everything and len(rows) > MAX_LANES
            merge = _Merge(store, key, chosen, cancelled, all_of_it=len(chosen) == len(rows))
            try:
                merge.run()
            except CorruptObjectError as error:
                log.warning("the index is merged without one segment: %s", error)
                damaged |= merge.damaged
    except CancelledError as error:
        log.info("%s", error)
    except RepositoryError as error:
        log.warning("the index was not merged, which costs only time: %s", error)


def _delete(store: ObjectStore, names: Sequence[str]) -> None:
    for name in names:
        try:
            store.delete(name)
        except RepositoryError as error:
            log.info("merged segments of the index stay where they are: %s", error)
            return


class _Input:
    """One lane while it is merged: its segments one after the other, in pieces."""

    def __init__(self, lane: Sequence[Segment], merge: _Merge, entries: int) -> None:
        self.rest: Entries = np.empty(0, ENTRY)
        self.exhausted = False
        self._pieces = self._read(lane, merge, max(1, entries // BLOCK_ENTRIES))

    def _read(self, lane: Sequence[Segment], merge: _Merge, blocks: int) -> Iterator[Entries]:
        for segment in lane:
            try:
                yield from self._pieces_of(segment, merge, blocks)
            except CorruptObjectError:
                merge.damaged.add(segment.name)
                raise

    def _pieces_of(self, segment: Segment, merge: _Merge, blocks: int) -> Iterator[Entries]:
        head = segment.head
        hasher = blake3(key=merge.key)
        hasher.update(segment.raw(0, head.entries_at))
        rows = merge.rows_of(segment)
        last = np.uint64(head.first << 32)
        for first in range(0, head.blocks, blocks):
            piece = segment.blocks(first, blocks)
            hasher.update(piece.view(np.uint8).data)
            high = piece["high"].astype(np.uint64)
            # Only sorted entries can be merged; the hash would tell too late.
            if len(piece) == 0 or high[0] < last or (high[1:] < high[:-1]).any():
                break
            last = high[-1]
            yield _renumbered(piece, rows)
        digest = hasher.digest()
        if segment.raw(head.size - 32, head.size + 1) != digest or not segment.name.endswith(
            digest.hex()
        ):
            raise CorruptObjectError(f"{segment.name}: its bytes do not match its hash")

    def more(self) -> None:
        """Read another piece; at the end there is none."""
        piece = next(self._pieces, None)
        if piece is None:
            self.exhausted = True
        else:
            self.rest = np.concatenate((self.rest, piece)) if len(self.rest) else piece

    def take(self, limit: np.uint64 | None) -> Entries:
        """Entries whose first halves are below `limit`."""
        if limit is None:
            count = len(self.rest)
        else:
            count = int(np.searchsorted(self.rest["high"].astype(np.uint64), limit, "left"))
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def _renumbered(entries: Entries, rows: NDArray[np.uint32]) -> Entries:
    """`entries` with packs as `rows` number them, without those of packs that are gone."""
    packs = np.minimum(entries["pack"], len(rows) - 1)  # the last row of `rows` is for nonsense
    numbers = rows[packs]
    kept = numbers != _DROPPED
    if kept.all():
        kept_entries = entries.copy()
    else:
        kept_entries, numbers = entries[kept], numbers[kept]
    kept_entries["pack"] = numbers
    return kept_entries


class _Merge:
    """One merge of some lanes into one."""

    def __init__(
        self,
        store: ObjectStore,
        key: bytes,
        chosen: Sequence[Sequence[Segment]],
        cancelled: Cancelled,
        *,
        all_of_it: bool,
    ) -> None:
        self.key = key
        self.damaged: set[str] = set()
        self._store = store
        self._chosen = chosen
        self._cancelled = cancelled
        # To look which packs are there takes a list of them all: worth it when all is rewritten.
        self._there = _packs_in(store) if all_of_it else None
        self._rows: dict[bytes, NDArray[np.uint32]] = {}
        self._packs: Packs = np.empty(0, PACK)

    def run(self) -> None:
        """Raises `CorruptObjectError` after it has named the segment in `damaged`."""
        self._collect_packs()
        written: list[str] = []
        try:
            for entries, first, last in cut(self._stretches()):
                written.append(self._write(entries, first, last))
        except CorruptObjectError:
            # They would stand for a segment that was not read to its end.
            _delete(self._store, written)
            raise
        _delete(self._store, [segment.name for row in self._chosen for segment in row])

    def _collect_packs(self) -> None:
        """One pack table for all that is written, and how each input's rows are numbered in it."""
        numbers: dict[bytes, int] = {}
        tables: list[Packs] = []
        for segment in (segment for row in self._chosen for segment in row):
            table = segment.head.pack_table
            if table in self._rows:
                continue
            try:
                packs = segment.packs(0, segment.head.packs)
            except CorruptObjectError:
                self.damaged.add(segment.name)
                raise
            ids = packs["id"].tolist()
            rows = np.full(segment.head.packs + 1, _DROPPED, np.uint32)
            new: list[int] = []
            for row, pack in enumerate(ids):
                if self._there is not None and pack not in self._there:
                    continue
                number = numbers.get(pack)
                if number is None:
                    number = numbers[pack] = len(numbers)
                    new.append(row)
                rows[row] = number
            self._rows[table] = rows
            tables.append(packs[new])
        self._packs = np.concatenate(tables)

    def rows_of(self, segment: Segment) -> NDArray[np.uint32]:
        """For each row of a segment's pack table the row in the new one; and one for nonsense."""
        return self._rows[segment.head.pack_table]

    def _stretches(self) -> Iterator[Entries]:
        """The merged entries, a stretch at a time; equal hashes are never in two stretches."""
        each = MERGE_BYTES // ENTRY.itemsize // len(self._chosen)
        inputs = [_Input(lane, self, each) for lane in self._chosen]
        while inputs:
            if self._cancelled():
                raise CancelledError("merging the index was cancelled")
            for one in inputs:
                while len(one.rest) <= each // 2 and not one.exhausted:
                    one.more()
            inputs = [one for one in inputs if len(one.rest) or not one.exhausted]
            ends = [one.rest["high"][-1] for one in inputs if not one.exhausted and len(one.rest)]
            limit = np.uint64(min(ends)) if ends else None
            taken = [one.take(limit) for one in inputs if len(one.rest)]
            joined = np.concatenate(taken) if taken else np.empty(0, ENTRY)
            if len(joined):
                yield ordered(joined)
            else:
                # Nothing lies below the limit: more is needed of the inputs that set it.
                for one in inputs:
                    if not one.exhausted and (not len(one.rest) or one.rest["high"][-1] == limit):
                        one.more()

    def _write(self, entries: Entries, first: int, last: int) -> str:
        replaced = sorted(
            s.short_name
            for row in self._chosen
            for s in row
            if s.head.first <= last and first <= s.head.last
        )
        name, chunks = seal(self._packs, entries, first, last, replaced, self.key)
        try:
            self._store.put_new(name, chunks)
        except ObjectExistsError:
            log.debug("%s was merged by another run", name)
        return name


def _packs_in(store: ObjectStore) -> set[bytes]:
    """Ids of the packs that are there."""
    names = (name.rpartition("/")[2] for name in store.list(_PACKS))
    return {bytes.fromhex(name) for name in names if len(name) == 64}
