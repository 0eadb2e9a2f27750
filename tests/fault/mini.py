"""The smallest data directory that can be backed up: a few files of a freshly made cluster.

It is backed up offline, in milliseconds, through the whole pipeline, and restores to the same
bytes; no server could start on it. So faults can be planted by the hundred.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dbmodule import controlfile, page, wal
from dbmodule.backup.run import take_backup
from dbmodule.backup.steps import Environment
from dbmodule.datafile import Kind, classify
from dbmodule.expire import expire
from dbmodule.ident import PAGE_SIZE, BackupId, BackupType
from dbmodule.manifest import Manifest
from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.pgdata.target import LocalTargetDirectory, staged_name
from dbmodule.ports import ObjectStore, never_cancelled, no_progress
from dbmodule.processes import LocalProcesses
from dbmodule.reports import (
    BackupOptions,
    ExpireReport,
    RestoreReport,
    VerifyLevel,
    VerifyReport,
)
from dbmodule.repository.locks import LockTiming
from dbmodule.repository.repository import DESCRIPTION, Repository
from dbmodule.repository.secret import Secret
from dbmodule.restore.run import RestoreRequest, restore
from dbmodule.verify import verify

CLUSTER = "main"
AT_ONCE = LockTiming(beat=60, expiry=0)
"""Nobody is waited for, and what is condemned may go at once."""
SECRET = Secret(b"5ec" + b"0" * 61)
"""Of those repositories that are encrypted."""
RELATION = "base/1/1259"
_WHOLE = ("PG_VERSION", "global/pg_control", "global/pg_filenode.map", "pg_xact/0000")
_DATABASE = ("PG_VERSION", "pg_filenode.map", "1259", "1259_fsm", "1259_vm")


def make_mini(source: Path, root: Path) -> None:
    """Copy a few files of the cleanly stopped cluster at `source` to `root`."""
    names = [*_WHOLE, *(f"base/1/{name}" for name in _DATABASE)]
    # A backup holds the segment with the checkpoint of the shutdown, and no other.
    control = controlfile.parse((source / "global" / "pg_control").read_bytes())
    size = control.wal_segment_size
    segment = wal.segment_of(control.redo, size)
    names.append(f"pg_wal/{wal.segment_name(control.timeline, segment, size)}")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, root / name)
    (root / "pg_tblspc").mkdir()
    (root / "pg_logical" / "mappings").mkdir(parents=True)


def change_pages(root: Path, path: str, blocks: list[int], word: int, first_block: int = 0) -> None:
    """Give pages of a relation another content, and the checksum that belongs to it."""
    with (root / path).open("r+b") as file:
        for block in blocks:
            file.seek(block * PAGE_SIZE)
            data = bytearray(file.read(PAGE_SIZE))
            data[20:24] = word.to_bytes(4, "little")  # pd_prune_xid: a hint
            data[8:10] = page.compute_checksums(data, first_block + block).astype("<u2").tobytes()
            file.seek(block * PAGE_SIZE)
            file.write(data)


def change_state(root: Path, step: int) -> None:
    """What happens between two backups: pages, a new and a vanished file, other content."""
    change_pages(root, RELATION, [0, step], 1000 + step)
    rng = np.random.default_rng(step)
    (root / "pg_xact" / "0000").write_bytes(rng.bytes(2 * PAGE_SIZE))
    (root / f"new.{step}").write_bytes(rng.bytes(10_000))
    (root / f"new.{step - 1}").unlink(missing_ok=True)


def opened(store: ObjectStore) -> Repository:
    """The repository in `store`, encrypted or not."""
    encrypted = b'"cipher"' in store.get(DESCRIPTION)
    return Repository.open(store, SECRET if encrypted else None)


def back_up(
    store: ObjectStore,
    root: Path,
    kind: BackupType,
    timing: LockTiming | None = None,
    baseline: BackupId | None = None,
) -> Manifest:
    """One offline backup of the data directory at `root`."""
    repository = opened(store)
    environment = Environment(
        repository=repository,
        cluster=CLUSTER,
        directory=LocalDataDirectory(root),
        server=None,
        catalog=None,
        names=None,
        boot_id="",
        host="",
        threads=2,
        compression_level=1,
        locks=repository.locks(LocalProcesses(), timing),
    )
    options = BackupOptions(kind, offline=True, baseline_id=baseline)
    return take_backup(
        environment, options, job_id=None, progress=no_progress, cancelled=never_cancelled
    ).manifest


def run_expire(
    store: ObjectStore,
    remove: Iterable[BackupId],
    *,
    grace: float = 0.0,
    timing: LockTiming = AT_ONCE,
    dry_run: bool = False,
) -> ExpireReport:
    repository = opened(store)
    return expire(
        repository,
        CLUSTER,
        set(remove),
        locks=repository.locks(LocalProcesses(), timing),
        grace=grace,
        dry_run=dry_run,
        progress=no_progress,
        cancelled=never_cancelled,
    )


def verify_all(store: ObjectStore, level: VerifyLevel = VerifyLevel.NORMAL) -> VerifyReport:
    return verify(
        opened(store),
        CLUSTER,
        None,
        level=level,
        threads=1,
        progress=no_progress,
        cancelled=never_cancelled,
    )


def restore_to(store: ObjectStore, backup: BackupId, target: Path) -> RestoreReport:
    repository = opened(store)
    return restore(
        repository,
        repository.readable_manifests(CLUSTER)[0],
        RestoreRequest(backup, target, {}, threads=1),
        open_target=LocalTargetDirectory,
        path_exists=lambda path: False,
        staged_control=staged_name("global/pg_control"),
        progress=no_progress,
        cancelled=never_cancelled,
    )


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).bytes(count)


def contents(root: Path) -> dict[str, bytes]:
    """Every file that a backup copies, and WAL."""
    return dict(_files(root))


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        copied = classify(name) is not Kind.EXCLUDED or name.startswith("pg_wal/0")
        if path.is_file() and copied:
            yield name, path.read_bytes()


def restored_contents(root: Path, like: dict[str, bytes]) -> dict[str, bytes | None]:
    """The files of a restored directory that were in the source; a restore adds others."""
    files = contents(root)
    return {name: files.get(name) for name in like}
