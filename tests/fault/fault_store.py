"""Object stores that fail on purpose, wrapped around a real one.

`FaultStore` fails at the Nth write or removal: before, in the middle of or after it, for once or
from then on, or by killing or stopping the process. `DamagedStore` shows some
objects otherwise than they are stored.
The store behind is never harmed, except by what a failed or killed write leaves in it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import StrEnum

from dbmodule.errors import ObjectExistsError, ObjectMissingError, RepositoryError
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.storage.names import clip


class Fault(StrEnum):
    """What happens to a write."""

    BEFORE = "before"
    """It fails, and nothing was written."""
    FULL = "full"
    """The disk is full in the middle of it, and stays full."""
    AFTER = "after"
    """The object is there, but the store's answer is lost."""
    KILL_BEFORE = "kill-before"
    KILL_WITHIN = "kill-within"
    """The process dies when a part of the bytes is written."""
    KILL_AFTER = "kill-after"
    STOP_BEFORE = "stop-before"
    """The process stops, and goes on with it when it is continued."""


class FaultStore:
    """`ports.ObjectStore` whose write number `at`, counted from 1, goes wrong; 0 never does.

    Only names that begin with `only` count, and removals if they are asked for.
    """

    def __init__(
        self,
        store: ObjectStore,
        at: int = 0,
        fault: Fault = Fault.BEFORE,
        *,
        only: str = "",
        removals: bool = False,
    ) -> None:
        self._store = store
        self._only = only
        self._removals = removals
        self._at = at
        self._fault = fault
        self._lock = threading.Lock()
        self.url = store.url
        self.writes: list[str] = []

    @property
    def struck(self) -> bool:
        """Has the fault happened?"""
        return 0 < self._at <= len(self.writes)

    def _count(self, name: str) -> bool:
        """Does what is done to this object now go wrong?"""
        if not name.startswith(self._only):
            return False
        with self._lock:
            self.writes.append(name)
            number = len(self.writes)
        return number == self._at or (self._fault is Fault.FULL and self.struck)

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        if self._count(name):
            match self._fault:
                case Fault.BEFORE:
                    raise RepositoryError(f"cannot write {name}: the wire was cut")
                case Fault.FULL:
                    return self._store.put_new(name, _until_full(name, chunks))
                case Fault.AFTER:
                    with suppress(ObjectExistsError):
                        self._store.put_new(name, chunks)
                    raise RepositoryError(f"cannot write {name}: no answer")
                case Fault.KILL_BEFORE:
                    _die()
                case Fault.KILL_WITHIN:
                    return self._store.put_new(name, _until_dead(chunks))
                case Fault.KILL_AFTER:
                    with suppress(ObjectExistsError):
                        self._store.put_new(name, chunks)
                    _die()
                case Fault.STOP_BEFORE:
                    os.kill(os.getpid(), signal.SIGSTOP)
        return self._store.put_new(name, chunks)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._store.get(name, offset, length)

    def size(self, name: str) -> int:
        return self._store.size(name)

    def list(self, prefix: str) -> Iterator[str]:
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        if self._removals and self._count(name):
            match self._fault:
                case Fault.BEFORE | Fault.FULL:
                    raise RepositoryError(f"cannot delete {name}: the wire was cut")
                case Fault.AFTER:
                    self._store.delete(name)
                    raise RepositoryError(f"cannot delete {name}: no answer")
                case Fault.KILL_BEFORE | Fault.KILL_WITHIN:
                    _die()
                case Fault.KILL_AFTER:
                    self._store.delete(name)
                    _die()
                case Fault.STOP_BEFORE:
                    os.kill(os.getpid(), signal.SIGSTOP)
        self._store.delete(name)


class DamagedStore:
    """`ports.ObjectStore` in which the objects in `planted` have other bytes; None = is gone."""

    def __init__(self, store: ObjectStore, planted: Mapping[str, bytes | None]) -> None:
        self._store = store
        self._planted = planted
        self.url = store.url

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        return self._store.put_new(name, chunks)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name not in self._planted:
            return self._store.get(name, offset, length)
        data = self._planted[name]
        if data is None:
            raise ObjectMissingError(f"no such object: {name}")
        start, stop = clip(len(data), offset, length)
        return data[start:stop]

    def size(self, name: str) -> int:
        return len(self.get(name)) if name in self._planted else self._store.size(name)

    def list(self, prefix: str) -> Iterator[str]:
        names = set(self._store.list(prefix))
        names |= {name for name in self._planted if name.startswith(prefix)}
        gone = {name for name, data in self._planted.items() if data is None}
        return iter(sorted(names - gone))

    def delete(self, name: str) -> None:
        self._store.delete(name)


def _half(chunks: Iterable[Buffer]) -> bytes:
    data = b"".join(chunks)
    return data[: len(data) // 2]


def _until_full(name: str, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    yield _half(chunks)
    raise RepositoryError(f"cannot write {name}: {os.strerror(28)}")


def _until_dead(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    yield _half(chunks)
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # the signal is on its way
