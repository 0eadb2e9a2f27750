"""Runs that meet, stop and die, as processes: only one commits, and none waits in vain."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable

import pytest

from dbmodule.errors import LockedError
from dbmodule.ident import BackupId, BackupType
from dbmodule.ports import Buffer, ProcessIdentity
from dbmodule.repository.locks import LockTiming, backup_lock
from dbmodule.repository.repository import Repository
from tests.fault import mini
from tests.fault.fault_store import Fault, FaultStore
from tests.fix_scene import Scene, await_stop, backup_process, goes_on_and_fails, run_killed

QUICK = LockTiming(beat=0.1, expiry=0.6)
MANIFEST = "manifests/"


def test_a_stopped_owner_is_taken_over_and_cannot_commit(scene: Scene) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    stopped = backup_process(scene, BackupType.DIFF, 1, Fault.STOP_BEFORE, MANIFEST)
    await_stop(stopped)
    mini.change_state(scene.root, 2)
    scene.back_up(BackupType.INCR, timing=QUICK)
    assert "LockedError" in goes_on_and_fails(stopped)
    scene.check()
    mini.change_state(scene.root, 3)
    scene.back_up(BackupType.INCR)
    scene.check()


class Overtaken(FaultStore):
    """When the first pack is stored another run takes the lock over, and waits to be noticed."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.store)
        self._repository = Repository.open(scene.store)
        self._done = False

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        size = super().put_new(name, chunks)
        if name.startswith("packs/") and not self._done:
            self._done = True
            locks = self._repository.locks(Elsewhere(), LockTiming(beat=60, expiry=0))
            locks.acquire(backup_lock("main"), list, cancelled=lambda: False).release()
        return size


class Elsewhere:
    """`ports.Processes` of a host that sees nobody run."""

    def me(self) -> ProcessIdentity:
        return ProcessIdentity("elsewhere", "", "", 1, 0)

    def runs(self, other: ProcessIdentity) -> bool | None:
        return None


@pytest.mark.parametrize("beat", [0.001, 3600])
def test_who_is_overtaken_stops_whether_it_notices_or_not(scene: Scene, beat: float) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    with pytest.raises(LockedError, match="taken") as caught:
        scene.back_up(BackupType.DIFF, Overtaken(scene), LockTiming(beat=beat, expiry=7200))
    assert caught.value.exit_code == 7
    scene.check()
    scene.back_up(BackupType.DIFF)
    scene.check()


def test_after_a_kill_the_next_run_need_not_wait(scene: Scene) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    assert run_killed(scene, BackupType.DIFF, 3, Fault.KILL_AFTER) == -signal.SIGKILL
    scene.back_up(BackupType.DIFF, timing=LockTiming(beat=3600, expiry=3600))
    scene.check()


def test_two_writers_at_once(scene: Scene) -> None:
    """One of them backs up, the other is turned away; the lock is free again then."""
    start = threading.Barrier(2)
    results: list[str] = []

    def run() -> None:
        start.wait()
        try:
            results.append(mini.back_up(scene.store, scene.root, BackupType.FULL).backup_id)
        except LockedError as error:
            assert error.exit_code == 7
            results.append("locked")

    for _ in range(3):
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    committed = [result for result in results if result != "locked"]
    assert len(results) == 6
    assert len(set(committed)) == len(committed) >= 3
    scene.known = dict.fromkeys(map(BackupId, committed), mini.contents(scene.root))
    scene.check()
