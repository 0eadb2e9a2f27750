"""What a backup leaves behind besides its files: names of relations, and rows in SQL.

Neither is worth a backup: what fails here is logged, and the backup is what it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dbmodule import datafile
from dbmodule.backup.batch import Suspect
from dbmodule.backup.copying import RelationKey
from dbmodule.corruption import find_good
from dbmodule.errors import DbmoduleError
from dbmodule.manifest import Corruption, Manifest
from dbmodule.ports import (
    BackupRecord,
    Catalog,
    RelationId,
    RelationName,
    RelationNames,
    ServerIdentity,
)
from dbmodule.registry import RelationRow
from dbmodule.repository.repository import Repository

log = logging.getLogger(__name__)


def named(source: RelationNames | None, changes: Counter[RelationKey]) -> list[RelationRow]:
    """Changed pages per fork of a relation, most first, with what `source` calls it now."""
    wanted = {RelationId(*key[:3]) for key in changes}
    names = {} if source is None else source.resolve(wanted)
    unknown = RelationName()
    return [
        RelationRow(*key, pages, *names.get(RelationId(*key[:3]), unknown))
        for key, pages in changes.most_common()
    ]


def corruption(
    repository: Repository,
    cluster: str,
    chain: Sequence[Manifest],
    identity: ServerIdentity,
    suspects: Sequence[Suspect],
    relations: Sequence[RelationRow],
) -> tuple[Corruption, ...]:
    """The pages that are corrupt, whose they are, and where the last good copies of them are."""
    if not suspects:
        return ()
    names = {(r.tablespace, r.database, r.relfilenode): r for r in relations}
    pages = []
    for s in suspects[: Manifest.MAX_LISTED]:
        file = datafile.relation(s.path)
        known = file and names.get((file.tablespace, file.database, file.relfilenode))
        pages.append(
            Corruption(
                s.path,
                s.block,
                s.lsn,
                s.expected,
                s.actual,
                known.database_name if known else None,
                known.relation_name if known else None,
                known.table_name if known else None,
                last_good=None,
            )
        )
    try:
        backups, _ = repository.readable_manifests(cluster)
        good = find_good(repository, backups, chain, identity.system_identifier, pages)
    except DbmoduleError as error:
        log.warning("good copies of the corrupt pages were not found: %s", error)
        good = {}
    return tuple(replace(page, last_good=good.get(page)) for page in pages)


def committed(
    catalog: Catalog | None, repository: Repository, chain: Sequence[tuple[Manifest, str]]
) -> None:
    """Tell the SQL catalog of a committed backup, and of what it builds on if it was not told."""
    if catalog is None:
        return
    try:
        unknown = catalog.unknown([manifest.backup_id for manifest, _ in chain])
        for manifest, digest in chain:
            if manifest.backup_id in unknown:
                relations = tuple(repository.tables(manifest).relations())
                catalog.record(to_record(manifest, digest, relations))
    except DbmoduleError as error:
        log.warning(
            "backup %s is committed, but the SQL catalog does not know it yet: %s",
            chain[-1][0].backup_id,
            error,
        )


def to_record(manifest: Manifest, digest: str, relations: tuple[RelationRow, ...]) -> BackupRecord:
    """The catalog's projection of a manifest."""
    return BackupRecord(
        backup_id=manifest.backup_id,
        type=manifest.type,
        baseline_id=manifest.baseline_id,
        status=manifest.status,
        label=manifest.label,
        cluster=manifest.cluster,
        system_identifier=manifest.system_identifier,
        timeline=manifest.timeline,
        start_lsn=manifest.start_lsn,
        stop_lsn=manifest.stop_lsn,
        started_at=manifest.started_at,
        finished_at=manifest.finished_at,
        detector=manifest.detector,
        files_total=manifest.files_total,
        pages_total=manifest.pages_total,
        pages_changed=manifest.pages_changed,
        bytes_read=manifest.bytes_read,
        bytes_changed=manifest.bytes_changed,
        bytes_stored=manifest.bytes_stored,
        wal_bytes=manifest.wal_bytes,
        corrupt_pages=manifest.corrupt_pages,
        manifest_hash=digest,
        relations=relations,
        corruption=manifest.corruption,
    )
