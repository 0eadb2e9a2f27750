"""Locks made of immutable objects: one owner at a time, and none that an ended run can keep.

    locks/NAME/EPOCH/owner.json     who took the lock, and which backups it may commit
    locks/NAME/EPOCH/beat-N         the owner was alive when it wrote this; the last one counts
    locks/NAME/EPOCH/ended          the epoch is over

The owner is who created ``owner.json`` of the greatest epoch. Epochs only grow, so an owner that
was taken for dead finds out, however long it slept. Invariants: no clock but the observer's own is
trusted (it counts how long *it* saw no new heartbeat), and a dead owner's backups are *revoked*
before its epoch ends: then it cannot commit any more, whatever it does when it wakes up.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import ClassVar, Self

from dbmodule.errors import (
    CancelledError,
    CorruptObjectError,
    LockedError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
)
from dbmodule.ident import BackupId
from dbmodule.ports import Cancelled, Processes, ProcessIdentity
from dbmodule.repository.document import Documents

log = logging.getLogger(__name__)

PREFIX = "locks/"
OWNER = "owner.json"
ENDED = "ended"
EXPIRE = "expire"
_LONGEST_PAUSE = 600.0
_PATIENCE = 5.0
_OBJECT = re.compile(r"locks/([^/]+)/(\d{10})/(owner\.json|ended|beat-\d{10})")
BACKUP = "backup-"

Revoke = Callable[[str, BackupId], None]
"""Keep a backup of a cluster from ever being committed, unless it is already."""


def backup_lock(cluster: str) -> str:
    """The lock that every run holds which may commit a backup of `cluster`."""
    return BACKUP + cluster


@dataclass(frozen=True, slots=True)
class LockTiming:
    """In seconds."""

    beat: float = 15.0
    expiry: float = 60.0
    """An owner of whom nothing new was seen for so long counts as dead."""


@dataclass(frozen=True, slots=True)
class Owner:
    process: ProcessIdentity
    token: str
    commits: tuple[tuple[str, BackupId], ...]
    """Cluster and id of each backup that it may commit."""

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host}"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was seen of a lock's greatest epoch."""

    name: str
    number: int
    beats: int
    """Number of its last heartbeat."""
    ended: bool

    def object(self, part: str) -> str:
        return f"{PREFIX}{self.name}/{self.number:010}/{part}"


