"""Expiry: removes backups, and what no backup needs any more, beside runs that may begin any time.

Deletion has two phases. What is to go is announced first, then the locks of backups are looked at:
a backup that began before the announcement is seen, and one that begins after it sees the list and
does not build on it. Only if there is none is the list confirmed; manifests go at once, packs when
the list is old. Invariants: no chain is ever broken, whatever is asked for; and as long as one
manifest cannot be read, nothing is removed, since nobody knows what it needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dbmodule.chain import dependents_of
from dbmodule.compaction import mostly_dead, rewrite
from dbmodule.errors import (
    CancelledError,
    CorruptObjectError,
    DamageError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
)
from dbmodule.ident import BackupId
from dbmodule.manifest import Manifest
from dbmodule.parallel import in_order
from dbmodule.ports import Cancelled, Progress, never_cancelled
from dbmodule.reports import ExpireReport
from dbmodule.repository.condemned import BackupName, Sentence
from dbmodule.repository.holds import read_holds
from dbmodule.repository.husk import name_of_husk
from dbmodule.repository.locks import BACKUP, EXPIRE, Lock, Locks
from dbmodule.repository.merge import tidy
from dbmodule.repository.pack import PackId, name_of
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.repository.usage import Usage

log = logging.getLogger(__name__)

GRACE = 3600.0
"""Seconds between the announcement and the removal of packs: restores that read them may end."""
PROBE = "probe/expire"
LIVE_SHARE = 0.5
"""Packs of which less is in use are rewritten."""
_THREADS = 8


def expire(
    repository: Repository,
    cluster: str,
    remove: Collection[BackupId],
    *,
    locks: Locks,
    grace: float = GRACE,
    live_share: float = LIVE_SHARE,
    dry_run: bool = False,
    progress: Progress,
    cancelled: Cancelled,
) -> ExpireReport:
    """Remove backups of `cluster`, and of the whole repository what nothing needs any more.

    Raises `LockedError` when another expiry is at work, `DamageError` when a backup that stays
    cannot be read, and `RepositoryError` when the store refuses to delete; nothing was removed
    then. Packs are removed by a later call, `grace` seconds or more after this one; those of whose
    bytes less than `live_share` is in use are rewritten first.
    """
    expiry = _Expiry(repository, cluster, remove, locks, progress, cancelled)
    if dry_run:
        expiry.rehearse()
    else:
        expiry.carry_out(timedelta(seconds=max(grace, 2 * locks.timing.expiry)), live_share)
    return expiry.report(dry_run)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is to go."""

    backups: list[BackupName]
    """Dependents first."""
    packs: set[PackId]
    """That nothing refers to without those backups; of some only the husk is there."""
    rewritten: set[PackId]
    """That can go since their husks tell where their frames are."""


