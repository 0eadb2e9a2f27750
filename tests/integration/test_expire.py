"""Expiry beside everything else: what is kept restores to the same bytes, and nothing else stays.

With a tiny data directory, see `tests.fix_scene`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dbmodule.errors import DamageError, LockedError, NoBaselineError, RepositoryError
from dbmodule.ident import BackupId, BackupType
from dbmodule.ports import Buffer
from dbmodule.processes import LocalProcesses
from dbmodule.reports import ExpireReport, VerifyLevel
from dbmodule.repository.condemned import Condemned
from dbmodule.repository.husk import name_of_husk
from dbmodule.repository.locks import LockTiming
from dbmodule.repository.pack import PackId, name_of
from dbmodule.repository.repository import Repository
from dbmodule.repository.usage import Usage
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import LocalStore
from tests.fault import mini
from tests.fault.fault_store import DamagedStore, Fault, FaultStore
from tests.fix_s3 import S3
from tests.fix_scene import (
    PACK_BYTES,
    Scene,
    await_stop,
    backup_process,
    goes_on_and_fails,
    run_killed,
)

MOST_STEPS = 120
BIG_PACKS = 4 << 20
MANIFEST = "manifests/"
RAISING = (Fault.BEFORE, Fault.FULL, Fault.AFTER)


def grow(scene: Scene, *kinds: BackupType) -> list[BackupId]:
    """Backups with changes between them; their ids in order."""
    made: list[BackupId] = []
    for kind in kinds:
        mini.change_state(scene.root, 1 + len(scene.known) % 9)
        known = set(scene.known)
        scene.back_up(kind)
        made += set(scene.known) - known
    return made


FULL, DIFF, INCR = BackupType.FULL, BackupType.DIFF, BackupType.INCR


def remove(scene: Scene, backups: Iterable[BackupId], **options: Any) -> ExpireReport:
    report = mini.run_expire(scene.store, backups, **options)
    for backup in report.removed:
        del scene.known[BackupId(backup)]
    return report


def objects(scene: Scene) -> set[str]:
    return set(Repository.open(scene.store).store.list(""))


def test_what_nothing_needs_goes_and_the_rest_stays(scene: Scene) -> None:
    old = grow(scene, FULL, DIFF, INCR)
    kept = grow(scene, FULL, DIFF)
    before = objects(scene)
    report = remove(scene, old)
    assert report.removed == old[::-1]
    assert (report.spared, report.postponed) == ([], "")
    assert report.packs_condemned > 0
    assert report.packs_removed == 0
    packs = {name for name in before if name.startswith("packs/")}
    assert packs <= objects(scene)  # until the next one
    scene.check()
    report = remove(scene, [])
    assert report.packs_removed > 0
    assert report.bytes_removed > 0
    assert not packs <= objects(scene)
    scene.check()
    assert set(scene.known) == set(kept)
    grow(scene, INCR, FULL)
    scene.check()


def test_what_is_condemned_stays_for_a_while(scene: Scene) -> None:
    old = grow(scene, FULL, FULL)[0]
    remove(scene, [old])
    report = remove(scene, [], grace=3600)
    assert report.packs_removed == 0
    assert remove(scene, []).packs_removed > 0


def test_a_baseline_of_a_kept_backup_is_never_removed(scene: Scene) -> None:
    full, diff, incr = grow(scene, FULL, DIFF, INCR)
    report = remove(scene, [full, diff])
    assert report.removed == []
    assert report.spared == [full, diff]
    report = remove(scene, [full, incr])
    assert report.removed == [incr]
    assert report.spared == [full]
    scene.check()


def test_a_dry_run_says_the_same_and_writes_nothing(scene: Scene) -> None:
    old = grow(scene, FULL, DIFF, FULL)[:2]
    before = objects(scene)
    rehearsed = mini.run_expire(scene.store, old, dry_run=True)
    assert objects(scene) == before
    report = remove(scene, old)
    assert report.removed == rehearsed.removed
    assert report.packs_condemned == rehearsed.packs_condemned
    assert report.bytes_condemned == rehearsed.bytes_condemned > 0


def test_a_running_backup_is_not_disturbed(scene: Scene) -> None:
    old = grow(scene, FULL, FULL)[0]
    mini.change_state(scene.root, 7)
    running = backup_process(scene, DIFF, 1, Fault.STOP_BEFORE, "index/")
    await_stop(running)
    expected = mini.contents(scene.root)
    # It is stopped, but not for long enough to be taken for dead.
    slow = LockTiming(beat=0.1, expiry=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalProcesses, "runs", lambda self, other: True)
        report = remove(scene, [old], timing=slow)
    assert report.removed == []
    assert "a backup runs" in report.postponed
    running.send_signal(signal.SIGCONT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    made = set(Repository.open(scene.store).backup_ids(mini.CLUSTER)) - set(scene.known)
    scene.known.update(dict.fromkeys(made, expected))
    scene.check()
    assert remove(scene, [old]).removed == [old]
    remove(scene, [])
    scene.check()


def test_a_stopped_backup_that_wakes_up_after_an_expiry_cannot_commit(scene: Scene) -> None:
    old, kept = grow(scene, FULL, FULL)
    # What it refers to is condemned and removed while it sleeps, its own packs, too.
    stopped = backup_process(scene, FULL, 1, Fault.STOP_BEFORE, MANIFEST)
    await_stop(stopped)
    report = remove(scene, [old])
    assert report.removed == [old]
    assert remove(scene, []).packs_removed > 0
    assert "LockedError" in goes_on_and_fails(stopped)
    assert set(scene.known) == {kept}
    scene.check()
    grow(scene, DIFF, FULL)
    scene.check()


def test_what_is_condemned_is_not_built_on(scene: Scene) -> None:
    """The same pages are stored again rather than found in packs that are about to go."""
    old = grow(scene, FULL)
    state = mini.contents(scene.root)
    remove(scene, old)
    scene.back_up(FULL)
    assert mini.contents(scene.root) == state
    assert remove(scene, []).packs_removed > 0
    scene.check()


def test_a_killed_backups_packs_are_used_again_until_they_are_condemned(scene: Scene) -> None:
    first = scene.back_up(FULL)
    other = Scene(scene.root, scene.base / "other")
    assert run_killed(other, FULL, 1, Fault.KILL_BEFORE, MANIFEST) == -signal.SIGKILL
    assert other.back_up(FULL) < first / 10
    other.check()
    third = Scene(scene.root, scene.base / "third")
    assert run_killed(third, FULL, 1, Fault.KILL_BEFORE, MANIFEST) == -signal.SIGKILL
    assert remove(third, []).packs_condemned > 0
    assert third.back_up(FULL) > first / 2
    assert remove(third, []).packs_removed > 0
    third.check()


def test_a_full_killed_near_its_end_uploads_little_again(scene: Scene) -> None:
    counting = FaultStore(scene.store, only="packs/")
    other = Scene(scene.root, scene.base / "other")
    for each in (scene, other):
        each.root.joinpath("base/1/5000").write_bytes(mini.random_bytes(64 << 18))
    whole = scene.back_up(FULL, counting)
    at = len(counting.writes) * 9 // 10
    assert at > 40
    assert run_killed(other, FULL, at, Fault.KILL_WITHIN, "packs/") == -signal.SIGKILL
    # A tenth was not stored, and a part of the rest was not yet in the index.
    again = other.back_up(FULL)
    assert again < whole * 0.17
    other.check()


def test_nothing_is_built_on_a_backup_whose_removal_has_begun(scene: Scene) -> None:
    full, diff = grow(scene, FULL, DIFF)
    failing = FaultStore(scene.store, 1, Fault.BEFORE, only=MANIFEST, removals=True)
    with pytest.raises(RepositoryError, match="the wire was cut"):
        mini.run_expire(failing, [diff])
    scene.check()  # it is still there, and still whole
    mini.change_state(scene.root, 5)
    with pytest.raises(NoBaselineError):
        mini.back_up(scene.store, scene.root, INCR, baseline=diff)
    made = mini.back_up(scene.store, scene.root, INCR)
    assert made.baseline_id == full
    scene.known[made.backup_id] = mini.contents(scene.root)
    # The next expiry goes on with it, though it was not asked to.
    assert remove(scene, []).removed == [diff]
    scene.check()


def test_a_verification_reads_each_manifest_once(scene: Scene) -> None:
    """However long the chain is: over a network each costs a round trip."""
    grow(scene, FULL, *[INCR] * 5)
    reads: list[str] = []

    class Counting(FaultStore):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            reads.append(name)
            return super().get(name, offset, length)

    mini.verify_all(Counting(scene.store), VerifyLevel.QUICK)
    assert sorted(n for n in reads if n.startswith(MANIFEST)) == sorted(
        f"{MANIFEST}{mini.CLUSTER}/{backup}.json" for backup in scene.known
    )


class Meeting(FaultStore):
    """Something else happens right after an object of some name was created."""

    def __init__(self, scene: Scene, part: str, action: Callable[[], None]) -> None:
        super().__init__(scene.store)
        self._part = part
        self._action = action

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        size = super().put_new(name, chunks)
        if name.startswith("condemned/") and name.endswith(self._part):
            self._action()
        return size


def test_a_backup_that_begins_during_the_announcement_is_seen(scene: Scene) -> None:
    """It was not there when the expiry looked first, and its baseline is about to go."""
    old, kept = grow(scene, FULL, FULL)
    mini.change_state(scene.root, 5)
    repository = Repository.open(scene.store)
    locks = repository.locks(LocalProcesses())
    held = []

    def begin() -> None:
        lock = locks.acquire("backup-main", list, cancelled=lambda: False)
        held.append(lock)

    report = mini.run_expire(Meeting(scene, "list.json", begin), [old])
    assert report.removed == []
    assert report.postponed.startswith("a backup has begun")
    held[0].release()
    assert repository.condemned.load() == []
    scene.check()
    assert kept in scene.known


def test_a_backup_that_comes_and_goes_during_the_announcement_is_noticed(scene: Scene) -> None:
    """It built on what was to go, since its lock came before the list."""
    old, _ = grow(scene, FULL, FULL)
    store = Meeting(scene, "list.json", lambda: None)
    made: list[BackupId] = []

    def back_up() -> None:
        # As if it had read the sentences just before this one was there.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Condemned, "load", lambda self: [])
            mini.change_state(scene.root, 6)
            known = set(scene.known)
            scene.back_up(DIFF)
            made.extend(set(scene.known) - known)

    store = Meeting(scene, "list.json", back_up)
    report = mini.run_expire(store, [old])
    assert report.removed == []
    assert report.postponed != ""
    assert made
    scene.check()
    remove(scene, [])
    remove(scene, [])
    scene.check()


def test_an_expiry_that_sleeps_before_its_verdict_cannot_go_on(scene: Scene) -> None:
    old, kept = grow(scene, FULL, FULL)
    sleeping = scene.expiry([old], 2, Fault.STOP_BEFORE, "condemned/")
    await_stop(sleeping)
    # Another takes over, and a backup builds on what was to go.
    assert remove(scene, []).removed == []
    newest = max(scene.known)
    assert newest == kept
    mini.change_state(scene.root, 5)
    repository = Repository.open(scene.store)
    assert repository.condemned_backups("main") == set()
    made = mini.back_up(scene.store, scene.root, DIFF, baseline=old)
    scene.known[made.backup_id] = mini.contents(scene.root)
    assert made.baseline_id == old
    assert "LockedError" in goes_on_and_fails(sleeping)
    scene.check()
    remove(scene, [])
    scene.check()


def test_an_expiry_that_sleeps_among_its_removals_harms_nothing_later(scene: Scene) -> None:
    old, _ = grow(scene, FULL, FULL)
    state = mini.contents(scene.root)
    remove(scene, [old])
    sleeping = scene.expiry([], 1, Fault.STOP_BEFORE, "packs/")
    await_stop(sleeping)
    assert remove(scene, []).packs_removed > 0
    # What was removed is stored again, as it was.
    scene.back_up(FULL)
    assert mini.contents(scene.root) == state
    goes_on_and_fails(sleeping)
    scene.check()


def test_two_expiries_at_once(scene: Scene) -> None:
    grow(scene, FULL)
    repository = Repository.open(scene.store)
    locks = repository.locks(LocalProcesses())
    with (
        locks.acquire("expire", list, cancelled=lambda: False),
        pytest.raises(LockedError, match="lock expire") as caught,
    ):
        remove(scene, [])
    assert caught.value.exit_code == 7


def test_a_store_that_does_not_delete_is_left_as_it_is(scene: Scene) -> None:
    old = grow(scene, FULL, FULL)[0]

    class WriteOnly(FaultStore):
        def delete(self, name: str) -> None:
            raise RepositoryError(f"cannot delete {name}: access denied")

    with pytest.raises(RepositoryError, match="does not delete") as caught:
        mini.run_expire(WriteOnly(scene.store), [old])
    assert caught.value.exit_code == 5
    scene.check()

    class Worm(FaultStore):
        def delete(self, name: str) -> None:
            """Says nothing, and keeps it."""

    with pytest.raises(RepositoryError, match="is still there"):
        mini.run_expire(Worm(scene.store), [old])
    scene.check()
    # Backups need no right to delete.
    mini.back_up(WriteOnly(scene.store), scene.root, FULL)


def test_a_damaged_backup_that_stays_forbids_any_removal(scene: Scene) -> None:
    old, kept = grow(scene, FULL, FULL)
    manifest = f"manifests/main/{kept}.json"
    root = Repository.open(scene.store).manifest("main", kept)[0].root.pack
    for name in (manifest, f"packs/{root[:2]}/{root}"):
        damaged = DamagedStore(scene.store, {name: b"nonsense"})
        with pytest.raises(DamageError, match="nothing is removed") as caught:
            mini.run_expire(damaged, [old])
        assert caught.value.exit_code == 3
    scene.check()
    # One that is to go may be damaged.
    scene.store.delete(f"manifests/main/{old}.json")
    scene.store.put_new(f"manifests/main/{old}.json", [b"nonsense"])
    assert remove(scene, [old]).removed == [old]
    scene.check()


def test_backups_of_other_clusters_are_safe(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share packs."""
    mine = grow(scene, FULL)[0]
    monkeypatch.setattr(mini, "CLUSTER", "other")
    scene.back_up(FULL)
    expected = mini.contents(scene.root)
    other = Repository.open(scene.store).backup_ids("other")[0]
    monkeypatch.setattr(mini, "CLUSTER", "main")
    assert mini.run_expire(scene.store, [mine]).removed == [mine]
    mini.run_expire(scene.store, [])
    monkeypatch.setattr(mini, "CLUSTER", "other")
    scene.known = {other: expected}
    scene.check()


