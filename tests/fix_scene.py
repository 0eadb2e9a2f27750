"""Scenes: a tiny data directory and its repository, where a backup takes milliseconds.

Packs are so small that a backup makes several, and what each committed backup must restore to is
remembered, so that faults can be planted at every step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from dbmodule.ident import BackupId, BackupType
from dbmodule.ports import ObjectStore
from dbmodule.repository.locks import LockTiming
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import LocalStore
from tests.fault import mini
from tests.fault.fault_store import Fault, FaultStore
from tests.fix_cluster import Clusters

PACK_BYTES = 24 << 10
REPOSITORY_ROOT = Path(__file__).parents[1]


class Scene:
    """A mini cluster and its repository, with what each committed backup must restore to."""

    def __init__(self, source: Path, base: Path, secret: Secret | None = None) -> None:
        self.root = base / "data"
        self.base = base
        self.store: ObjectStore = LocalStore(base / "repo")
        self.known: dict[BackupId, dict[str, bytes]] = {}
        self._restores = 0
        mini.make_mini(source, self.root)
        Repository.create(self.store, secret)

    def back_up(
        self,
        kind: BackupType,
        store: FaultStore | None = None,
        timing: LockTiming | None = None,
    ) -> int:
        """A backup; gives the bytes that it stored."""
        manifest = mini.back_up(store or self.store, self.root, kind, timing)
        self.known[manifest.backup_id] = mini.contents(self.root)
        return manifest.bytes_stored

    def check(self) -> None:
        """Exactly the committed backups are listed, all are sound, the last one restores."""
        listed = mini.opened(self.store).backup_ids(mini.CLUSTER)
        assert set(listed) == set(self.known)
        report = mini.verify_all(self.store)
        assert (report.status, report.damage) == ("sound", [])
        for backup in sorted(self.known)[-2:]:
            self.restore(backup)

    def restore(self, backup: BackupId) -> None:
        self._restores += 1
        target = self.base / f"restored-{self._restores}"
        mini.restore_to(self.store, backup, target)
        expected = self.known[backup]
        assert mini.restored_contents(target, expected) == expected

    def expiry(
        self, going: Iterable[BackupId], number: int, fault: Fault, only: str = ""
    ) -> subprocess.Popen[str]:
        """An expiry in a process of its own, to which a fault happens at step `number`."""
        arguments = [str(self.base / "repo"), str(number), fault, only, *going]
        return _process("tests.fault.killed_expiry", *arguments)

    def run_expiry(self, going: Iterable[BackupId], number: int, fault: Fault) -> int:
        process = self.expiry(going, number, fault)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, errors
        return process.returncode

    def accept_late_commit(self, before: set[BackupId]) -> None:
        """A backup whose very last answer was lost is a whole one: what happened must be so."""
        for backup in set(mini.opened(self.store).backup_ids(mini.CLUSTER)) - before:
            self.known[backup] = mini.contents(self.root)


@pytest.fixture(scope="module")
def stopped_cluster(clusters: Clusters) -> Path:
    cluster = clusters.at(clusters.directory() / "data", 18)
    cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
    return cluster.datadir


@pytest.fixture
def scene(
    stopped_cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Scene:
    """Encrypted with the parameter, a `Secret`, if there is one."""
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", PACK_BYTES)
    return Scene(stopped_cluster, tmp_path, getattr(request, "param", None))


def _process(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY_ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def backup_process(
    scene: Scene, kind: BackupType, number: int, fault: Fault, only: str = ""
) -> subprocess.Popen[str]:
    """A backup in a process of its own, to which a fault happens at write `number`."""
    arguments = [str(scene.base / "repo"), str(scene.root), kind, str(number), fault]
    return _process("tests.fault.killed_backup", *arguments, str(PACK_BYTES), only)


def run_killed(scene: Scene, kind: BackupType, number: int, fault: Fault, only: str = "") -> int:
    process = backup_process(scene, kind, number, fault, only)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    return process.returncode


def await_stop(process: subprocess.Popen[str]) -> None:
    """Wait until the process has stopped itself."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status


def goes_on_and_fails(process: subprocess.Popen[str]) -> str:
    """Let a stopped process go on; what it says when it fails."""
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    return errors