class _Expiry:
    def __init__(
        self,
        repository: Repository,
        cluster: str,
        remove: Collection[BackupId],
        locks: Locks,
        progress: Progress,
        cancelled: Cancelled,
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._condemned = repository.condemned
        self._cluster = cluster
        self._wanted = set(remove)
        self._locks = locks
        self._progress = progress
        self._cancelled = cancelled
        self._began = time.monotonic()
        self._removed: list[str] = []
        self._spared: list[str] = []
        self._postponed = ""
        self._counted = {"condemned": (0, 0), "removed": (0, 0)}
        self._rewritten = 0, 0

    def report(self, dry_run: bool) -> ExpireReport:
        return ExpireReport(
            removed=self._removed,
            spared=self._spared,
            postponed=self._postponed,
            packs_condemned=self._counted["condemned"][0],
            bytes_condemned=self._counted["condemned"][1],
            packs_removed=self._counted["removed"][0],
            bytes_removed=self._counted["removed"][1],
            packs_rewritten=self._rewritten[0],
            bytes_rewritten=self._rewritten[1],
            dry_run=dry_run,
            seconds=round(time.monotonic() - self._began, 3),
        )

    def rehearse(self) -> None:
        """Find out what would go; nothing is written or locked."""
        choice = self._choose()
        self._removed = [str(backup) for _, backup in choice.backups]
        self._count("condemned", choice.packs | choice.rewritten)

    def carry_out(self, grace: timedelta, live_share: float) -> None:
        with self._locks.acquire(EXPIRE, list, cancelled=self._cancelled) as lock:
            self._check_deletion()
            self._condemned.tidy()
            earlier = self._condemned.load()
            for sentence in earlier:
                if sentence.confirmed_at is None:
                    self._condemned.withdraw(sentence)
                else:
                    self._remove_manifests(lock, sentence)
            self._sweep(lock, grace)
            quiet = self._settle_backups()
            if quiet is None:
                return
            if self._condemn(lock, quiet) or earlier:
                # Only removals make packs worth rewriting.
                self._compact(lock, quiet, live_share)

    # -- may anything be removed? ---------------------------------------------------------------

    def _check_deletion(self) -> None:
        """Raise `RepositoryError` if the store does not delete, before anything else is done."""
        try:
            with suppress(ObjectExistsError):
                self._store.put_new(PROBE, [])
            self._store.delete(PROBE)
            self._store.size(PROBE)
        except ObjectMissingError:
            return
        except RepositoryError as error:
            raise _no_deletion(self._store.url, str(error)) from error
        raise _no_deletion(self._store.url, "a removed object is still there")

    def _settle_backups(self) -> dict[str, int] | None:
        """The last epoch of each cluster's backups, none of which runs; None when one does.

        Backups of dead runs are revoked.
        """
        running = []
        for name in self._locks.epochs(BACKUP):
            _, owner = self._locks.settle(name, self._cancelled)
            if owner is not None:
                running.append(f"{name.removeprefix(BACKUP)} ({owner})")
        quiet = self._epochs()
        if quiet is None or running:
            what = ", ".join(running) or "one that has just begun"
            self._postponed = f"a backup runs: {what}; the next expiry removes what is to go"
            log.warning("nothing is condemned: %s", self._postponed)
            return None
        return quiet

    def _epochs(self) -> dict[str, int] | None:
        """None when a backup runs."""
        epochs = self._locks.epochs(BACKUP)
        if not all(epoch.ended for epoch in epochs.values()):
            return None
        return {name: epoch.number for name, epoch in epochs.items()}

    # -- what is to go --------------------------------------------------------------------------

    def _manifests(self, leaving: Collection[BackupName] = ()) -> dict[BackupName, Manifest]:
        """All backups of all clusters but those that are `leaving`; raises `DamageError`."""
        found: dict[BackupName, Manifest] = {}
        for cluster in self._repository.clusters():
            readable, unreadable = self._repository.readable_manifests(cluster)
            for backup, error in unreadable.items():
                if (cluster, backup) not in leaving:
                    raise _damage(error)
            found.update({(cluster, backup): m for backup, m in readable.items()})
        return found

    def _choose(self) -> _Choice:
        wanted = {(self._cluster, backup) for backup in self._wanted}
        manifests = self._manifests(wanted)
        own = {backup: m for (cluster, backup), m in manifests.items() if cluster == self._cluster}
        there = self._wanted & set(self._repository.backup_ids(self._cluster))
        chosen = {b for b in there if self._wanted.issuperset(dependents_of(own, b))}
        self._spared = sorted(there - chosen)
        for backup in self._spared:
            log.warning("backup %s stays: backups that are kept depend on it", backup)
        going = [(self._cluster, backup) for backup in _dependents_first(own, chosen)]
        usage = self._usage(m for name, m in manifests.items() if name not in going)
        condemned = self._condemned_already()
        return _Choice(
            going,
            ((usage.present | usage.husks) - usage.referenced) - condemned,
            (usage.present & usage.referenced) - usage.needed.keys() - condemned,
        )

    def _usage(self, manifests: Iterable[Manifest], *, every_frame: bool = False) -> Usage:
        usage = Usage(self._repository)
        try:
            for manifest in manifests:
                usage.add(manifest, every_frame=every_frame)
        except CorruptObjectError as error:
            raise _damage(error) from error
        return usage

    def _condemned_already(self) -> set[PackId]:
        return {p for s in self._condemned.load() for p in s.packs | s.rewritten}

    # -- the first phase ------------------------------------------------------------------------

    def _condemn(self, lock: Lock, quiet: Mapping[str, int]) -> bool:
        """Announce what is to go, and if still no backup runs remove the manifests."""
        choice = self._choose()
        sentence = self._sentence(lock, quiet, choice)
        if sentence is None:
            return False
        self._count("condemned", choice.packs | choice.rewritten)
        self._remove_manifests(lock, sentence)
        return True

    def _sentence(self, lock: Lock, quiet: Mapping[str, int], choice: _Choice) -> Sentence | None:
        """A confirmed one; None if there is nothing to go, or a backup has begun."""
        if not choice.backups and not choice.packs and not choice.rewritten:
            return None
        sentence = self._condemned.announce(choice.backups, choice.packs, choice.rewritten)
        if self._epochs() != quiet:
            self._condemned.withdraw(sentence)
            self._postponed = "a backup has begun; the next expiry removes what is to go"
            return None
        if held := self._held(choice.backups):
            self._condemned.withdraw(sentence)
            self._postponed = f"backup {held} was held just now: run expire again"
            return None
        lock.ensure_held()
        return self._condemned.confirm(sentence)

    def _compact(self, lock: Lock, quiet: Mapping[str, int], live_share: float) -> None:
        """Rewrite packs that are mostly dead; a later call removes them."""
        usage = self._usage(self._manifests().values(), every_frame=True)
        packs = mostly_dead(self._repository, usage, live_share, self._condemned_already())
        if not packs:
            return
        choice = _Choice([], set(), {ref.pack for ref in packs})
        if self._sentence(lock, quiet, choice) is None:
            return
        rewrite(
            self._repository,
            usage,
            packs,
            before_write=lambda: self._go_on(lock),
            progress=lambda done, total: self._progress("compact", done, total),
        )
        self._rewritten = len(packs), sum(ref.size for ref in packs)

    def _go_on(self, lock: Lock) -> None:
        if self._cancelled():
            raise CancelledError("the expiry was cancelled")
        lock.ensure_held()

    def _held(self, order: Iterable[BackupName]) -> BackupId | None:
        """One of the announced backups that is held: a hold sees the sentence or is seen here."""
        holds = read_holds(self._repository, self._cluster)
        held = {h.backup_id for h in holds if h.in_force(datetime.now(UTC))}
        going = (b for cluster, b in order if cluster == self._cluster and b in held)
        return next(going, None)

    def _remove_manifests(self, lock: Lock, sentence: Sentence) -> None:
        there = {
            (cluster, backup)
            for cluster in {cluster for cluster, _ in sentence.backups}
            for backup in self._repository.backup_ids(cluster)
        }
        for cluster, backup in sentence.backups:
            if (cluster, backup) in there:
                lock.ensure_held()
                self._store.delete(manifest_name(cluster, backup))
                self._removed.append(str(backup))

    # -- the second phase -----------------------------------------------------------------------

    def _sweep(self, lock: Lock, grace: timedelta) -> None:
        """Remove the packs of sentences that are old, unless something needs them after all."""
        now = datetime.now(UTC)
        old = [
            sentence
            for sentence in self._condemned.load()
            if sentence.confirmed_at is not None and now - sentence.confirmed_at >= grace
        ]
        if not old:
            return
        usage = self._usage(self._manifests().values())
        packs = {p for s in old for p in s.packs | s.rewritten} - usage.needed.keys()
        self._count("removed", packs & usage.present)
        self._remove(lock, [name_of(pack) for pack in packs & usage.present])
        husks = packs & usage.husks - usage.referenced
        self._remove(lock, [name_of_husk(pack) for pack in husks])
        lock.ensure_held()
        # An entry that leads nowhere would hide one that does not.
        tidy(self._store, self._repository.key, never_cancelled, everything=True)
        for sentence in old:
            self._condemned.finish(sentence)

    def _remove(self, lock: Lock, names: Collection[str]) -> None:
        def remove(name: str) -> None:
            self._go_on(lock)
            self._store.delete(name)

        removals = in_order(remove, sorted(names), threads=_THREADS, name="expire")
        for done, _ in enumerate(removals, 1):
            self._progress("packs", done, len(names))

    def _count(self, what: str, packs: Collection[PackId]) -> None:
        def size(pack: PackId) -> int:
            with suppress(ObjectMissingError):
                return self._store.size(name_of(pack))
            return 0

        sizes = in_order(size, sorted(packs), threads=_THREADS, name="sizes")
        self._counted[what] = len(packs), sum(found for _, found in sizes)


def _dependents_first(
    backups: Mapping[BackupId, Manifest], chosen: Collection[BackupId]
) -> list[BackupId]:
    """`chosen` in an order in which each comes after all that depend on it."""
    return sorted(chosen, key=lambda b: (len(dependents_of(backups, b)), b))


def _no_deletion(url: str, reason: str) -> RepositoryError:
    return RepositoryError(
        f"{url} does not delete: {reason}",
        hint="Nothing was removed. Expire with credentials that may delete, and without a lock on"
        " objects that is still running.",
    )


def _damage(error: Exception) -> DamageError:
    return DamageError(
        f"nothing is removed, since it is not known what a damaged backup needs: {error}",
        hint="Run `dbmodule verify` to see all damage.",
    )
