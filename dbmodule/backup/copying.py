"""Copying all planned files with several threads, in order, within a bound of memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from dbmodule import datafile
from dbmodule.backup.batch import Suspect
from dbmodule.backup.copier import Copier
from dbmodule.backup.values import CopyResult, PlannedFile
from dbmodule.errors import CancelledError
from dbmodule.ident import Lsn
from dbmodule.parallel import batches, in_order
from dbmodule.ports import Cancelled, Progress
from dbmodule.registry import EntryKind
from dbmodule.repository.tables import FileEntry, TableWriter

ALIVE_SECONDS = 2.0

RelationKey = tuple[int, int, int, str]
"""Tablespace, database, relfilenode, fork."""


@dataclass(slots=True)
class CopyTotals:
    files_total: int = 0
    files_read: int = 0
    files_skipped: int = 0
    pages_total: int = 0
    pages_changed: int = 0
    pages_verified: int = 0
    divergent_pages: int = 0
    hint_pages: int = 0
    bytes_total: int = 0
    bytes_read: int = 0
    bytes_changed: int = 0
    suspects: list[Suspect] = field(default_factory=list)
    relations: Counter[RelationKey] = field(default_factory=Counter)
    """Changed pages per fork of a relation; those without any are left out."""

    def count(self, result: CopyResult) -> None:
        self.files_total += 1
        self.files_skipped += result.skipped
        self.files_read += not result.skipped
        self.pages_total += result.blocks
        self.pages_changed += result.changed
        self.pages_verified += result.verified
        self.divergent_pages += result.divergent
        self.hint_pages += result.hints
        self.bytes_total += result.size
        self.bytes_read += result.bytes_read
        self.bytes_changed += result.bytes_changed
        self.suspects.extend(result.suspects)
        relation = datafile.relation(result.path) if result.changed else None
        if relation is not None:
            key = relation.tablespace, relation.database, relation.relfilenode, relation.fork
            self.relations[key] += result.changed


def add_result(tables: TableWriter, result: CopyResult) -> None:
    """Append a copied file's rows to the backup's tables."""
    fingerprints = "marks" if result.kind is EntryKind.RELATION else "hashes"
    tables.add_file(
        FileEntry(
            result.path,
            result.kind,
            result.flags(),
            result.mode,
            result.size,
            result.identity,
            first_extent=tables.add("extents", result.extents),
            extents=len(result.extents),
            first_print=tables.add(fingerprints, result.prints),
            prints=len(result.prints),
        )
    )


def copy_files(
    files: Sequence[PlannedFile],
    copier: Copier,
    tables: TableWriter,
    *,
    start_lsn: Lsn,
    threads: int,
    ensure_alive: Callable[[], None],
    progress: Progress,
    cancelled: Cancelled,
) -> CopyTotals:
    """Copy `files` and append their rows to `tables`, in order.

    A file with a page that fails its checksum at an LSN which the WAL of this backup does not
    cover is copied once more at the end: the server may have been writing that page all the time.
    """
    totals = CopyTotals()
    again: list[PlannedFile] = []
    expected = sum(size for _, _, size in files)
    listed = 0
    asked = time.monotonic()

    grouped = batches(files, lambda file: file[2])
    running = in_order(copier.copy_batch, grouped, threads=threads, name="copy")
    with closing(running):
        for batch, results in running:
            for file, result in zip(batch, results, strict=True):
                listed += file[2]
                if result is None:
                    continue  # dropped since it was listed
                if any(s.lsn < start_lsn for s in result.suspects):
                    again.append(file)
                    continue
                totals.count(result)
                add_result(tables, result)
            progress("copy", listed, expected)
            if cancelled():
                raise CancelledError("the backup was cancelled")
            if time.monotonic() - asked > ALIVE_SECONDS:
                ensure_alive()
                asked = time.monotonic()
    for path, kind, _ in again:
        result = copier.copy(path, kind)
        if result is not None:
            totals.count(result)
            add_result(tables, result)
    return totals
