"""A repository through everything that happens to it, in any order, against a dictionary.

Backups, syntheses and expiries are run, fail at any write or removal, die holding their lock, and
sleep before their commit while others go on. Whatever happened, exactly the committed backups that
no expiry was asked to remove are there, and each reads as what it was made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dbmodule.backup.synthetic import synthesize
from dbmodule.backup.walfiles import add_file
from dbmodule.chain import chain_of
from dbmodule.errors import LockedError, RepositoryError
from dbmodule.expire import expire
from dbmodule.ident import BackupId, BackupType
from dbmodule.manifest import Manifest, Root
from dbmodule.ports import ObjectStore, ProcessIdentity, never_cancelled, no_progress
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity
from dbmodule.repository.locks import Lock, Locks, LockTiming, backup_lock
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.repository.tables import FileEntry, TableWriter, encode_root
from dbmodule.repository.usage import Usage
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import MemoryStore
from tests.fault.fault_store import Fault, FaultStore
from tests.unit.strategies import LEVEL, backup_id, manifest, quick, random_bytes
from tests.unit.test_chainview import contents

CLUSTER = "main"
PATHS = ("a", "b", "c", "d", "e", "f")
AT_ONCE = LockTiming(beat=3600, expiry=0)
Files = dict[str, bytes]
faults = st.tuples(st.integers(1, 25), st.sampled_from([Fault.BEFORE, Fault.AFTER]))


class Hosts:
    """`ports.Processes` of a host of its own for each run; others are alive or cannot be seen."""

    count = 0

    def __init__(self, *, others_live: bool) -> None:
        Hosts.count += 1
        self._me = ProcessIdentity(f"host {Hosts.count}", "boot", "pid", 1, 1)
        self._others_live = others_live

    def me(self) -> ProcessIdentity:
        return self._me

    def runs(self, other: ProcessIdentity) -> bool | None:
        return True if self._others_live else None


@dataclass
class Sleeper:
    """A backup that sleeps before its commit."""

    repository: Repository
    manifest: Manifest
    files: Files
    lock: Lock


class States(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(FrameWriter, "PACK_BYTES", 45_000)
        self.store = MemoryStore()
        Repository.create(self.store)
        self.files: Files = {path: random_bytes(n, 9000) for n, path in enumerate(PATHS)}
        self.known: dict[BackupId, Files] = {}
        self.sleepers: list[Sleeper] = []
        self.number = 0
        self.seed = 100
        self.condemned: set[BackupId] = set()
        """By an expiry that failed: the next one goes on with it."""
        self.pending: Sleeper

    def teardown(self) -> None:
        try:
            self.store_ends_clean()
        finally:
            for sleeper in self.sleepers:
                sleeper.lock.release()
            self.patch.undo()

    # -- what happens ---------------------------------------------------------------------------

    @rule(paths=st.sets(st.sampled_from(PATHS), min_size=1))
    def change(self, paths: set[str]) -> None:
        for path in sorted(paths):
            self.seed += 1
            self.files[path] = random_bytes(self.seed, 9000)

    @rule(path=st.sampled_from(PATHS), number=st.integers(0, 5))
    def bring_back(self, path: str, number: int) -> None:
        """Content that earlier backups have, and perhaps no backup any more."""
        self.files[path] = random_bytes(number, 9000)

    @rule(full=st.booleans())
    def back_up(self, full: bool) -> None:
        self.committed(self.begin(self.store, full, others_live=False))

    @rule(full=st.booleans(), fault=faults)
    def back_up_and_fail(self, full: bool, fault: tuple[int, Fault]) -> None:
        sleeper = None
        try:
            sleeper = self.begin(FaultStore(self.store, *fault), full, others_live=False)
            self.committed(sleeper)
        except RepositoryError:
            if sleeper is not None:
                sleeper.lock.release()
            self.accept_late_commit()

    @rule(full=st.booleans())
    def back_up_and_die(self, full: bool) -> None:
        """With everything stored but the manifest, and the lock never given back."""
        sleeper = self.begin(self.store, full, others_live=False)
        sleeper.lock._stop.set()
        sleeper.lock._thread.join()
        with Locks._guard:
            Locks._held.discard(sleeper.lock._token)

    @precondition(lambda self: len(self.sleepers) < 2)
    @rule(full=st.booleans())
    def begin_and_sleep(self, full: bool) -> None:
        self.sleepers.append(self.begin(self.store, full, others_live=False))

    @precondition(lambda self: bool(self.sleepers))
    @rule(last=st.booleans())
    def wake_up_and_commit(self, last: bool) -> None:
        sleeper = self.sleepers.pop(-1 if last else 0)
        name = manifest_name(CLUSTER, sleeper.manifest.backup_id)
        revoked = name in self.store.list("manifests/")
        try:
            self.committed(sleeper)
        except LockedError:
            assert revoked
            sleeper.lock.release()
        else:
            assert not revoked

    @precondition(lambda self: bool(self.known))
    @rule(data=st.data())
    def synthesize(self, data: st.DataObject) -> None:
        repository = Repository.open(self.store)
        backups = repository.manifests(CLUSTER)
        chosen = [b for b, m in backups.items() if m.type is not BackupType.FULL]
        chosen = [b for b in chosen if b not in repository.condemned_backups(CLUSTER)]
        if not chosen:
            return
        source = data.draw(st.sampled_from(sorted(chosen)))
        made = synthesize(
            repository,
            None,
            CLUSTER,
            source,
            locks=repository.locks(Hosts(others_live=False), AT_ONCE),
            compression_level=LEVEL,
            progress=no_progress,
            cancelled=never_cancelled,
        )
        self.known[made.backup_id] = self.known[source]

    @rule(data=st.data(), fault=st.one_of(st.none(), faults), others_live=st.booleans())
    def expire(
        self, data: st.DataObject, fault: tuple[int, Fault] | None, others_live: bool
    ) -> None:
        going = data.draw(st.sets(st.sampled_from(sorted(self.known)))) if self.known else set()
        store = self.store if fault is None else FaultStore(self.store, *fault, removals=True)
        self.run_expire(store, going, others_live=others_live)

    # -- steps ----------------------------------------------------------------------------------

    def begin(self, store: ObjectStore, full: bool, *, others_live: bool) -> Sleeper:
        """A backup with all but its manifest."""
        repository = Repository.open(store)
        self.number += 1
        kind = BackupType.FULL if full else BackupType.INCR
        name = backup_id(self.number, kind)
        locks = repository.locks(Hosts(others_live=others_live), AT_ONCE)
        lock = locks.acquire(
            backup_lock(CLUSTER), lambda: [(CLUSTER, name)], cancelled=never_cancelled
        )
        try:
            return self.prepare(repository, kind, lock)
        except BaseException:
            lock.release()
            raise

    def prepare(self, repository: Repository, kind: BackupType, lock: Lock) -> Sleeper:
        backups = repository.manifests(CLUSTER)
        for condemned in repository.condemned_backups(CLUSTER):
            backups.pop(condemned, None)
        baseline = max(backups.values(), key=lambda m: m.backup_id, default=None)
        if kind is BackupType.FULL or baseline is None:
            kind, baseline = BackupType.FULL, None
        before = {} if baseline is None else self.known[baseline.backup_id]
        frames = repository.writer(LEVEL)
        try:
            tables = TableWriter(frames)
            for path, data in self.files.items():
                if before.get(path) == data:
                    tables.add_file(unchanged(path, len(data)))
                else:
                    add_file(tables, frames, path, data)
            described = tables.finish()
            packs = frames.flush()
            root = frames.store_root(encode_root(described, packs))
            frames.check_references()
        finally:
            frames.close()
        made = manifest(
            self.number,
            kind,
            None if baseline is None else baseline.backup_id,
            root=Root(root.pack, root.size, root.footer),
        )
        if baseline is not None:
            digest = repository.check_chain([baseline])[0]
            made = dataclasses.replace(made, baseline_hash=digest)
        return Sleeper(repository, made, dict(self.files), lock)

    def committed(self, sleeper: Sleeper) -> None:
        self.pending = sleeper
        sleeper.repository.commit(sleeper.manifest)
        self.known[sleeper.manifest.backup_id] = sleeper.files
        sleeper.lock.release()

    def accept_late_commit(self) -> None:
        """A commit whose answer was lost has happened."""
        there = set(Repository.open(self.store).backup_ids(CLUSTER)) - set(self.known)
        for backup in there:
            assert self.pending.manifest.backup_id == backup
            self.known[backup] = self.pending.files

    def run_expire(
        self, store: ObjectStore, going: set[BackupId], *, others_live: bool
    ) -> str | None:
        repository = Repository.open(store)
        try:
            report = expire(
                repository,
                CLUSTER,
                going,
                locks=repository.locks(Hosts(others_live=others_live), AT_ONCE),
                grace=0,
                progress=no_progress,
                cancelled=never_cancelled,
            )
        except (RepositoryError, LockedError) as error:
            assert isinstance(store, FaultStore) or others_live, error
            postponed = None
        else:
            postponed = report.postponed
        left = set(Repository.open(self.store).backup_ids(CLUSTER))
        for backup in set(self.known) - left:
            assert backup in going | self.condemned
            del self.known[backup]
        self.condemned = Repository.open(self.store).condemned_backups(CLUSTER)
        return postponed

    # -- what must be so ------------------------------------------------------------------------

    @invariant()
    def every_backup_is_what_it_was(self) -> None:
        repository = Repository.open(self.store)
        backups = repository.manifests(CLUSTER)
        assert set(backups) == set(self.known)
        for backup in backups:
            chain: Sequence[Manifest] = chain_of(backups, backup)
            repository.check_chain(list(chain))
            assert contents(repository, chain) == self.known[backup]

    def store_ends_clean(self) -> None:
        """A few expiries later there is nothing that no backup needs."""
        for _ in range(4):
            assert self.run_expire(self.store, set(), others_live=False) == ""
        self.every_backup_is_what_it_was()
        repository = Repository.open(self.store)
        usage = Usage(repository)
        for made in repository.manifests(CLUSTER).values():
            usage.add(made)
        assert usage.present == usage.needed.keys()
        assert usage.husks <= usage.referenced
        for name in self.store.list("condemned/"):
            assert name.endswith("/verdict.json")
        assert list(self.store.list("probe/")) == []


def unchanged(path: str, size: int) -> FileEntry:
    flags = EntryFlag.OVERLAY | EntryFlag.UNCHANGED | EntryFlag.WAL
    return FileEntry(path, EntryKind.CONTENT, flags, 0o600, size, FileIdentity(size, 0, 0, 0, 0))


TestStates = States.TestCase
TestStates.settings = settings(quick(25), stateful_step_count=25)
