"""One change of master keys in a process of its own, which is killed at its Nth change.

Arguments: repository directory, what to do, N, kind of fault; the keys are those of `test_keys`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dbmodule.storage import LocalStore
from tests.fault.fault_store import Fault
from tests.fault.key_changes import ChangeFaults, change


def main() -> None:
    repository, what, at, fault = sys.argv[1:]
    change(ChangeFaults(LocalStore(Path(repository)), int(at), Fault(fault)), what)


if __name__ == "__main__":
    main()
