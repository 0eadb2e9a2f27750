"""A full backup made inside the repository: a chain folded into one, by references alone.

The server is not asked, and no page is read. What the new full holds is the state of the backup
that it was made of, with its times, its WAL and its lineage marks, so that the next backup can
build on either. The old chain can then go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from dbmodule import datafile
from dbmodule.backup import record
from dbmodule.backup.copying import RelationKey
from dbmodule.chain import chain_of
from dbmodule.delta import ZERO_FRAME, Refs, to_extents
from dbmodule.errors import BrokenChainError, CancelledError, UsageError
from dbmodule.ident import BackupId, BackupType, new_backup_id
from dbmodule.manifest import Manifest, Root
from dbmodule.ports import Cancelled, Catalog, Progress
from dbmodule.registry import EntryFlag, EntryKind, RelationRow
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.locks import Lock, Locks, backup_lock
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry, TableWriter, encode_root
from dbmodule.repository.writer import FrameWriter

DETECTOR = "synthetic"
_STORED = (EntryKind.RELATION, EntryKind.CONTENT)


def synthesize(
    repository: Repository,
    catalog: Catalog | None,
    cluster: str,
    backup: BackupId,
    *,
    locks: Locks,
    compression_level: int,
    progress: Progress,
    cancelled: Cancelled,
) -> Manifest:
    """Commit a full that holds what `backup` and its chain hold; raises a `DbmoduleError`."""
    made: list[BackupId] = []

    def commits() -> list[tuple[str, BackupId]]:
        taken = repository.taken_ids(cluster)
        made[:] = [new_backup_id(BackupType.FULL, datetime.now(UTC), taken)]
        return [(cluster, made[0])]

    with locks.acquire(backup_lock(cluster), commits, cancelled=cancelled) as lock:
        manifest, digest = _commit(
            repository,
            cluster,
            backup,
            made[0],
            lock,
            compression_level=compression_level,
            progress=progress,
            cancelled=cancelled,
        )
    record.committed(catalog, repository, [(manifest, digest)])
    return manifest


def _commit(
    repository: Repository,
    cluster: str,
    backup: BackupId,
    made: BackupId,
    lock: Lock,
    *,
    compression_level: int,
    progress: Progress,
    cancelled: Cancelled,
) -> tuple[Manifest, str]:
    backups, _ = repository.readable_manifests(cluster)
    if backup in repository.condemned_backups(cluster):
        raise BrokenChainError(
            f"{backup} is being removed by an expiry", hint="Name a backup that is kept."
        )
    chain = chain_of(backups, backup)
    source = chain[-1]
    if source.type is BackupType.FULL:
        raise UsageError(
            f"{backup} is a full backup already", hint="Name a differential or an incremental."
        )
    repository.check_chain(chain)
    view = ChainView(repository, chain)
    frames = repository.writer(compression_level)
    try:
        tables = TableWriter(frames)
        changes = _fold(view, tables, frames, progress, cancelled)
        tables.add_relations(_named(repository, chain, changes))
        described = tables.finish()
        root = frames.store_root(encode_root(described, frames.flush()))
        frames.check_references()
    finally:
        frames.close()
    manifest = replace(
        source,
        backup_id=made,
        type=BackupType.FULL,
        baseline_id=None,
        baseline_hash=None,
        job_id=None,
        late_unlogged=(),  # already left out
        detector=DETECTOR,
        detector_reason=f"made of the chain of {backup}",
        files_read=0,
        files_skipped=source.files_total,
        pages_changed=source.pages_total,
        pages_stored=0,
        pages_verified=0,
        divergent_pages=0,
        hint_pages=0,
        bytes_read=0,
        bytes_changed=source.bytes_total,
        bytes_stored=frames.counts.bytes_stored,
        phases={},
        root=Root(root.pack, root.size, root.footer),
    )
    lock.ensure_held()
    return manifest, repository.commit(manifest)


def _fold(
    view: ChainView,
    tables: TableWriter,
    frames: FrameWriter,
    progress: Progress,
    cancelled: Cancelled,
) -> Counter[RelationKey]:
    """Rows that stand alone for each file of the chain; gives the pages of each relation's fork."""
    pages: Counter[RelationKey] = Counter()
    for number, entry in enumerate(view.files.values()):
        if cancelled():
            raise CancelledError("the synthesis was cancelled")
        alone = replace(
            entry, flags=entry.flags & ~(EntryFlag.OVERLAY | EntryFlag.UNCHANGED), prints=0
        )
        if entry.kind in _STORED:
            alone = _stand_alone(view, alone, tables, frames)
        tables.add_file(alone)
        relation = datafile.relation(entry.path)
        if relation is not None and alone.prints:
            key = relation.tablespace, relation.database, relation.relfilenode, relation.fork
            pages[key] += alone.prints
        progress("fold", number + 1, len(view.files))
    return pages


def _stand_alone(
    view: ChainView, entry: FileEntry, tables: TableWriter, frames: FrameWriter
) -> FileEntry:
    """`entry` with the folded references and fingerprints of its file as rows of `tables`."""
    refs = _referred(view, view.page_map(entry.path).refs, frames)
    extents = to_extents(np.arange(len(refs), dtype=np.uint32), refs)
    entry = replace(entry, first_extent=tables.add("extents", extents), extents=len(extents))
    if EntryFlag.WAL in entry.flags:
        return entry
    prints = view.prints(entry.path)
    table = "marks" if entry.kind is EntryKind.RELATION else "hashes"
    return replace(entry, first_print=tables.add(table, prints), prints=len(prints))


def _referred(view: ChainView, refs: Refs, frames: FrameWriter) -> Refs:
    """`refs` with packs numbered as in the new backup's pack table."""
    referred = refs.copy()
    stored = refs["frame"] != ZERO_FRAME
    for number in np.unique(refs["pack"][stored]).tolist():
        mine = stored & (refs["pack"] == number)
        referred["pack"][mine] = frames.refer(view.packs[number])
    return referred


def _named(
    repository: Repository, chain: Sequence[Manifest], pages: Counter[RelationKey]
) -> list[RelationRow]:
    """Pages per fork of a relation, with the newest name that a backup of the chain knew."""
    names: dict[tuple[int, int, int], tuple[str | None, str | None, str | None]] = {}
    for manifest in chain:
        for row in repository.tables(manifest).relations():
            if row.relation_name is not None:
                key = row.tablespace, row.database, row.relfilenode
                names[key] = row.database_name, row.relation_name, row.table_name
    unknown = (None, None, None)
    return [
        RelationRow(*key, count, *names.get(key[:3], unknown)) for key, count in pages.most_common()
    ]
