"""Make the frozen repositories of a format: ``python -m tests.formats.freeze VERSION``.

To be run once, when a format is released: what it writes beside this file is read by every later
version (`test_formats.py`), and never made anew. Each is a tar file with the objects of a
repository and ``expected.json``, which says what each of its backups restores to.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

from dbmodule.ident import BackupId, BackupType
from dbmodule.ports import ObjectStore
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import MemoryStore
from tests.fault import mini
from tests.fix_cluster import Clusters

HERE = Path(__file__).parent
EXPECTED = "expected.json"


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def make(source: Path, root: Path, secret: Secret | None) -> tuple[ObjectStore, dict[str, object]]:
    """A full that has expired, one that stays, and a chain on it; packs are small and many."""
    store = MemoryStore()
    mini.make_mini(source, root)
    Repository.create(store, secret)
    known: dict[BackupId, dict[str, str]] = {}
    kinds = (BackupType.FULL, BackupType.FULL, BackupType.DIFF, BackupType.INCR, BackupType.INCR)
    for step, kind in enumerate(kinds, 1):
        manifest = mini.back_up(store, root, kind)
        known[manifest.backup_id] = digests(mini.contents(root))
        mini.change_state(root, step)
    # Twice: what is condemned by one call is removed, and rewritten, by another.
    for _ in range(3):
        mini.run_expire(store, [next(iter(known))])
    known.pop(next(iter(known)))
    return store, {"backups": known, "encrypted": secret is not None}


def write(path: Path, store: ObjectStore, expected: dict[str, object]) -> None:
    with tarfile.open(path, "x:xz") as archive:
        files = {name: store.get(name) for name in store.list("")}
        files[EXPECTED] = json.dumps(expected, indent=1).encode()
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def main() -> None:
    (version,) = sys.argv[1:]
    FrameWriter.PACK_BYTES = 24 << 10
    with tempfile.TemporaryDirectory(prefix="dbm-freeze-") as directory:
        base = Path(directory)
        base.chmod(0o755)
        clusters = Clusters(base)
        cluster = clusters.at(clusters.directory() / "data", 18)
        cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
        for name, secret in (("plain", None), ("encrypted", mini.SECRET)):
            store, expected = make(cluster.datadir, base / name, secret)
            write(HERE / f"{version}-{name}.tar.xz", store, expected)


if __name__ == "__main__":
    main()
