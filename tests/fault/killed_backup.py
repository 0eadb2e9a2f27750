"""One backup in a process of its own, which is killed at its Nth write: see `fault_store`.

Arguments: repository directory, data directory, backup type, N, kind of fault, bytes of a pack, and
what the names begin with that count.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dbmodule.ident import BackupType
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import LocalStore
from tests.fault.fault_store import Fault, FaultStore
from tests.fault.mini import back_up


def main() -> None:
    repository, root, kind, at, fault, pack_bytes, only = sys.argv[1:]
    FrameWriter.PACK_BYTES = int(pack_bytes)
    store = FaultStore(LocalStore(Path(repository)), int(at), Fault(fault), only=only)
    back_up(store, Path(root), BackupType(kind))


if __name__ == "__main__":
    main()
