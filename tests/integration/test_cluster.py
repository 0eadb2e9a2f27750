"""Servers of our own start, stop, crash and recover, for root and for an ordinary user."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dbmodule.errors import ServerError, UsageError
from dbmodule.postgres.cluster import LocalCluster, find_binaries, reachable_binaries, server_major
from tests.fix_cluster import ClusterFactory, Clusters, Database


def test_a_server_starts_answers_and_stops(own_cluster: LocalCluster, pg_major: int) -> None:
    assert own_cluster.major == pg_major
    assert own_cluster.is_running()
    assert own_cluster.scalar("SHOW server_version_num").startswith(str(pg_major))
    assert own_cluster.scalar("SHOW listen_addresses") == ""
    pid = own_cluster.pid
    assert pid is not None
    own_cluster.stop()
    assert not own_cluster.is_running()
    assert own_cluster.pid is None
    assert not (own_cluster.datadir / "postmaster.pid").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    own_cluster.stop()


def test_checksums_are_as_asked(make_cluster: ClusterFactory, pg_major: int) -> None:
    for asked, shown in ((True, "on"), (False, "off")):
        cluster = make_cluster(pg_major, checksums=asked)
        assert cluster.scalar("SHOW data_checksums") == shown


def test_a_killed_server_is_gone_and_recovers_what_was_committed(
    own_cluster: LocalCluster,
) -> None:
    own_cluster.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
    with own_cluster.connect() as session:
        backend = session.info.backend_pid
        handle = os.pidfd_open(backend)
        try:
            own_cluster.kill()
            ended, _, _ = select.select([handle], [], [], 0)
        finally:
            os.close(handle)
    assert ended, "a backend outlived the kill"
    assert not own_cluster.is_running()
    assert (own_cluster.datadir / "postmaster.pid").exists(), "this was no crash"
    own_cluster.start()
    assert "not properly shut down" in own_cluster.log_tail()
    assert own_cluster.scalar("SELECT count(*) FROM t") == 1000


def test_a_restart_keeps_the_options_and_start_again_is_refused(
    make_cluster: ClusterFactory, pg_major: int
) -> None:
    cluster = make_cluster(pg_major, start=False)
    cluster.configure({"work_mem": "1MB", "cluster_name": r"it's a \ test"})
    cluster.start({"work_mem": "7MB"})
    assert cluster.scalar("SHOW cluster_name") == r"it's a \ test"
    with pytest.raises(ServerError, match="runs already"):
        cluster.start()
    cluster.restart("immediate")
    assert cluster.scalar("SHOW work_mem") == "7MB"


def test_a_failed_start_shows_the_log(make_cluster: ClusterFactory, pg_major: int) -> None:
    cluster = make_cluster(pg_major, start=False)
    with pytest.raises(ServerError, match="no_such_setting"):
        cluster.start({"no_such_setting": "1"})
    assert not cluster.is_running()
    cluster.start()


def test_a_server_that_is_not_ready_in_time_is_ended(
    make_cluster: ClusterFactory, pg_major: int
) -> None:
    cluster = make_cluster(pg_major, start=False)
    cluster.start(wait=False)
    pid = cluster.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ServerError, match="not ready within"):
        cluster.wait_ready(timeout=0)
    assert not cluster.is_running()


def test_programs_reach_the_server(own_cluster: LocalCluster) -> None:
    own_cluster.run("pgbench", "-i", "-q", "-s", "1", "postgres")
    load = own_cluster.spawn("pgbench", "-n", "-t", "20", "-c", "2", "postgres")
    output, _ = load.communicate(timeout=60)
    assert load.returncode == 0, output
    assert own_cluster.scalar("SELECT count(*) FROM pgbench_history") == 40
    with pytest.raises(ServerError, match="no_such_table"):
        own_cluster.run("psql", "-XAtw", "-c", "SELECT * FROM no_such_table", "postgres")


def test_each_test_has_a_database_of_its_own(database: Database) -> None:
    assert database.scalar("SELECT current_database()") == database.name
    database.execute("CREATE TABLE only_here (n int)")
    with pytest.raises(ServerError, match="only_here"):
        database.cluster.query("SELECT * FROM only_here")


def test_a_fresh_cluster_has_an_identity_of_its_own(
    make_cluster: ClusterFactory, pg_major: int
) -> None:
    sql = "SELECT system_identifier FROM pg_control_system()"
    copies = {make_cluster(pg_major).scalar(sql) for _ in range(2)}
    assert len(copies) == 1
    assert make_cluster(pg_major, fresh=True).scalar(sql) not in copies


def test_a_socket_path_over_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        LocalCluster(tmp_path, tmp_path / "data", tmp_path / ("x" * 100))


def test_a_directory_without_a_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=str(tmp_path)):
        server_major(tmp_path)
    assert find_binaries(7) is None


def test_binaries_that_the_account_cannot_reach_are_copied(
    clusters: Clusters, scratch: Path, pg_major: int
) -> None:
    clusters.bindir(pg_major)
    bindir = find_binaries(pg_major)
    assert bindir is not None
    if os.geteuid() != 0:
        # An ordinary user runs servers under its own account, which has just run this one.
        assert reachable_binaries(bindir, clusters.os_user, scratch) == bindir
        return
    # A private home with an environment in it, laid out as the installed one is.
    home = scratch / "home"
    install = bindir.parent
    private = home / "site" / install.parent.name / install.name
    shutil.copytree(install, private, symlinks=True)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, home / "site" / libraries.name, symlinks=True)
    home.chmod(0o700)
    os.chown(home, 0, 0)

    copied = reachable_binaries(private / "bin", clusters.os_user, scratch)

    assert copied != private / "bin"
    assert reachable_binaries(private / "bin", clusters.os_user, scratch) == copied
    directory = clusters.directory()
    with LocalCluster(copied, directory / "data", directory / "s") as cluster:
        cluster.init(extra_args=["--no-sync"])
        cluster.start()
        assert cluster.major == pg_major


_AS_ORDINARY_USER = """
import os
import pwd
import sys
from pathlib import Path

from dbmodule.postgres.cluster import LocalCluster

bindir, directory, os_user = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if os.geteuid() == 0:
    # Only now: that account may be unable to enter the directories this was imported from.
    account = pwd.getpwnam(os_user)
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
with LocalCluster(bindir, directory / "data", directory / "s") as cluster:
    cluster.init(extra_args=["--no-sync"])
    cluster.start()
    cluster.kill()
    cluster.start()
    print(os.geteuid() != 0, cluster.os_user, cluster.scalar("SELECT 1"))
"""


def test_an_ordinary_user_needs_no_root(clusters: Clusters, scratch: Path, pg_major: int) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            _AS_ORDINARY_USER,
            clusters.bindir(pg_major),
            scratch,
            clusters.os_user,
        ],
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"True {clusters.os_user} 1\n", result.stderr
