"""Clusters that went another way than the baseline: rewound, promoted, seen from two hosts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.errors import NotAnAncestorError, SourceError
from dbmodule.ident import BackupId, BackupType
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.reports import BackupOptions, BackupReport
from tests import ddl, oracles
from tests.fix_backup import Site, SiteFactory
from tests.integration.test_agent import eventually

QUIET = {"autovacuum": "off", "wal_keep_size": "256MB"}


def settings(major: int, **more: str) -> dict[str, str]:
    return QUIET | ({"summarize_wal": "on"} if major >= 17 else {}) | more


def standby_of(site: Site) -> LocalCluster:
    """A server that follows the site's, started; it is removed with the site."""
    directory = site.clusters.directory() / "data"
    site.cluster.run(
        "pg_basebackup",
        "--pgdata",
        str(directory),
        "--dbname",
        site.cluster.dsn(),
        "--write-recovery-conf",
        "--checkpoint=fast",
        "--no-sync",
    )
    standby = site.copy_at(directory)
    standby.start()
    return standby


def await_replay(site: Site, standby: LocalCluster) -> None:
    reached = site.cluster.scalar("SELECT pg_current_wal_lsn()::text")
    replayed = f"SELECT pg_last_wal_replay_lsn() >= '{reached}'"
    eventually(lambda: bool(standby.scalar(replayed)))


def promote(standby: LocalCluster) -> None:
    standby.execute("SELECT pg_promote()")
    standby.wait_recovered()
    standby.execute("CHECKPOINT")


def app_of(site: Site, cluster: LocalCluster) -> App:
    return site.app_with(dsn=cluster.dsn(), pgdata=cluster.datadir)


def take(
    app: App, kind: BackupType, baseline: str | None = None, detect: str = "auto"
) -> BackupReport:
    pinned = None if baseline is None else BackupId(baseline)
    return app.backup(BackupOptions(kind, baseline_id=pinned, detect=detect))


def judge(site: Site, source: LocalCluster, report: BackupReport) -> None:
    """What `report` restores is what `source` holds, and sound."""
    copy = site.start_copy(report.backup_id)
    assert oracles.digests(copy) == oracles.digests(source)
    assert oracles.server_oracle(copy) == []
    copy.stop()


def test_a_rewound_server_builds_on_what_both_ways_share(
    make_site: SiteFactory, pg_major: int
) -> None:
    """pg_rewind puts back pages with older LSNs, under a baseline's that went the other way.

    Pages of the branch that was given up are newer than the full before it, and older than what
    follows: only where they were read again is the differential right.
    """
    site = make_site(pg_major, settings=settings(pg_major))
    ddl.table(site.cluster, "t")
    ddl.table(site.cluster, "left_alone")
    before = site.full()
    standby = standby_of(site)
    await_replay(site, standby)
    promote(standby)
    # Both go on, over the same pages and others.
    site.cluster.execute("UPDATE t SET filler = 'given up' WHERE i % 3 = 0")
    given_up = site.incr()
    standby.execute("UPDATE t SET filler = 'kept' WHERE i % 4 = 0")
    standby.execute("CREATE TABLE kept_too AS SELECT 1 AS i")
    expected = oracles.digests(standby)
    site.cluster.stop("fast")
    standby.stop("fast")
    own = [
        (site.cluster.datadir / name).read_bytes()
        for name in ("postgresql.conf", "postgresql.auto.conf")
    ]
    site.cluster.run(
        "pg_rewind",
        "--target-pgdata",
        str(site.cluster.datadir),
        "--source-pgdata",
        str(standby.datadir),
        "--no-sync",
    )
    for name, content in zip(("postgresql.conf", "postgresql.auto.conf"), own, strict=True):
        (site.cluster.datadir / name).write_bytes(content)
    site.cluster.start()
    site.cluster.wait_recovered()
    assert oracles.digests(site.cluster) == expected
    with pytest.raises(NotAnAncestorError, match="not in the history") as refusal:
        site.incr()
    assert refusal.value.exit_code == 4
    assert given_up.backup_id in refusal.value.message
    for detect in ("scan", "content"):
        diff = take(site.app, BackupType.DIFF, before.backup_id, detect)
        assert (diff.detector, diff.timeline) == (detect, 2)
        judge(site, site.cluster, diff)
    site.cluster.execute("UPDATE t SET filler = 'later' WHERE i = 5")
    judge(site, site.cluster, take(site.app, BackupType.INCR))