class Locks:
    """The locks of one repository, as this process sees them."""

    _held: ClassVar[set[str]] = set()
    """Tokens of this process's locks, whoever opened the repository."""
    _guard = threading.Lock()

    def __init__(
        self,
        documents: Documents,
        processes: Processes,
        revoke: Revoke,
        timing: LockTiming | None = None,
        *,
        stored_name: Callable[[str], str] = str,
    ) -> None:
        """`stored_name` tells people under which name an object is found in the store."""
        self._where = stored_name
        self._documents = documents
        self._store = documents.store
        self._processes = processes
        self._revoke = revoke
        self.timing = timing or LockTiming()

    # -- looking --------------------------------------------------------------------------------

    def newest(self, name: str) -> Epoch | None:
        """The greatest epoch of a lock; None when it was never taken."""
        return self._newest(f"{PREFIX}{name}/").get(name)

    def epochs(self, prefix: str) -> dict[str, Epoch]:
        """Of each lock whose name begins with `prefix`."""
        return self._newest(PREFIX + prefix)

    def _newest(self, prefix: str) -> dict[str, Epoch]:
        found: dict[str, Epoch] = {}
        for object_name in self._store.list(prefix):
            match = _OBJECT.fullmatch(object_name)
            if match is None:
                continue  # nobody's
            name, number, part = match.groups()
            known = found.get(name)
            if known is None or int(number) > known.number:
                known = Epoch(name, int(number), 0, False)
            beats = int(part.removeprefix("beat-")) if part.startswith("beat-") else 0
            found[name] = Epoch(
                name, known.number, max(known.beats, beats), known.ended or part == ENDED
            )
        return found

    def _owner(self, epoch: Epoch) -> Owner:
        """Raises `ObjectMissingError` when the epoch was cleaned away, `CorruptObjectError`."""
        name = epoch.object(OWNER)
        body = self._documents.get(name)
        try:
            return Owner(
                ProcessIdentity(**body["process"]),
                str(body["token"]),
                tuple((str(c), BackupId(str(b))) for c, b in body["commits"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptObjectError(f"{name}: not a valid lock: {error}") from error

    def _owner_or_none(self, epoch: Epoch) -> Owner | None:
        """None when the epoch ended, and was cleaned away by whoever came next.

        Raises `CorruptObjectError` when the owner of an epoch that goes on cannot be known: then
        nobody knows what to revoke either, and a person has to say that none is at work.
        """
        try:
            return self._owner(epoch)
        except ObjectMissingError as error:
            now = self.newest(epoch.name)
            if now is None or now.number != epoch.number or now.ended:
                return None
            raise self._unknown(epoch, error) from error
        except CorruptObjectError as error:
            raise self._unknown(epoch, error) from error

    def _unknown(self, epoch: Epoch, error: RepositoryError) -> CorruptObjectError:
        return CorruptObjectError(
            f"it is not known who holds the lock {epoch.name}: {error.message}",
            hint="Make sure that no run is at work in this repository, on any host. Then delete by"
            f" hand all objects below {self._where(epoch.object('')[:-1])}, and run again.",
        )

    def settle(self, name: str, cancelled: Cancelled) -> tuple[Epoch | None, Owner | None]:
        """The greatest epoch of a lock, and its owner if one is alive.

        A dead owner's backups are revoked and its epoch is ended. May watch for a lock's expiry.
        """
        while True:
            epoch = self.newest(name)
            if epoch is None or epoch.ended:
                return epoch, None
            owner = self._owner_or_none(epoch)
            if owner is None:
                continue
            lives = self._lives(epoch, owner, cancelled)
            if lives:
                return epoch, owner
            if lives is None:
                continue
            log.warning("the lock %s was left behind by %s, which has ended", name, owner)
            for cluster, backup in owner.commits:
                self._revoke(cluster, backup)
            with suppress(ObjectExistsError):
                self._store.put_new(epoch.object(ENDED), [])
            return self.newest(name), None

    def _lives(self, epoch: Epoch, owner: Owner, cancelled: Cancelled) -> bool | None:
        """None when the epoch ended meanwhile."""
        if owner.process == self._processes.me():
            with self._guard:
                return owner.token in self._held
        runs = self._processes.runs(owner.process)
        if runs is not None:
            return runs
        log.info("watching whether %s, which holds the lock %s, is alive", owner, epoch.name)
        deadline = time.monotonic() + self.timing.expiry
        pause = threading.Event()
        while time.monotonic() < deadline:
            if cancelled():
                raise CancelledError("cancelled while waiting for a lock")
            pause.wait(self.timing.beat / 5)
            now = self.newest(epoch.name)
            if now is None or now.number != epoch.number or now.ended:
                return None
            if now.beats > epoch.beats:
                return True
        return False

    # -- taking ---------------------------------------------------------------------------------

    def acquire(
        self,
        name: str,
        commits: Callable[[], Sequence[tuple[str, BackupId]]],
        *,
        cancelled: Cancelled,
    ) -> Lock:
        """Take a lock; `commits` is asked which backups its owner may commit, when nobody else
        can commit any more.

        Raises `LockedError` when another run that is alive has it.
        """
        while True:
            last, owner = self.settle(name, cancelled)
            if owner is not None:
                raise LockedError(
                    f"another run is at work in this repository: {owner} holds the lock {name}",
                    hint="Wait until it has ended; if it hangs, end that process.",
                )
            mine = Epoch(name, 1 if last is None else last.number + 1, 0, False)
            token = secrets.token_hex(16)
            body = {
                "process": asdict(self._processes.me()),
                "token": token,
                "commits": list(commits()),
                "at": datetime.now(UTC).isoformat(),
            }
            with self._guard:
                self._held.add(token)
            try:
                self._documents.put(mine.object(OWNER), body)
                now = self.newest(name)
            except BaseException as error:
                with self._guard:
                    self._held.discard(token)
                if isinstance(error, ObjectExistsError):
                    continue  # another was faster: see whether it lives
                raise
            if now is not None and now.number == mine.number and not now.ended:
                self._clean(mine)
                return Lock(self, mine, token)
            # Others came, went and were cleaned away since we looked: this epoch is long over.
            self.end(mine, token)

    def end(self, epoch: Epoch, token: str) -> None:
        """Give an own epoch up, later if the store cannot be reached now.

        Else other processes of this host would be kept out for as long as this one lives.
        """
        with self._guard:
            self._held.discard(token)
        if not self._ended(epoch):
            name = f"end-{epoch.name}"
            threading.Thread(target=self._end_later, args=(epoch,), name=name, daemon=True).start()

    def _ended(self, epoch: Epoch) -> bool:
        try:
            self._store.put_new(epoch.object(ENDED), [])
        except ObjectExistsError:
            return True
        except RepositoryError as error:
            log.warning("the lock %s could not be given back yet: %s", epoch.name, error)
            return False
        return True

    def _end_later(self, epoch: Epoch) -> None:
        pause, never = self.timing.beat, threading.Event()
        while True:
            never.wait(pause)
            if self._ended(epoch):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _clean(self, mine: Epoch) -> None:
        """Remove what is left of earlier epochs. That a store refuses to is no harm."""
        before = f"{PREFIX}{mine.name}/{mine.number:010}/"
        names = [n for n in self._store.list(f"{PREFIX}{mine.name}/") if n < before]
        # An owner document is needed for as long as its epoch is not known to have ended.
        with suppress(RepositoryError):
            for name in sorted(names, key=lambda n: n.endswith(f"/{ENDED}")):
                self._store.delete(name)

    def beat(self, epoch: Epoch, number: int, *, tidy: bool) -> bool:
        """Write a heartbeat, remove the one before if `tidy`; False when it cannot be removed."""
        with suppress(ObjectExistsError):
            self._store.put_new(epoch.object(f"beat-{number:010}"), [])
        if not tidy or number == 1:
            return tidy
        try:
            self._store.delete(epoch.object(f"beat-{number - 1:010}"))
        except RepositoryError:
            return False
        return True


class Lock:
    """A lock that this process took, and keeps by a thread of its own. A context manager."""

    def __init__(self, locks: Locks, epoch: Epoch, token: str) -> None:
        self._locks = locks
        self.epoch = epoch
        self._token = token
        self._stop = threading.Event()
        self._seen = _now()
        self.superseded = False
        """Has another run taken the lock over?"""
        self._thread = threading.Thread(target=self._keep, name=f"lock-{epoch.name}", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        number, tidy = 0, True
        while not self._stop.wait(self._locks.timing.beat):
            number += 1
            began = _now()
            try:
                tidy = self._locks.beat(self.epoch, number, tidy=tidy)
                self._look()
                self._seen = began
            except RepositoryError as error:
                log.warning("the lock %s could not be renewed: %s", self.epoch.name, error)
            if self.superseded:
                return

    def _look(self) -> None:
        now = self._locks.newest(self.epoch.name)
        if now is None or now.number != self.epoch.number or now.ended:
            self.superseded = True

    def ensure_held(self) -> None:
        """Raise `LockedError` if the lock was lost; asked before what must not be done without."""
        if not self.superseded and _now() - self._seen > self._locks.timing.expiry / 2:
            began = _now()
            self._look()
            self._seen = began
        if self.superseded:
            raise self.lost()

    def lost(self) -> LockedError:
        return LockedError(
            f"another run has taken the lock {self.epoch.name} over: this one was taken for dead",
            hint="It was stopped or cut off from the repository for too long. Run it again.",
        )

    def release(self) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE)  # a heartbeat that comes after the end means nothing
        self._locks.end(self.epoch, self._token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _now() -> float:
    """Seconds that go on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
