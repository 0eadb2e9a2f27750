"""One expiry in a process of its own, which is killed at its Nth step: see `fault_store`.

Arguments: repository directory, N, kind of fault, what the names begin with that count, and the
backups that are to go.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dbmodule.ident import BackupId
from dbmodule.storage import LocalStore
from tests.fault.fault_store import Fault, FaultStore
from tests.fault.mini import run_expire


def main() -> None:
    repository, at, fault, only, *going = sys.argv[1:]
    inner = LocalStore(Path(repository))
    store = FaultStore(inner, int(at), Fault(fault), only=only, removals=True)
    run_expire(store, map(BackupId, going))


if __name__ == "__main__":
    main()
