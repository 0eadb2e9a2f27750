"""Backups that an enemy wrote: whole and well hashed, made with the library's own writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dbmodule.backup.walfiles import add_file
from dbmodule.delta import EXTENT
from dbmodule.ident import BackupId, BackupType, new_backup_id
from dbmodule.manifest import Manifest, Root
from dbmodule.ports import ObjectStore
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry, TableWriter, encode_root
from tests.control import control_file

NO_IDENTITY = FileIdentity(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Lie:
    """A file of `size` bytes whose extents are rows (block, count, pack, frame, slot)."""

    path: str
    size: int
    extents: Sequence[tuple[int, int, int, int, int]]


def directory(path: str) -> FileEntry:
    return FileEntry(path, EntryKind.DIRECTORY, EntryFlag.NONE, 0o700, 0, NO_IDENTITY)


def link(path: str, target: str) -> FileEntry:
    return FileEntry(path, EntryKind.SYMLINK, EntryFlag.NONE, 0o700, 0, NO_IDENTITY, target)


def commit_hostile(
    store: ObjectStore,
    template: Manifest,
    *,
    files: Mapping[str, bytes] | None = None,
    entries: Sequence[FileEntry] = (),
    lies: Sequence[Lie] = (),
    root: Mapping[str, Any] | None = None,
    **changes: Any,
) -> BackupId:
    """Commit a full backup of `files`, `entries` and `lies` that else says what `template` says.

    `root` replaces parts of the description of the tables, `changes` those of the manifest.
    """
    repository = Repository.open(store)
    frames = repository.writer(1)
    try:
        tables = TableWriter(frames)
        for entry in entries:
            tables.add_file(entry)
        for path, data in {"global/pg_control": control_file(1800), **(files or {})}.items():
            add_file(tables, frames, path, data)
        for lie in lies:
            extents = np.array(list(lie.extents), EXTENT)
            tables.add_file(
                FileEntry(
                    lie.path,
                    EntryKind.CONTENT,
                    EntryFlag.NONE,
                    0o600,
                    lie.size,
                    NO_IDENTITY,
                    first_extent=tables.add("extents", extents),
                    extents=len(extents),
                )
            )
        described = {**tables.finish(), **(root or {})}
        packs = frames.flush()
        stored = frames.store_root(encode_root(described, packs))
    finally:
        frames.close()
    manifest = replace(
        template,
        backup_id=new_backup_id(BackupType.FULL, datetime.now(UTC)),
        root=Root(stored.pack, stored.size, stored.footer),
        **changes,
    )
    repository.commit(manifest)
    return manifest.backup_id
