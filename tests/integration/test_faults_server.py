"""Backups whose server, session or user goes away in the middle, or that meet another backup."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.config import BackupSection, Config, RepositorySection, ServerSection
from dbmodule.errors import CancelledError, DbmoduleError, LockedError, WrongClusterError
from dbmodule.ident import BackupType
from dbmodule.ports import Progress
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.postgres.server import BACKUP_LOCK
from dbmodule.reports import BackupOptions
from tests.fix_backup import Site, SiteFactory

SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'dbmodule backup'"
OPTIONS = BackupOptions(BackupType.FULL)


@pytest.fixture
def site(make_site: SiteFactory, pg_major: int) -> Site:
    site = make_site(pg_major)
    site.full()
    return site


@pytest.fixture
def one_site(make_site: SiteFactory) -> Site:
    site = make_site(18, extension=False)
    site.full()
    return site


def full_with(site: Site, wanted: str, fault: Callable[[], None]) -> None:
    """A full backup; `fault` happens once, when it tells of that phase for the first time."""
    happened: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == wanted and not happened:
            happened.append(phase)
            fault()

    site.app.backup(OPTIONS, progress=progress)


def assert_clean(site: Site, before: list[str], detect: str = "auto") -> None:
    """Nothing of the failed backup is left, and the next one works."""
    assert [b.backup_id for b in site.app.backups()] == before
    assert site.cluster.query("SELECT slot_name FROM pg_replication_slots") == []
    assert site.cluster.query(SESSIONS) == []
    report = site.incr(detect=detect)
    assert report.status == "completed"
    assert [b.backup_id for b in site.app.backups()] == [*before, report.backup_id]
    assert site.app.verify(None).status == "sound"


def end_session(cluster: LocalCluster) -> None:
    ended = cluster.scalar(f"SELECT bool_and(pg_terminate_backend(pid, 10000)) FROM ({SESSIONS}) s")
    assert ended is True


def test_lost_session_fails_the_backup(site: Site) -> None:
    before = [b.backup_id for b in site.app.backups()]
    for phase in ("checkpoint", "copy", "stop"):
        with pytest.raises(DbmoduleError) as caught:
            full_with(site, phase, lambda: end_session(site.cluster))
        assert (caught.value.exit_code, caught.value.code) == (6, "server"), phase
        assert [b.backup_id for b in site.app.backups()] == before
    assert_clean(site, before)


def test_dead_server_fails_the_backup(site: Site) -> None:
    before = [b.backup_id for b in site.app.backups()]

    def stop_at_once() -> None:
        site.cluster.stop("immediate")

    def start_anew() -> None:
        site.cluster.restart("immediate")

    for fault in (stop_at_once, site.cluster.kill, start_anew):
        with pytest.raises(DbmoduleError) as caught:
            full_with(site, "copy", fault)
        assert (caught.value.exit_code, caught.value.code) == (6, "server")
        if not site.cluster.is_running():
            site.cluster.start()
        assert [b.backup_id for b in site.app.backups()] == before
    assert_clean(site, before)


def test_cancelled_backup_leaves_nothing(one_site: Site) -> None:
    before = [b.backup_id for b in one_site.app.backups()]
    for wanted in ("copy", "commit"):
        cancelled = threading.Event()
        with pytest.raises(CancelledError) as caught:
            one_site.app.backup(
                OPTIONS, progress=setting(cancelled, wanted), cancelled=cancelled.is_set
            )
        assert caught.value.exit_code == 130
        assert [b.backup_id for b in one_site.app.backups()] == before
    assert_clean(one_site, before, detect="content")


def setting(event: threading.Event, wanted: str) -> Progress:
    """Sets the event when a phase begins."""

    def progress(phase: str, done: int, total: int) -> None:
        if phase == wanted:
            event.set()

    return progress


def test_second_backup_at_once_is_locked_out(one_site: Site) -> None:
    met: list[DbmoduleError] = []

    def second() -> None:
        with pytest.raises(LockedError) as caught:
            one_site.full()
        met.append(caught.value)

    full_with(one_site, "copy", second)
    assert [error.exit_code for error in met] == [7]
    assert len(one_site.app.backups()) == 2


def test_a_lock_that_outlives_its_client_for_a_moment_is_waited_for(one_site: Site) -> None:
    """A backend notices late that its client left. Seen to fail when asked for only once."""
    with one_site.cluster.connect() as holder:
        holder.execute("SELECT pg_advisory_lock(%s, %s)", BACKUP_LOCK)
        leaving = threading.Timer(0.5, holder.close)
        leaving.start()
        assert one_site.full().status == "completed"
        leaving.join()


def app_for(site: Site, cluster: LocalCluster, pgdata: Path) -> App:
    """The library set up for another server or directory, and the repository of `site`."""
    return App.open(
        Config(
            server=ServerSection(dsn=cluster.dsn(), pgdata=pgdata),
            repository=RepositorySection(url=str(site.repository_path)),
            backup=BackupSection(threads=2),
        )
    )


def test_other_cluster_under_the_same_name_is_refused(
    make_site: SiteFactory, make_cluster: Callable[..., LocalCluster]
) -> None:
    site = make_site(18, extension=False)
    site.full()
    other = make_cluster(18, fresh=True)
    for kind in BackupType:
        with pytest.raises(WrongClusterError) as caught:
            app_for(site, other, other.datadir).backup(BackupOptions(kind))
        assert caught.value.exit_code == 4
    assert len(site.app.backups()) == 1


def test_directory_of_another_server_is_refused(
    make_site: SiteFactory, make_cluster: Callable[..., LocalCluster]
) -> None:
    """Clusters of the tests share their system identifier, as a server and its copy do."""
    site = make_site(18, extension=False)
    site.full()
    other = make_cluster(18)
    stopped = make_cluster(18, start=False)
    twin = site.clusters.directory() / "twin"
    subprocess.run(["cp", "-a", site.cluster.datadir, twin], check=True)
    assert (twin / "postmaster.pid").exists()
    for directory in (other.datadir, stopped.datadir, twin):
        with pytest.raises(WrongClusterError) as caught:
            app_for(site, site.cluster, directory).backup(OPTIONS)
        assert caught.value.exit_code == 4
    shutil.rmtree(twin)
    assert len(site.app.backups()) == 1
    assert site.cluster.query("SELECT slot_name FROM pg_replication_slots") == []
