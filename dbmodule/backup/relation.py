"""Copying the main fork of a relation, page by page: what changed, by which detector, stored.

Pages are read in batches of 1 MB, and decisions are made for a whole batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dbmodule import datafile, detect
from dbmodule.backup.batch import Batch
from dbmodule.backup.collect import Collector
from dbmodule.backup.values import BaselineView, CopyResult, CopySettings
from dbmodule.delta import FRAME_PAGES, zero_refs
from dbmodule.errors import CancelledError
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import Cancelled, SourceFile
from dbmodule.registry import MARK, UNKNOWN_LSN, Marks
from dbmodule.repository.tables import FileEntry
from dbmodule.repository.writer import FrameWriter

BATCH_PAGES = 4 * FRAME_PAGES
BATCH_BYTES = BATCH_PAGES * PAGE_SIZE


class RelationCopy:
    """One relation file while it is copied into `result`."""

    def __init__(
        self,
        result: CopyResult,
        before: FileEntry | None,
        baseline: BaselineView,
        settings: CopySettings,
        frames: FrameWriter,
    ) -> None:
        self._result = result
        self._before = before
        self._baseline = baseline
        self._settings = settings
        self._frames = frames
        self._detector = "full" if before is None else baseline.detector
        self._marks = np.empty(0, MARK)
        if self._detector == "scan" or (self._detector == "wal" and baseline.unsound):
            self._marks = baseline.marks(result.path)
        self._first_block = 0
        if (relation := datafile.relation(result.path)) is not None:
            self._first_block = relation.first_block(settings.blocks_per_segment)
        self._collector = Collector(frames)

    def run(self, file: SourceFile, buffer: memoryview, cancelled: Cancelled) -> None:
        """Read `file` through `buffer`, of `BATCH_BYTES`; raises `OddPageError`."""
        result, before = self._result, self._before
        pages = result.identity.size // PAGE_SIZE
        numbers = self._to_read(pages)
        # Pages that were not read may be on their way to the disk: that identity proves nothing.
        result.identity_valid = result.identity_valid and len(numbers) == pages
        result.skipped = pages > 0 and not len(numbers)
        result.blocks = pages
        prints = [np.empty(0, MARK)]
        for start in range(0, len(numbers), BATCH_PAGES):
            if cancelled():
                raise CancelledError("the backup was cancelled")
            batch = Batch(file, buffer, numbers[start : start + BATCH_PAGES])
            if len(batch.numbers):
                prints.append(self._copy(batch))
            result.bytes_read += batch.bytes_read
            if not batch.complete:
                # Cut meanwhile, which WAL repeats.
                result.blocks = int(numbers[start + len(batch.numbers)])
                break
        result.size = result.blocks * PAGE_SIZE
        result.extents = self._collector.extents()
        result.prints = np.concatenate(prints)
        result.changed = len(result.prints)
        result.bytes_changed = result.changed * PAGE_SIZE
        result.unchanged = before is not None and result.size == before.size and result.changed == 0

    def _to_read(self, pages: int) -> NDArray[np.int64]:
        """Numbers, ascending, of the pages that have to be looked at."""
        every = np.arange(pages, dtype=np.int64)
        relation = datafile.relation(self._result.path)
        if (
            self._detector != "wal"
            or self._before is None
            or self._baseline.changed is None
            or relation is None
        ):
            return every
        known = min(pages, self._before.size // PAGE_SIZE)
        key = relation.tablespace, relation.database, relation.relfilenode
        named = self._baseline.changed.within(key, self._first_block, known)
        never_sound = np.flatnonzero(self._marks["lsn"][:known] == UNKNOWN_LSN)
        return np.concatenate([np.union1d(named, never_sound), every[known:]])

    def _copy(self, batch: Batch) -> Marks:
        """Find the changed pages of a batch, verify and store them; gives their marks."""
        result = self._result
        seen = batch.observe(self._settings.wal_segment_size)
        changed = self._changed(batch, seen)
        suspects = []
        if self._settings.data_checksums and (self._detector == "content" or changed.any()):
            # By content everything was looked at in full, and else only what is stored.
            checked = np.ones_like(changed) if self._detector == "content" else changed
            suspects = batch.verify(result.path, self._first_block, checked)
            result.suspects += suspects
            result.verified += int(checked.sum())
        if not changed.any():
            return np.empty(0, MARK)
        self._store(batch, changed, seen.zero)
        marks: Marks = batch.trusted_marks(suspects, self._first_block)[changed]
        return marks

    def _changed(self, batch: Batch, seen: detect.Observed) -> NDArray[np.bool_]:
        match self._detector:
            case "scan":
                start = int(batch.numbers[0])
                known = self._marks[start : start + len(batch.numbers)]
                changes = detect.compare_marks(seen, known, self._baseline.start_lsn)
                unlogged = self._baseline.foreign or not self._settings.data_checksums
                hints = changes.hints & unlogged
                self._result.hints += int(hints.sum())
                self._result.divergent += int((changes.divergent & ~hints).sum())
                return changes.changed
            case "content":
                return self._changed_units(batch)
            case _:
                return np.ones(len(batch.numbers), np.bool_)

    def _changed_units(self, batch: Batch) -> NDArray[np.bool_]:
        """Which pages are not what the baseline stored, byte by byte.

        A unit of 32 pages whose hash is the baseline's needs no more; of another, the baseline's
        pages are fetched and compared.
        """
        changed = np.ones(len(batch.numbers), np.bool_)
        rows = np.frombuffer(batch.view, np.uint8).reshape(-1, PAGE_SIZE)
        path, first_unit = self._result.path, int(batch.numbers[0]) // FRAME_PAGES
        for offset in range(0, len(changed), FRAME_PAGES):
            unit, pages = first_unit + offset // FRAME_PAGES, rows[offset : offset + FRAME_PAGES]
            expected = self._baseline.unit_hash(path, unit)
            if expected is not None and self._frames.digest(pages.data) == expected:
                changed[offset : offset + FRAME_PAGES] = False
                continue
            known = self._baseline.unit_pages(path, unit)[: len(pages)]
            differ = (pages[: len(known)] != known).any(axis=1)
            changed[offset : offset + len(known)] = differ
        return changed

    def _store(self, batch: Batch, changed: NDArray[np.bool_], zero: NDArray[np.bool_]) -> None:
        """Store changed pages: full units of the file as runs, scattered pages gathered."""
        rows = np.frombuffer(batch.view, np.uint8).reshape(-1, PAGE_SIZE)
        runs: dict[int, list[tuple[NDArray[np.int64], memoryview]]] = {}
        for offset in range(0, len(changed), FRAME_PAGES):
            unit = slice(offset, min(offset + FRAME_PAGES, len(changed)))
            numbers, empty = batch.numbers[unit], changed[unit] & zero[unit]
            mask = changed[unit] & ~empty
            full = len(numbers) == FRAME_PAGES and self._detector != "wal"
            if mask.any() and changed[unit].all() and (full or self._before is None):
                data = batch.view[unit.start * PAGE_SIZE : unit.stop * PAGE_SIZE]
                runs.setdefault(len(numbers), []).append((numbers, data))
                continue
            if empty.any():
                self._collector.add(numbers[empty], zero_refs(int(empty.sum())))
            if mask.any():
                self._collector.gather(numbers[mask], rows[unit][mask])
        for same_length in runs.values():
            found = self._frames.find_runs([data for _, data in same_length])
            for (numbers, data), (digest, refs) in zip(same_length, found, strict=True):
                if refs is not None:
                    self._collector.add(numbers, refs)
                elif not self._refer(numbers, data):
                    self._collector.add(numbers, self._frames.add_run(data, digest))

    def _refer(self, numbers: NDArray[np.int64], data: memoryview) -> bool:
        """Store of a run only what an earlier backup does not have at the same place, if it has
        the most of it."""
        unit = int(numbers[0]) // FRAME_PAGES
        found = self._baseline.same_pages(self._result.path, unit, data)
        if found is None:
            return False
        numbers_of_packs = np.unique(found.refs["pack"]).tolist()
        if self._frames.avoids(found.packs[pack] for pack in numbers_of_packs):
            return False
        refs = found.refs.copy()
        for pack in numbers_of_packs:
            refs["pack"][found.refs["pack"] == pack] = self._frames.refer(found.packs[pack])
        self._collector.add(numbers[found.same], refs)
        new = ~found.same
        if new.any():
            rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
            self._collector.gather(numbers[new], rows[new])
        return True