def write_blob(scene: Scene, step: int) -> None:
    """What is most of a backup, and nothing of the next."""
    scene.root.joinpath("blob").write_bytes(mini.random_bytes(300_000 + step))


def test_packs_that_are_mostly_dead_are_rewritten(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", BIG_PACKS)
    write_blob(scene, 1)
    first = grow(scene, FULL)
    write_blob(scene, 2)
    second = grow(scene, FULL)
    report = remove(scene, first)
    assert report.packs_rewritten >= 1
    assert report.bytes_rewritten > 300_000
    scene.check()
    assert remove(scene, []).bytes_removed > 300_000
    assert list(scene.store.list("husks/")) != []
    scene.check()  # by way of the husk now
    grow(scene, INCR)
    write_blob(scene, 3)
    third = grow(scene, FULL, DIFF)
    scene.check()
    # The frames were found in their new place, and not stored again.
    sizes = [scene.store.size(name) for name in scene.store.list("packs/")]
    assert sum(sizes) < 3 * 300_000
    remove(scene, set(scene.known) - set(third))
    assert second[0] not in scene.known
    expect_clean(scene)
    scene.check()
    # What no backup refers to by the old name needs no husk.
    usage = usage_of(scene)
    assert usage.husks <= usage.referenced


@pytest.mark.parametrize("level", list(VerifyLevel))
def test_what_is_removed_during_a_verification_is_no_damage(
    scene: Scene, level: VerifyLevel
) -> None:
    *old, kept = grow(scene, FULL, DIFF, FULL)

    class Removing(FaultStore):
        """An expiry, when all manifests were read; packs stay for a while."""

        struck_once = False

        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            if name.startswith("packs/") and not self.struck_once:
                self.struck_once = True
                assert remove(scene, old).removed == old[::-1]
            return super().get(name, offset, length)

    report = mini.verify_all(Removing(scene.store), level)
    assert (report.status, report.damage) == ("sound", [])
    assert kept in report.backups


def test_what_is_removed_while_backups_are_listed_is_not_unreadable(scene: Scene) -> None:
    old, kept = grow(scene, FULL, FULL)

    class Removing(FaultStore):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            if name.endswith(f"{old}.json"):
                scene.store.delete(name)
            return super().get(name, offset, length)

    found, unreadable = mini.opened(Removing(scene.store)).readable_manifests(mini.CLUSTER)
    assert (list(found), unreadable) == ([kept], {})


def test_verify_finds_what_is_wrong_with_a_husk(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", BIG_PACKS)
    write_blob(scene, 1)
    first = grow(scene, FULL)
    write_blob(scene, 2)
    grow(scene, FULL)
    assert remove(scene, first).packs_rewritten > 0
    assert remove(scene, []).packs_removed > 0
    husk = next(scene.store.list("husks/"))
    data = bytearray(scene.store.get(husk))
    data[len(data) // 2] ^= 1
    husked = PackId(husk.rpartition("/")[2])
    moved = Repository.open(scene.store).frames.husk(husked)
    assert moved is not None
    target = name_of(moved.packs[0].pack)
    for name, content, said in (
        (husk, bytes(data), husk),
        (husk, None, name_of(husked)),
        (target, None, target),
    ):
        report = mini.verify_all(DamagedStore(scene.store, {name: content}))
        assert report.status == "damaged"
        assert any(said in f"{d.object}: {d.problem}" for d in report.damage), report.damage


def usage_of(scene: Scene) -> Usage:
    repository = Repository.open(scene.store)
    usage = Usage(repository)
    for manifest in repository.manifests(mini.CLUSTER).values():
        usage.add(manifest)
    return usage


def test_on_an_object_store(scene: Scene, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", BIG_PACKS)
    scene.store = s3.store()
    Repository.create(scene.store)
    write_blob(scene, 1)
    old = grow(scene, FULL, DIFF)
    write_blob(scene, 2)
    grow(scene, FULL)
    report = remove(scene, old)
    assert report.removed == old[::-1]
    assert report.packs_rewritten > 0
    assert remove(scene, []).packs_removed > 0
    scene.check()
    expect_clean(scene)
    scene.check()


# -- faults -------------------------------------------------------------------------------------


def leftovers(scene: Scene) -> set[str]:
    """Objects that no kept backup, lock or record of a decision accounts for."""
    manifests = Repository.open(scene.store).manifests(mini.CLUSTER).values()
    usage = usage_of(scene)
    needed = {name_of(pack) for pack in usage.needed}
    needed |= {name_of_husk(pack) for pack in usage.referenced & usage.husks}
    lasting = ("locks/", "clusters/", "repository.json", "index/", "keys/")
    return {
        name
        for name in objects(scene)
        if not name.startswith(lasting)
        and name not in needed
        and not name.endswith("/verdict.json")
        and name not in {f"manifests/{m.cluster}/{m.backup_id}.json" for m in manifests}
    }


def expect_clean(scene: Scene) -> None:
    for _ in range(3):
        remove(scene, [])
    assert leftovers(scene) == set()


@pytest.mark.parametrize(
    ("fault", "pack_bytes"),
    [(Fault.BEFORE, PACK_BYTES), *((fault, BIG_PACKS) for fault in RAISING)],
)
def test_every_write_and_removal_may_fail(
    scene: Scene, fault: Fault, pack_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", pack_bytes)
    write_blob(scene, 0)
    rewritten = 0
    first = grow(scene, FULL, DIFF)
    grow(scene, FULL, INCR)
    remove(scene, first)  # so that there is something to sweep, too
    for step in range(1, MOST_STEPS):
        mini.change_state(scene.root, 1 + step % 9)
        write_blob(scene, step)
        scene.back_up(FULL)
        if step % 2:
            scene.back_up(DIFF)
        going = sorted(scene.known)[:-3]
        store = FaultStore(scene.store, step, fault, removals=True)
        try:
            report = mini.run_expire(store, going)
        except (RepositoryError, LockedError):
            assert store.struck
        else:
            assert report.postponed == ""
        rewritten += len(list(scene.store.list("husks/")))
        left = set(Repository.open(scene.store).backup_ids(mini.CLUSTER))
        assert set(scene.known) - left <= set(going)
        for backup in set(scene.known) - left:
            del scene.known[backup]
        scene.check()
        if not store.struck:
            break
    else:
        raise AssertionError("no expiry without a failure")
    assert step > 10
    assert rewritten or pack_bytes == PACK_BYTES
    expect_clean(scene)
    scene.check()


@pytest.mark.parametrize("fault", [Fault.KILL_BEFORE, Fault.KILL_AFTER])
def test_killed_at_any_step(scene: Scene, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", BIG_PACKS)
    write_blob(scene, 0)
    grow(scene, FULL, DIFF, FULL)
    for step in (1, 2, 3, 4, 5, 6, 8, 10, 13, 17):
        mini.change_state(scene.root, 1 + step % 9)
        write_blob(scene, step)
        scene.back_up(FULL)
        scene.back_up(DIFF)
        going = sorted(scene.known)[:-2]
        code = scene.run_expiry(going, step, fault)
        assert code in (0, -signal.SIGKILL)
        left = set(Repository.open(scene.store).backup_ids(mini.CLUSTER))
        for backup in set(scene.known) - left:
            assert backup in going
            del scene.known[backup]
        scene.check()
    scene.store = LocalStore(scene.base / "repo")
    expect_clean(scene)
    scene.check()