def test_a_promoted_standby_goes_on_from_its_primary_s_full(
    make_site: SiteFactory, pg_major: int
) -> None:
    """With summaries of both timelines, where the server writes them."""
    site = make_site(pg_major, settings=settings(pg_major))
    ddl.table(site.cluster, "t", rows=20_000)
    site.cluster.execute("VACUUM t")  # so that reading it leaves no hint bits
    standby = standby_of(site)
    full = site.full()
    site.cluster.execute("UPDATE t SET filler = 'before' WHERE i % 1000 = 0")
    await_replay(site, standby)
    site.cluster.stop("fast")
    promote(standby)
    standby.execute("UPDATE t SET filler = 'after' WHERE i % 999 = 0")
    app = app_of(site, standby)
    for kind, detect in ((BackupType.DIFF, "auto"), (BackupType.DIFF, "scan")):
        report = take(app, kind, full.backup_id, detect)
        expected = "wal" if detect == "auto" and pg_major >= 17 else "scan"
        assert (report.detector, report.timeline) == (expected, 2)
        assert report.pages_changed < report.pages_total / 3
        assert (report.divergent_pages, report.corrupt_pages) == (0, 0)
        judge(site, standby, report)
    standby.execute("UPDATE t SET filler = 'again' WHERE i % 998 = 0")
    judge(site, standby, take(app, BackupType.INCR))


def test_hint_bits_of_the_other_host_are_no_alarm(make_site: SiteFactory, pg_major: int) -> None:
    """The first hint on a page is logged with its image, the others only where they were set.

    So primary and standby hold pages of one LSN that differ in hint bits, and in the checksum.
    """
    site = make_site(pg_major, settings=settings(pg_major))
    standby = standby_of(site)
    ddl.table(site.cluster, "t", rows=2000)
    site.cluster.execute("DELETE FROM t WHERE i % 2 = 0")
    site.cluster.execute("CHECKPOINT")
    site.cluster.execute("SELECT count(*) FROM t")
    site.cluster.execute("CHECKPOINT")
    full = site.full()
    await_replay(site, standby)
    site.cluster.stop("fast")
    promote(standby)
    app = app_of(site, standby)
    report = take(app, BackupType.DIFF, full.backup_id, "scan")
    assert report.detector == "scan"
    assert report.hint_pages >= 100
    assert (report.divergent_pages, report.corrupt_pages) == (0, 0)
    assert report.status == "completed"
    judge(site, standby, report)
    again = take(app, BackupType.INCR, detect="scan")
    assert (again.hint_pages, again.divergent_pages) == (0, 0)


@pytest.mark.parametrize("where", ["base", "a database", "a file", "global"])
def test_links_that_postgresql_does_not_make_are_refused(
    make_site: SiteFactory, pg_major: int, where: str
) -> None:
    """What lies behind such a link would be missing from the backup."""
    site = make_site(pg_major, settings=QUIET)
    ddl.table(site.cluster, "t")
    file: str = site.cluster.scalar("SELECT pg_relation_filepath('t')")
    name = {
        "base": "base",
        "a database": str(Path(file).parent),
        "a file": file,
        "global": "global",
    }[where]
    site.cluster.stop("fast")
    moved = site.clusters.directory() / "moved"
    path = site.cluster.datadir / name
    shutil.move(path, moved)
    path.symlink_to(moved)
    site.cluster.start()
    with pytest.raises(SourceError, match="symbolic link") as refusal:
        site.full()
    assert str(path) in refusal.value.message
    assert refusal.value.exit_code == 6
    assert site.app.backups() == []
    os.unlink(path)
    site.cluster.stop("fast")
    shutil.move(moved, path)
    site.cluster.start()
    site.full()
