"""What each detector reads, by how much of a database changed: ``python -m tests.bench.detectors``.

One pgbench database and one full; then, for each share of the pages of ``pgbench_accounts``, one
row in each of these pages is updated, and a differential is taken with every detector. The shares
add up, so what counts is ``pages_changed`` in each row, not the share asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from dbmodule.app import App
from dbmodule.ident import BackupType
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.reports import BackupOptions
from tests.bench.site import BenchSite, bench_site

SHARES = (0.0, 0.001, 0.01, 0.1)
SETTINGS = {"summarize_wal": "on", "max_wal_size": "8GB", "shared_buffers": "256MB"}
FIELDS = ("pages_total", "pages_changed", "pages_stored", "bytes_read", "bytes_stored")


def change(cluster: LocalCluster, share: float) -> None:
    """Update one row in every nth page, and let the server write it."""
    if share:
        every = round(1 / share)
        cluster.execute(
            "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE ctid = ANY (ARRAY("
            "SELECT format('(%s,1)', b)::tid FROM generate_series(0,"
            " pg_relation_size('pgbench_accounts') / 8192 - 1,"
            f" {every}) AS b))"
        )
    cluster.execute("CHECKPOINT")
    # Identities are taken only of files that have been at rest for two seconds.
    time.sleep(2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=100)
    parser.add_argument("--pg", type=int, default=18)
    parser.add_argument("--scratch", default="/tmp")
    options = parser.parse_args()
    with bench_site(options.scratch, options.pg, options.scale, SETTINGS) as site:
        site.cluster.execute("VACUUM FREEZE")
        measure(site)


def measure(site: BenchSite) -> None:
    change(site.cluster, 0)
    report("full", site.app, BackupOptions(BackupType.FULL))
    for share in SHARES:
        change(site.cluster, share)
        for detect in ("wal", "scan", "content"):
            options = BackupOptions(BackupType.DIFF, detect=detect)
            report(f"{share:.1%} {detect}", site.app, options)


def report(name: str, app: App, options: BackupOptions) -> None:
    made = app.backup(options)
    figures = {field: getattr(made, field) for field in FIELDS}
    sys.stdout.write(
        json.dumps({"what": name, "detector": made.detector, "seconds": made.seconds, **figures})
        + "\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
