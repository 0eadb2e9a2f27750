"""The three changes of master keys, on a store that fails at the Nth object written or removed."""

from __future__ import annotations

import os
import signal

from dbmodule.errors import RepositoryError
from dbmodule.ports import ObjectStore
from dbmodule.repository.keys import Keyring
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from tests.fault.fault_store import Fault, FaultStore

FIRST, SECOND, THIRD = (Secret(digit * 64) for digit in (b"1", b"2", b"3"))


class ChangeFaults(FaultStore):
    """`FaultStore` that counts what is removed as well."""

    def delete(self, name: str) -> None:
        with self._lock:
            self.writes.append(name)
            strikes = len(self.writes) == self._at
        if strikes and self._fault is Fault.KILL_BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        if strikes and self._fault is Fault.BEFORE:
            raise RepositoryError(f"cannot remove {name}: the wire was cut")
        self._store.delete(name)
        if strikes and self._fault in (Fault.KILL_WITHIN, Fault.KILL_AFTER):
            os.kill(os.getpid(), signal.SIGKILL)
        if strikes:
            raise RepositoryError(f"cannot remove {name}: no answer")


def keyring(store: ObjectStore, secret: Secret = FIRST) -> Keyring:
    vault = Repository.open(store, secret).vault
    assert vault is not None
    return vault.keyring


def change(store: ObjectStore, what: str) -> None:
    """``add`` the second key, ``rotate`` from the first to the third, or ``revoke`` the second."""
    keys = keyring(store)
    if what == "add":
        keys.add(SECOND, "the second")
    elif what == "rotate":
        keys.rotate(THIRD, "the third")
    else:
        keys.revoke(next(key.key_id for key in keys.listed() if not key.current))
