"""A soak: backups under pgbench and random DDL, each restored and judged by every oracle.

Not part of the tests: ``make soak MINUTES=20`` runs it, with ``SEED`` and ``PG`` if wanted, and
prints what it did. One failure ends it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from dbmodule.errors import ServerError
from dbmodule.ident import BackupType
from dbmodule.reports import BackupReport
from tests import ddl, oracles
from tests.fix_backup import COPY_OPTIONS, Site, SiteFactory

MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
MAJOR = int(os.environ.get("SOAK_PG", "18"))


@contextmanager
def load(site: Site, seed: int, counts: Counter[str]) -> Iterator[None]:
    """pgbench and random statements for as long as the context is open."""
    stop = threading.Event()
    rng = random.Random(seed)

    def change() -> None:
        while not stop.is_set():
            counts["statements"] += ddl.run_at_random(site.cluster, rng, 5)

    bench = site.cluster.spawn(
        "pgbench", "--no-vacuum", "--client=2", "--rate=400", "--time=3600", "postgres"
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(change)
        try:
            yield
        finally:
            stop.set()
            running.result()
            bench.terminate()
            output, _ = bench.communicate(timeout=30)
    assert "ERROR" not in output, output


def back_up(site: Site, rng: random.Random, counts: Counter[str]) -> BackupReport:
    kind = rng.choices([BackupType.FULL, BackupType.DIFF, BackupType.INCR], [1, 3, 5])[0]
    detect = rng.choices(["auto", "scan", "content"], [6, 2, 2])[0]
    while True:
        try:
            report = site.backup(kind, detect=detect)
        except ServerError as error:
            # The one thing in this load that a backup must not survive.
            assert "was moved out of tablespace" in error.message, error
            counts["backups refused: a database moved"] += 1
            continue
        counts[f"{kind} by {report.detector}"] += 1
        counts["pages stored"] += report.pages_stored
        counts["divergent pages"] += report.divergent_pages
        assert (report.status, report.corrupt_pages) == ("completed", 0), report
        return report


def judge(site: Site, report: BackupReport, expected: object, counts: Counter[str]) -> None:
    """Restore a backup; `expected` are the source's digests where nothing changed since."""
    copy = site.copy_at(site.restore(report.backup_id))
    assert oracles.pg_verifybackup(site.cluster, copy.datadir) == []
    copy.start(COPY_OPTIONS)
    copy.wait_recovered()
    sums = copy.query(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts),"
        " (SELECT sum(tbalance) FROM pgbench_tellers),"
        " (SELECT sum(bbalance) FROM pgbench_branches),"
        " (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
    )[0]
    assert len(set(sums)) == 1, sums
    assert copy.scalar("SELECT max(id) FROM noted") >= counts["noted"] - 1
    if expected is not None:
        assert oracles.digests(copy) == expected
        counts["restores equal in every table"] += 1
    # What was prepared holds locks that the checks would wait for.
    for (gid,) in copy.query("SELECT gid FROM pg_prepared_xacts"):
        copy.execute(f"ROLLBACK PREPARED '{gid}'")
    wrong = oracles.server_oracle(copy)
    assert wrong == [], wrong
    counts["restores judged"] += 1
    shutil.rmtree(copy.datadir)


def test_soak(make_site: SiteFactory, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(SEED)
    settings = ddl.SETTINGS | {"max_wal_size": "256MB"}
    if MAJOR >= 17:
        settings["summarize_wal"] = "on"
    site = make_site(MAJOR, settings=settings)
    site.cluster.run("pgbench", "--initialize", "--quiet", "--scale=5", "postgres")
    site.cluster.execute("CREATE TABLE noted (id int PRIMARY KEY)")
    ddl.prepare(site.cluster)
    site.full()
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * MINUTES
    while time.monotonic() < until:
        counts["rounds"] += 1
        with load(site, rng.randrange(1 << 30), counts):
            for _ in range(rng.randint(1, 2)):
                site.cluster.execute(f"INSERT INTO noted VALUES ({counts['noted']})")
                counts["noted"] += 1
                judge(site, back_up(site, rng, counts), None, counts)
        report = back_up(site, rng, counts)
        judge(site, report, oracles.digests(site.cluster), counts)
        if counts["rounds"] % 5 == 0:
            offline(site, rng, counts)
            assert site.app.verify(None).status == "sound"
        with capfd.disabled():
            sys.stdout.write(json.dumps({"seed": SEED, "postgres": MAJOR, **counts}) + "\n")


def offline(site: Site, rng: random.Random, counts: Counter[str]) -> None:
    """The byte oracle: a cleanly stopped cluster, block by block."""
    site.cluster.stop("fast")
    detect = rng.choice(["scan", "content", "auto"])
    report = site.incr(offline=True, detect=detect)
    restored = site.restore(report.backup_id)
    assert oracles.byte_oracle(restored, site.cluster.datadir) == []
    counts[f"byte oracle by {report.detector}"] += 1
    shutil.rmtree(restored)
    site.cluster.start()
