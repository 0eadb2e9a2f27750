"""Many small relations: ``python -m tests.bench.small_files --tables 50000``.

A real server with so many tables of one to ten pages; then a full, a differential after changes
to every hundredth of them, a second full, and a restore: seconds, also of this process's CPU time,
files, objects in the repository, and the most memory that the process had by then. `--profile`
tells where the time of each went.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbmodule.app import App
from dbmodule.config import BackupSection, Config, RepositorySection, ServerSection
from dbmodule.ident import BackupType
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.reports import BackupOptions, RestoreOptions
from tests.fix_cluster import Clusters

SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "summarize_wal": "on",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "shared_buffers": "512MB",
    "max_locks_per_transaction": "1000",
}
PER_TRANSACTION = 1000


COLUMNS = ", ".join(f"md5((i * {at} + n)::text)::name AS c{at}" for at in range(12))
"""Of a type that needs no TOAST table: so a table is one file. Ten rows fill a page."""


def make_tables(cluster: LocalCluster, tables: int) -> None:
    """Tables ``t0`` …, the nth of n mod 10 + 1 pages."""
    for first in range(0, tables, PER_TRANSACTION):
        last = min(first + PER_TRANSACTION, tables) - 1
        cluster.execute(
            f"DO $$ BEGIN FOR n IN {first}..{last} LOOP EXECUTE format("
            f"'CREATE TABLE t%s AS SELECT i AS id, {COLUMNS} FROM generate_series(1, %s) AS i,"
            " (VALUES (%s)) AS v (n)', n, n % 10 * 9 + 5, n); END LOOP; END $$"
        )


def change(cluster: LocalCluster, tables: int) -> None:
    """A row in every hundredth table."""
    cluster.execute(
        f"DO $$ BEGIN FOR n IN 0..{tables - 1} BY 100 LOOP"
        " EXECUTE format('UPDATE t%s SET id = -id WHERE id = 1', n); END LOOP; END $$"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=50_000)
    parser.add_argument("--cluster", type=Path, help="keep the data directory here, or use it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dbm-bench-", dir="/tmp") as directory:
        root = Path(directory)
        root.chmod(0o755)
        clusters = Clusters(root)
        kept = options.cluster
        if kept is not None and (kept / "PG_VERSION").exists():
            cluster = clusters.at(kept, 18)
            cluster.start()
        else:
            cluster = clusters.make(18, settings=SETTINGS)
            if kept is not None:
                shutil.copytree(cluster.datadir, kept)
                shutil.copystat(cluster.datadir, kept)
                for path in (kept, *kept.rglob("*")):
                    shutil.chown(path, cluster.datadir.owner(), cluster.datadir.group())
                cluster = clusters.at(kept, 18)
            cluster.start()
            make_tables(cluster, options.tables)
        cluster.execute("CHECKPOINT")
        time.sleep(2.5)
        try:
            measure(cluster, clusters.directory(), options)
        finally:
            cluster.stop("fast")


def measure(cluster: LocalCluster, base: Path, options: argparse.Namespace) -> None:
    repository = base / "repository"
    app = App.open(
        Config(
            server=ServerSection(dsn=cluster.dsn("postgres"), pgdata=cluster.datadir),
            repository=RepositorySection(url=str(repository)),
            backup=BackupSection(threads=options.threads),
        )
    )
    app.init(config_path=base / "dbmodule.toml", extension=True)

    def step(name: str, action: Callable[[], Any]) -> None:
        profiler = cProfile.Profile()
        began, worked = time.monotonic(), time.process_time()
        result = profiler.runcall(action) if options.profile else action()
        seconds, worked = time.monotonic() - began, time.process_time() - worked
        if options.profile:
            sys.stderr.write(f"== {name}\n")
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        figures = {
            "what": name,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(worked, 2),
            "files": getattr(result, "files_total", getattr(result, "files", None)),
            "phases": getattr(result, "phases", None),
            "bytes_stored": getattr(result, "bytes_stored", None),
            "objects": sum(1 for path in repository.rglob("*") if path.is_file()),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()

    step("full", lambda: app.backup(BackupOptions(BackupType.FULL)))
    change(cluster, options.tables)
    cluster.execute("CHECKPOINT")
    step("diff", lambda: app.backup(BackupOptions(BackupType.DIFF)))
    step("diff by scan", lambda: app.backup(BackupOptions(BackupType.DIFF, detect="scan")))
    step("second full", lambda: app.backup(BackupOptions(BackupType.FULL)))
    step("list", app.backups)
    step("restore", lambda: app.restore(RestoreOptions(base / "restored", "latest", {})))


if __name__ == "__main__":
    main()
