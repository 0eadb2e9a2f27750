"""Locks: one owner at a time, dead ones are found by what is seen of them, and cannot commit."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest

from dbmodule.errors import CancelledError, CorruptObjectError, LockedError, RepositoryError
from dbmodule.ident import BackupId
from dbmodule.ports import ObjectStore, ProcessIdentity, never_cancelled
from dbmodule.processes import LocalProcesses
from dbmodule.repository.locks import Lock, Locks, LockTiming
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.storage import MemoryStore
from tests.unit.strategies import manifest

QUICK = LockTiming(beat=0.05, expiry=0.4)
SLOW = LockTiming(beat=3600, expiry=0.4)
"""An owner that never shows that it is alive."""
MINE = BackupId("20260131-235959-full-00000a")
NAME = "backup-main"


class Elsewhere:
    """`ports.Processes` of another host, of whose processes nothing can be known here."""

    def __init__(self, host: str = "elsewhere", runs: bool | None = None) -> None:
        self._me = ProcessIdentity(host, "another boot", "pid:[1]", 7, 1)
        self._runs = runs

    def me(self) -> ProcessIdentity:
        return self._me

    def runs(self, other: ProcessIdentity) -> bool | None:
        return self._runs


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore())


@pytest.fixture
def taken(repository: Repository) -> Iterator[Lock]:
    """The lock, taken on another host that is silent."""
    with acquire(repository.locks(Elsewhere(), SLOW)) as lock:
        yield lock


def acquire(locks: Locks, backup: BackupId = MINE) -> Lock:
    return locks.acquire(NAME, lambda: [("main", backup)], cancelled=never_cancelled)


def test_a_lock_that_was_given_back_can_be_taken(repository: Repository) -> None:
    locks = repository.locks(LocalProcesses(), QUICK)
    with acquire(locks) as first:
        assert first.epoch.number == 1
    with acquire(locks) as second:
        assert second.epoch.number == 2
    # Of epochs that are over nothing is left but the last.
    assert {name.split("/")[2] for name in repository.store.list("locks/")} == {"0000000002"}


def test_whoever_comes_while_it_is_held_is_turned_away_at_once(repository: Repository) -> None:
    locks = repository.locks(LocalProcesses())
    with acquire(locks), pytest.raises(LockedError, match="another run is at work") as caught:
        acquire(repository.locks(LocalProcesses()))
    assert caught.value.exit_code == 7
    assert "process" in caught.value.message


def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_its_lock(
    repository: Repository,
) -> None:
    with acquire(repository.locks(Elsewhere(), QUICK)) as lock:
        with pytest.raises(LockedError, match="on elsewhere"):
            acquire(repository.locks(LocalProcesses(), QUICK))
        lock.ensure_held()
        beats = [n for n in repository.store.list("locks/") if "/beat-" in n]
        assert len(beats) <= 2  # the older ones are removed
    assert not lock.superseded


def test_a_silent_owner_is_taken_for_dead_and_cannot_commit(
    repository: Repository, taken: Lock
) -> None:
    with acquire(repository.locks(LocalProcesses(), QUICK), BackupId("other")) as lock:
        assert lock.epoch.number == 2
        with pytest.raises(LockedError, match="revoked"):
            repository.commit(dataclasses.replace(manifest(1), backup_id=MINE))
        assert repository.backup_ids("main") == []
        assert repository.taken_ids("main") == [MINE]
        assert repository.is_revoked("main", MINE)


def test_an_owner_that_was_taken_for_dead_finds_out(repository: Repository) -> None:
    sleepy = repository.locks(Elsewhere(), LockTiming(beat=0.9, expiry=10))
    awake = repository.locks(LocalProcesses(), QUICK)
    with acquire(sleepy) as lock, acquire(awake, BackupId("other")):
        for _ in range(100):
            if lock.superseded:
                break
            threading.Event().wait(0.05)
        with pytest.raises(LockedError, match="taken for dead"):
            lock.ensure_held()


def test_what_a_dead_owner_committed_stays(repository: Repository, taken: Lock) -> None:
    digest = repository.commit(dataclasses.replace(manifest(1), backup_id=MINE))
    with acquire(repository.locks(LocalProcesses(), QUICK), BackupId("other")):
        assert repository.manifest("main", MINE)[1] == digest


def test_an_ended_process_of_this_host_is_not_waited_for(repository: Repository) -> None:
    patient = LockTiming(beat=3600, expiry=3600)
    with acquire(repository.locks(Elsewhere(), patient)):
        knows = Elsewhere("here", runs=False)
        with acquire(repository.locks(knows, patient), BackupId("other")) as lock:
            assert lock.epoch.number == 2


def test_a_run_of_this_very_process_that_failed_to_give_back_is_not_in_the_way(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = repository.locks(LocalProcesses())
    put = repository.store.put_new
    with acquire(locks):
        monkeypatch.setattr(repository.store, "put_new", refuse)
    monkeypatch.setattr(repository.store, "put_new", put)
    assert all("/ended" not in name for name in repository.store.list("locks/"))
    with acquire(locks, BackupId("other")) as lock:
        assert lock.epoch.number == 2


def test_what_could_not_be_given_back_is_when_the_store_can_be_reached_again(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = repository.store.put_new
    with acquire(repository.locks(LocalProcesses(), QUICK)):
        monkeypatch.setattr(repository.store, "put_new", refuse)
    monkeypatch.setattr(repository.store, "put_new", put)
    others = repository.locks(Elsewhere(runs=True))
    for _ in range(100):
        newest = others.newest(NAME)
        if newest is not None and newest.ended:
            break
        threading.Event().wait(0.05)
    with acquire(others, BackupId("other")) as lock:
        assert lock.epoch.number == 2
    assert repository.taken_ids("main") == []


def refuse(*_: object) -> int:
    raise RepositoryError("refused")


def test_a_store_that_deletes_nothing_keeps_locks_all_the_same(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository.store, "delete", refuse)
    locks = repository.locks(LocalProcesses(), QUICK)
    for number in range(1, 4):
        with acquire(locks) as lock:
            assert lock.epoch.number == number
            wait_for_beats(repository.store, 2 * number)


def wait_for_beats(store: ObjectStore, count: int) -> None:
    for _ in range(200):
        if len([n for n in store.list("locks/") if "/beat-" in n]) >= count:
            return
        threading.Event().wait(0.02)
    raise AssertionError("no heartbeats")


@pytest.mark.parametrize("left", [None, b"nonsense"], ids=["gone", "damaged"])
def test_an_owner_that_cannot_be_known_is_a_clear_error(
    repository: Repository, taken: Lock, left: bytes | None
) -> None:
    """Whom to revoke is not known either, so that nobody may take the lock over unasked."""
    name = taken.epoch.object("owner.json")
    repository.store.delete(name)
    if left is None:
        repository.store.put_new(taken.epoch.object("beat-0000000001"), [])
    else:
        repository.store.put_new(name, [left])
    with pytest.raises(CorruptObjectError, match=f"who holds the lock {NAME}") as caught:
        acquire(repository.locks(LocalProcesses(), QUICK))
    folder = name.removesuffix("/owner.json")
    assert folder in caught.value.hint
    # What the hint says helps.
    for each in list(repository.store.list(folder + "/")):
        repository.store.delete(each)
    with acquire(repository.locks(LocalProcesses(), QUICK)):
        pass


def test_waiting_can_be_cancelled(repository: Repository, taken: Lock) -> None:
    with pytest.raises(CancelledError):
        repository.locks(LocalProcesses(), QUICK).acquire(NAME, lambda: [], cancelled=lambda: True)


def test_of_many_that_race_one_wins(repository: Repository) -> None:
    start, done = threading.Barrier(12), threading.Barrier(12)
    won: list[int] = []
    lost: list[LockedError] = []

    def run(number: int) -> None:
        locks = repository.locks(Elsewhere(f"host {number}"), LockTiming(0.02, 2))
        start.wait()
        try:
            lock = locks.acquire(NAME, lambda: [], cancelled=never_cancelled)
        except LockedError as error:
            lost.append(error)
            done.wait()
            return
        won.append(number)
        done.wait()
        lock.release()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 11)


def test_a_late_comer_to_an_epoch_that_is_long_over_does_not_get_the_lock(
    repository: Repository,
) -> None:
    """It looked, slept while others came and went, and then wrote a name that was free again."""
    locks = repository.locks(LocalProcesses(), QUICK)
    with acquire(locks):
        pass
    slept = False

    def sleep_once() -> list[tuple[str, BackupId]]:
        nonlocal slept
        if not slept:
            slept = True
            for _ in range(2):
                with acquire(locks):
                    pass
        return [("main", MINE)]

    with locks.acquire(NAME, sleep_once, cancelled=never_cancelled) as lock:
        newest = locks.newest(NAME)
        assert newest is not None
        assert newest.number == lock.epoch.number == 4
    assert manifest_name("main", MINE) not in list(repository.store.list(""))
