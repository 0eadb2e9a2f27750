"""Manifests as reports: what `list` and `show` answer, and what a backup answers when done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dbmodule import datafile
from dbmodule.chain import chain_of, dependents_of, newest
from dbmodule.errors import NoBaselineError, RepositoryError, UsageError
from dbmodule.ident import BackupId, format_lsn, parse_backup_id
from dbmodule.manifest import Manifest
from dbmodule.reports import BackupDetails, BackupReport, CorruptPage, RelationChange
from dbmodule.repository.tables import FileEntry

LATEST = "latest"


def resolve(
    backups: Mapping[BackupId, Manifest],
    name: str,
    unreadable: Mapping[BackupId, RepositoryError],
) -> BackupId:
    """A backup id from an id or ``latest``.

    Raises `UsageError` or `NoBaselineError`, or the error of `unreadable` when that is what was
    asked for: an older backup is never taken in silence for a latest that is damaged.
    """
    if name == LATEST:
        found = newest(list(backups.values()))
        if unreadable and (found is None or max(unreadable) > found.backup_id):
            raise unreadable[max(unreadable)]
        if found is None:
            raise NoBaselineError(
                "the repository holds no backup of this cluster",
                hint="Take one: dbmodule backup full.",
            )
        return found.backup_id
    backup = parse_backup_id(name)
    if backup in unreadable:
        raise unreadable[backup]
    if backup not in backups:
        raise UsageError(
            f"there is no backup {backup}", hint="`dbmodule list` shows the ids that exist."
        )
    return backup


def to_report(manifest: Manifest) -> BackupReport:
    """What a person or script wants to know of one backup."""
    return BackupReport(
        backup_id=manifest.backup_id,
        type=manifest.type,
        baseline_id=manifest.baseline_id,
        status=manifest.status,
        label=manifest.label,
        cluster=manifest.cluster,
        system_identifier=str(manifest.system_identifier),
        server_version=manifest.server_version,
        timeline=manifest.timeline,
        start_lsn=format_lsn(manifest.start_lsn),
        stop_lsn=format_lsn(manifest.stop_lsn),
        detector=manifest.detector,
        detector_reason=manifest.detector_reason,
        files_total=manifest.files_total,
        files_read=manifest.files_read,
        files_skipped=manifest.files_skipped,
        pages_total=manifest.pages_total,
        pages_changed=manifest.pages_changed,
        pages_stored=manifest.pages_stored,
        bytes_total=manifest.bytes_total,
        bytes_read=manifest.bytes_read,
        bytes_changed=manifest.bytes_changed,
        bytes_stored=manifest.bytes_stored,
        wal_bytes=manifest.wal_bytes,
        pages_verified=manifest.pages_verified,
        corrupt_pages=manifest.corrupt_pages,
        divergent_pages=manifest.divergent_pages,
        hint_pages=manifest.hint_pages,
        started_at=manifest.started_at.isoformat(),
        finished_at=manifest.finished_at.isoformat(),
        seconds=round((manifest.finished_at - manifest.started_at).total_seconds(), 3),
        phases=manifest.phases,
    )


def relation_changes(files: Iterable[FileEntry]) -> list[RelationChange]:
    """Changed pages per relation and fork, all segments together, most first."""
    pages: Counter[tuple[int, int, int, str]] = Counter()
    for entry in files:
        relation = datafile.relation(entry.path)
        if relation is not None and entry.prints:
            key = relation.tablespace, relation.database, relation.relfilenode, relation.fork
            pages[key] += entry.prints
    return by_pages(pages)


def by_pages(pages: Counter[tuple[int, int, int, str]]) -> list[RelationChange]:
    """Changed pages by tablespace, database, relfilenode and fork, most first."""
    return [RelationChange(*key, count) for key, count in pages.most_common()]


def to_details(
    backups: Mapping[BackupId, Manifest],
    manifest: Manifest,
    digest: str,
    relations: list[RelationChange],
) -> BackupDetails:
    """A backup with its chain, its dependents and its problems."""
    return BackupDetails(
        backup=to_report(manifest),
        chain=[m.backup_id for m in chain_of(backups, manifest.backup_id)],
        dependents=[str(b) for b in dependents_of(backups, manifest.backup_id)],
        corruption=[
            CorruptPage(c.path, c.block, format_lsn(c.lsn), c.expected, c.actual)
            for c in manifest.corruption
        ],
        tablespaces=manifest.tablespaces,
        manifest_hash=digest,
        relations=relations,
    )


def resolve_loosely(ids: Sequence[BackupId], name: str) -> BackupId:
    """As `resolve`, from ids alone: what is to be verified may not be readable.

    ``latest`` is the one that started last.
    """
    if name == LATEST:
        if not ids:
            raise NoBaselineError(
                "the repository holds no backup of this cluster",
                hint="Take one: dbmodule backup full.",
            )
        return max(ids)
    backup = parse_backup_id(name)
    if backup not in ids:
        raise UsageError(
            f"there is no backup {backup}", hint="`dbmodule list` shows the ids that exist."
        )
    return backup
