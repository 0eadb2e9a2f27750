"""Bytes that a history of backups takes, beside restic's: ``python -m tests.bench.stored``.

One pgbench database. After each step the server is stopped, so that both tools store the very same
files: ours offline, restic (of Debian's package, which must be installed) its directory without
WAL. Then both take the unchanged directory in full once more. ``reported`` is what ours says that
the backup stored; the others are what the repository grew by on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dbmodule.ident import BackupType
from dbmodule.reports import BackupOptions
from tests.bench.site import BenchSite, bench_site

STEPS = ("full", "diff 1", "diff 2", "diff 3", "diff 4", "diff 5", "full again")


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


class Restic:
    """A restic repository of its own, with the compression that restic chooses by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = shutil.which("restic")
        if found is None:
            raise SystemExit("restic is not installed: apt-get install restic")
        self._command = [found, "--quiet", f"--repo={path}", f"--cache-dir={path}.cache"]
        self._environment = {**os.environ, "RESTIC_PASSWORD": secrets.token_hex(16)}
        self._run("init")

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._command, *arguments], env=self._environment, check=True)

    def backup(self, directory: Path, *, force: bool) -> None:
        self._run("backup", *(["--force"] if force else []), "--exclude=pg_wal", str(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=100)
    parser.add_argument("--transactions", type=int, default=2000)
    parser.add_argument("--pg", type=int, default=18)
    parser.add_argument("--scratch", default="/tmp")
    options = parser.parse_args()
    settings = {"max_wal_size": "4GB"}
    with bench_site(options.scratch, options.pg, options.scale, settings) as site:
        measure(site, options.transactions)


def measure(site: BenchSite, transactions: int) -> None:
    cluster, ours, theirs = site.cluster, site.repository, Restic(site.base / "restic")
    for step in STEPS:
        if step.startswith("diff"):
            cluster.run("pgbench", "--no-vacuum", f"--transactions={transactions}", "postgres")
        cluster.stop("fast")
        kind = BackupType.FULL if step.startswith("full") else BackupType.DIFF
        row: dict[str, object] = {"what": step}
        before, began = size(ours), time.monotonic()
        made = site.app.backup(BackupOptions(kind, offline=True))
        row |= {"seconds": round(time.monotonic() - began, 2), "bytes": size(ours) - before}
        row |= {"reported": made.bytes_stored, "pages_changed": made.pages_changed}
        before, began = size(theirs.path), time.monotonic()
        theirs.backup(cluster.datadir, force=kind is BackupType.FULL)
        row |= {
            "restic_seconds": round(time.monotonic() - began, 2),
            "restic_bytes": size(theirs.path) - before,
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        cluster.start()


if __name__ == "__main__":
    main()
