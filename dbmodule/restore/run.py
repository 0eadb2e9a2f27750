"""One restore from beginning to end: decide, write every file once, make it durable, commit.

The commit is putting ``global/pg_control`` in place. Until then no server starts on the target,
and a marker says why.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dbmodule import controlfile, wal
from dbmodule.chain import chain_of
from dbmodule.datafile import CONTROL_FILE, RECREATED_DIRECTORIES
from dbmodule.errors import CancelledError
from dbmodule.ident import BackupId
from dbmodule.manifest import Manifest
from dbmodule.parallel import batches, in_order
from dbmodule.ports import Cancelled, Progress, TargetDirectory
from dbmodule.registry import EntryFlag, EntryKind
from dbmodule.reports import RestoreReport
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry
from dbmodule.restore import pg_manifest, plan, recovery
from dbmodule.restore.files import FileCounts, write_file
from dbmodule.restore.pg_manifest import RestoredFile

_NOT_IN_PG_MANIFEST = ("pg_wal/", recovery.AUTO_CONF)


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    backup: BackupId
    target: Path
    tablespace_map: Mapping[str, Path]
    threads: int


OpenTarget = Callable[[Path, Mapping[str, Path], str, bool], TargetDirectory]
"""(root, OID → location, owner, may its group read) → the adapter that writes there."""

_GROUP_READS = 0o040


def restore(
    repository: Repository,
    backups: dict[BackupId, Manifest],
    request: RestoreRequest,
    *,
    open_target: OpenTarget,
    path_exists: Callable[[str], bool],
    staged_control: str,
    progress: Progress,
    cancelled: Cancelled,
) -> RestoreReport:
    """Write the data directory that `request.backup` describes.

    Raises a `DbmoduleError`; then the target is unusable, and says so, or was not touched.
    """
    began = time.monotonic()
    phases: dict[str, float] = {}
    progress("prepare", 0, 0)
    chain = chain_of(backups, request.backup)
    repository.check_chain(chain)
    manifest = chain[-1]
    plan.check_replay(
        manifest,
        {path: path_exists(path) for path in manifest.created_tablespaces.values() if path},
    )
    locations = plan.map_tablespaces(manifest, request.tablespace_map, request.target)
    view = ChainView(repository, chain)
    entries = list(view.files.values())
    plan.check_paths(entries, locations)
    version = view.files.get("PG_VERSION")
    group_access = version is not None and bool(version.mode & _GROUP_READS)
    target = open_target(request.target, locations, manifest.owner, group_access)
    target.begin()
    _make_directories(target, entries, 0o750 if group_access else 0o700)
    wal_mode = 0o640 if group_access else 0o600
    phases["prepare"] = round(time.monotonic() - began, 3)

    copying = time.monotonic()
    files = [e for e in entries if e.kind in (EntryKind.RELATION, EntryKind.CONTENT)]
    total = FileCounts()
    restored: list[RestoredFile] = []
    expected = sum(entry.size for entry in files)
    done = 0

    def write(batch: list[FileEntry]) -> list[tuple[RestoredFile, FileCounts]]:
        return [_write_one(repository, view, target, e, staged_control, wal_mode) for e in batch]

    grouped = batches(files, lambda entry: entry.size)
    running = in_order(write, grouped, threads=request.threads, name="restore")
    with closing(running):
        for _, results in running:
            for file, counts in results:
                restored.append(file)
                total.bytes_written += counts.bytes_written
                total.frames_read += counts.frames_read
                total.pages_from.update(counts.pages_from)
                done += file.size
            progress("write", done, expected)
            if cancelled():
                raise CancelledError(
                    "the restore was cancelled",
                    hint=f"Remove {request.target}: it holds no usable cluster.",
                )
    phases["write"] = round(time.monotonic() - copying, 3)

    finishing = time.monotonic()
    progress("finish", 0, 0)
    histories = _histories(backups.values(), manifest)
    _write_recovery(target, manifest, entries, restored, histories, staged_control)
    target.finish(CONTROL_FILE)
    phases["finish"] = round(time.monotonic() - finishing, 3)
    return RestoreReport(
        backup_id=manifest.backup_id,
        chain=[m.backup_id for m in chain],
        target=target.path,
        files=len(files),
        bytes_written=total.bytes_written,
        pages_from=_by_backup(total.pages_from, chain),
        seconds=round(time.monotonic() - began, 3),
        phases=phases,
    )


def _make_directories(target: TargetDirectory, entries: Iterable[FileEntry], mode: int) -> None:
    for path in RECREATED_DIRECTORIES:
        target.make_directory(path, mode)
    ordered = sorted(entries, key=lambda e: e.path)
    for entry in ordered:
        if entry.kind is EntryKind.DIRECTORY and entry.path == "pg_tblspc":
            target.make_directory(entry.path, entry.mode)
    for entry in ordered:
        if entry.kind is EntryKind.SYMLINK:
            target.make_link(entry.path)
    for entry in ordered:
        if entry.kind is EntryKind.DIRECTORY:
            target.make_directory(entry.path, entry.mode)


def _write_one(
    repository: Repository,
    view: ChainView,
    target: TargetDirectory,
    entry: FileEntry,
    staged_control: str,
    wal_mode: int,
) -> tuple[RestoredFile, FileCounts]:
    path = staged_control if entry.path == CONTROL_FILE else entry.path
    mode = wal_mode if EntryFlag.WAL in entry.flags else entry.mode
    file = target.create(path, mode, entry.size)
    try:
        counts = write_file(view, repository.frames, entry.path, entry.size, file)
    except BaseException:
        file.abandon()
        raise
    return RestoredFile(entry.path, entry.size, file.finish()), counts


def _write_recovery(
    target: TargetDirectory,
    manifest: Manifest,
    entries: Iterable[FileEntry],
    restored: list[RestoredFile],
    histories: Mapping[str, str],
    staged_control: str,
) -> None:
    """Label, recovery settings, known histories, missing configuration, and the manifests."""
    paths = {entry.path for entry in entries}
    links = {entry.path for entry in entries if entry.kind is EntryKind.SYMLINK}
    in_place = "" in manifest.created_tablespaces.values() or any(
        path.startswith("pg_tblspc/") and path.count("/") == 1 and path not in links
        for path in paths
    )

    def add(path: str, data: bytes) -> None:
        restored.append(RestoredFile(path, len(data), target.write(path, data)))

    if manifest.backup_label:
        add(recovery.LABEL, manifest.backup_label.encode())
    for name, text in recovery.MINIMAL_CONFIGURATION.items():
        if name not in paths:
            add(name, text.encode())
    found = target.read(recovery.CONF)
    own = recovery.without_data_directory(found)
    if own != found:
        restored[:] = [file for file in restored if file.path != recovery.CONF]
        add(recovery.CONF, own)
    before = target.read(recovery.AUTO_CONF) if recovery.AUTO_CONF in paths else b""
    configuration = own + b"\n" + before
    settings = recovery.recovery_settings(
        manifest.backup_id,
        in_place_tablespaces=in_place,
        minimums=recovery.too_small(
            controlfile.parse(target.read(staged_control)),
            configuration.decode("utf-8", "replace"),
        ),
    )
    target.write(recovery.AUTO_CONF, before + b"\n" + settings.encode())
    target.write(recovery.SIGNAL, b"")
    for name, text in histories.items():
        if f"pg_wal/{name}" not in paths:
            target.write(f"pg_wal/{name}", text.encode())
    listed = [f for f in restored if not f.path.startswith(_NOT_IN_PG_MANIFEST)]
    data = pg_manifest.render(manifest, listed, datetime.now(UTC))
    target.write(pg_manifest.NAME, data)


def _histories(backups: Iterable[Manifest], manifest: Manifest) -> dict[str, str]:
    """Histories of later timelines that the repository knows: a new one must not reuse them."""
    return {
        wal.history_name(other.timeline): other.history
        for other in backups
        if other.timeline > manifest.timeline and other.history
    }


def _by_backup(pages: Counter[int], chain: list[Manifest]) -> dict[str, int]:
    return {m.backup_id: pages[number] for number, m in enumerate(chain)}
