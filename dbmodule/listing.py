"""Manifests as reports: what `list` and `show` answer, and what a backup answers when done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace

from dbmodule import datafile
from dbmodule.chain import chain_of, dependents_of, newest
from dbmodule.errors import NoBaselineError, RepositoryError, UsageError
from dbmodule.ident import BackupId, format_lsn, parse_backup_id
from dbmodule.manifest import Corruption, Manifest
from dbmodule.registry import RelationRow
from dbmodule.reports import BackupDetails, BackupReport, CorruptPage, RelationChange

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


def to_report(manifest: Manifest, hold: str | None = None) -> BackupReport:
    """What a person or script wants to know of one backup; `hold` says until when it is held."""
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
        corruption=[to_corrupt_page(page) for page in manifest.corruption],
        hold=hold,
    )


def to_corrupt_page(page: Corruption) -> CorruptPage:
    """A corrupt page with the numbers that its path stands for."""
    relation = datafile.relation(page.path)
    return CorruptPage(
        path=page.path,
        block=page.block,
        lsn=format_lsn(page.lsn),
        expected=page.expected,
        actual=page.actual,
        tablespace=None if relation is None else relation.tablespace,
        database=None if relation is None else relation.database,
        relfilenode=None if relation is None else relation.relfilenode,
        fork=None if relation is None else relation.fork,
        database_name=page.database_name,
        relation_name=page.relation_name,
        table_name=page.table_name,
        last_good=page.last_good,
    )


def relation_changes(rows: Iterable[RelationRow]) -> list[RelationChange]:
    """What a backup remembers of the relations that changed, in its order."""
    return [RelationChange(*astuple(row)) for row in rows]


def to_details(
    backups: Mapping[BackupId, Manifest],
    manifest: Manifest,
    digest: str,
    relations: Iterable[RelationRow],
    last_good: Mapping[Corruption, BackupId],
    hold: str | None,
) -> BackupDetails:
    """A backup with its chain, its dependents and its problems.

    `last_good` tells where the last good copies of its corrupt pages are now, `hold` until when it
    is held.
    """
    return BackupDetails(
        backup=to_report(manifest, hold),
        chain=[m.backup_id for m in chain_of(backups, manifest.backup_id)],
        dependents=[str(b) for b in dependents_of(backups, manifest.backup_id)],
        corruption=[
            to_corrupt_page(replace(page, last_good=last_good.get(page)))
            for page in manifest.corruption
        ],
        tablespaces=manifest.tablespaces,
        manifest_hash=digest,
        relations=relation_changes(relations),
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
