"""The online protocol on servers as people set them up: odd settings, names and moments."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dbmodule import wal
from dbmodule.errors import DbmoduleError, ServerError, SourceError, WrongClusterError
from dbmodule.ident import BackupId, BackupType, parse_lsn
from dbmodule.reports import BackupOptions, BackupReport
from tests import oracles
from tests.fix_backup import Site, SiteFactory
from tests.fix_cluster import ClusterFactory
from tests.integration.test_agent import eventually

ODD = 'it\'s "odd" ☃ =\\ name'
QUOTED = '"' + ODD.replace('"', '""') + '"'


def backup_when(
    site: Site, wanted: str, act: Callable[[], object], kind: BackupType = BackupType.FULL
) -> BackupReport:
    """One backup that does `act` once, when the phase `wanted` begins."""
    waiting = [act]

    def progress(phase: str, done: int, total: int) -> None:
        if phase == wanted and waiting:
            waiting.pop()()

    return site.app.backup(BackupOptions(kind, label="the label"), progress=progress)


@pytest.fixture(scope="module")
def shared(make_module_site: SiteFactory, pg_major: int) -> Site:
    site = make_module_site(pg_major, settings={"autovacuum": "off"})
    site.cluster.execute("CREATE TABLE kept AS SELECT generate_series(1, 9000) AS i")
    return site


def test_wal_is_reserved_while_files_are_copied(shared: Site) -> None:
    """Seen to fail without the slot."""
    seen: list[list[tuple[object, ...]]] = []

    def look() -> None:
        seen.append(
            shared.cluster.query(
                "SELECT slot_name LIKE 'dbmodule_%', temporary, active, slot_type,"
                " restart_lsn IS NOT NULL FROM pg_replication_slots"
            )
        )
        seen.append(shared.cluster.query("SELECT position FROM dbmodule.lineage"))

    report = backup_when(shared, "copy", look)
    assert seen == [[(True, True, True, "physical", True)], [("start",)]]
    assert shared.cluster.query("SELECT FROM pg_replication_slots") == []
    marks = shared.cluster.query("SELECT position, backup_id FROM dbmodule.lineage ORDER BY 1")
    assert marks == [("start", report.backup_id), ("stop", report.backup_id)]


def test_the_manifest_says_what_the_server_said(shared: Site) -> None:
    elsewhere = shared.clusters.directory()
    shared.cluster.execute(f"CREATE TABLESPACE elsewhere LOCATION '{elsewhere}'")
    shared.cluster.execute("CHECKPOINT")
    oid = shared.cluster.scalar("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere'")
    report = backup_when(shared, "copy", lambda: shared.cluster.execute("SELECT pg_switch_wal()"))
    (manifest,) = (
        m for m in shared.repository().manifests("main").values() if m.backup_id == report.backup_id
    )
    assert report.label == "the label"
    lines = manifest.backup_label.splitlines()
    assert "LABEL: the label" in lines
    assert "BACKUP METHOD: streamed" in lines
    assert lines[0].startswith(f"START WAL LOCATION: {report.start_lsn} ")
    assert manifest.tablespace_map == f"{oid} {elsewhere}\n"
    assert manifest.tablespaces == {str(oid): str(elsewhere)}
    restored = shared.restore(report.backup_id, {str(elsewhere): shared.clusters.directory() / "x"})
    assert (restored / "backup_label").read_text() == manifest.backup_label
    assert not (restored / "tablespace_map").exists()
    names = wal.segments_between(
        manifest.timeline, manifest.start_lsn, manifest.stop_lsn, manifest.wal_segment_size
    )
    assert len(names) >= 2
    assert sorted(p.name for p in (restored / "pg_wal").iterdir() if p.is_file()) == names
    size = manifest.wal_segment_size
    assert report.wal_bytes == len(names) * size
    shared.cluster.execute("DROP TABLESPACE elsewhere")


def test_a_relation_that_turns_out_to_be_unlogged(shared: Site) -> None:
    """An index is filled before its init fork is made, and the listing may lie between the two.

    Seen to fail when such an index was restored: at its end, recovery makes every unlogged relation
    anew from its init fork, and stops at a file that is there.
    """
    shared.cluster.execute(
        "CREATE UNLOGGED TABLE brief AS SELECT 1 AS i;"
        " CREATE FUNCTION held(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock_shared(77); RETURN i; END'"
    )

    def waits() -> bool:
        found = shared.cluster.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool(found)

    with shared.cluster.connect() as holder, ThreadPoolExecutor() as pool:
        holder.execute("SELECT pg_advisory_lock(77)")
        built = pool.submit(shared.cluster.execute, "CREATE INDEX built ON brief (held(i))")
        eventually(waits)

        def finish() -> None:
            holder.execute("SELECT pg_advisory_unlock(77)")
            built.result()

        report = backup_when(shared, "copy", finish)
    path = shared.cluster.scalar("SELECT pg_relation_filepath('built')")
    manifest = shared.repository().manifests("main")[BackupId(report.backup_id)]
    assert manifest.late_unlogged == (path,)
    copy = shared.start_copy(report.backup_id)
    assert copy.query("SELECT count(*) FROM brief") == [(0,)]
    copy.execute("INSERT INTO brief SELECT generate_series(1, 1000)")
    assert copy.query("SELECT i FROM brief WHERE held(i) = 7") == [(7,)]
    copy.stop()
    diff = shared.diff()
    assert path not in shared.repository().manifests("main")[BackupId(diff.backup_id)].late_unlogged
    shared.start_copy(diff.backup_id).stop()
    shared.cluster.execute("DROP TABLE brief")


def test_timeouts_of_the_role_do_not_end_a_backup(shared: Site) -> None:
    """A spread checkpoint outlasts ``statement_timeout``, the copying the idle timeouts.

    Seen to fail without the resetting of the session's timeouts.
    """
    limit = 400
    names = ["statement_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"]
    names += ["transaction_timeout"] if shared.cluster.major >= 17 else []
    for name in names:
        shared.cluster.execute(f"ALTER ROLE postgres SET {name} = '{limit}ms'")
    with shared.cluster.connect() as session:
        session.execute("SET statement_timeout = 0")
        # A spread checkpoint pauses for 100 ms after each of its buffers.
        for number in range(12):
            session.execute(f"CREATE TABLE IF NOT EXISTS dirty_{number} AS SELECT 1".encode())

    def idle_for_long() -> bool:
        found: bool = shared.cluster.scalar(
            f"SELECT clock_timestamp() - state_change > '{2 * limit} ms' FROM pg_stat_activity"
            " WHERE application_name = 'dbmodule backup'"
        )
        return found

    try:
        waited: list[object] = []

        def progress(phase: str, done: int, total: int) -> None:
            if phase == "copy" and not waited:
                waited.append(True)
                eventually(idle_for_long)

        report = shared.app.backup(
            BackupOptions(BackupType.FULL, spread_checkpoint=True), progress=progress
        )
    finally:
        shared.cluster.execute("ALTER ROLE postgres RESET ALL")
    assert waited
    assert report.phases["checkpoint"] > limit / 1000


def test_another_servers_directory_is_refused(
    shared: Site, make_cluster: ClusterFactory, scratch: Path
) -> None:
    """Copies share the system identifier, and one made of a running server even its pid file.

    Seen to fail when nobody looked whether the backup's first checkpoint is on that disk.
    """
    other = make_cluster(shared.cluster.major, start=False)
    with pytest.raises(WrongClusterError) as refusal:
        shared.app_with(pgdata=other.datadir).backup(BackupOptions(BackupType.FULL))
    assert refusal.value.exit_code == 4
    running = scratch / "copy"
    subprocess.run(["cp", "-a", shared.cluster.datadir, running], check=True)
    with pytest.raises(WrongClusterError):
        shared.app_with(pgdata=running).backup(BackupOptions(BackupType.FULL))
    with pytest.raises(DbmoduleError):
        shared.app_with(pgdata=scratch).backup(BackupOptions(BackupType.FULL))
    assert shared.cluster.query("SELECT FROM pg_replication_slots") == []


def test_a_standby_is_refused_clearly(shared: Site, make_cluster: ClusterFactory) -> None:
    standby = make_cluster(shared.cluster.major, start=False)
    (standby.datadir / "standby.signal").touch()
    standby.start({"max_connections": "100"})  # no fewer than its last start had
    app = shared.app_with(dsn=standby.dsn(), pgdata=standby.datadir)
    with pytest.raises(ServerError, match="in recovery") as refusal:
        app.backup(BackupOptions(BackupType.FULL))
    assert "primary" in refusal.value.hint
    assert ("role", "error") in {(f.name, f.severity) for f in app.check().findings}


def test_minimal_wal_is_refused(make_site: SiteFactory) -> None:
    site = make_site(settings={"wal_level": "minimal", "max_wal_senders": "0"})
    with pytest.raises(ServerError, match="wal_level is minimal") as refusal:
        site.full()
    assert "replica" in refusal.value.hint
    assert site.app.backups() == []


@pytest.mark.parametrize("major", [15, 18])
def test_an_unusual_server_is_backed_up_whole(
    make_site: SiteFactory, make_cluster: ClusterFactory, major: int
) -> None:
    """An archive that never takes a segment, another port, odd names, prepared transactions,
    databases that come as file copies and go, and large objects, across a chain."""
    settings = {
        **{"archive_mode": "on", "archive_command": "false", "max_prepared_transactions": "5"},
        "autovacuum": "off",
    }
    cluster = make_cluster(major, start=False, settings=settings)
    cluster.port = 6017
    cluster.start()
    cluster.execute(f"CREATE DATABASE {QUOTED}")
    site = make_site(cluster=cluster, dbname=ODD)

    def run(script: str, database: str = ODD) -> None:
        with cluster.connect(database) as session:
            for statement in script.split(";"):
                session.execute(statement.encode())

    def prepare(name: str, value: int) -> None:
        run(f"BEGIN; INSERT INTO kept VALUES ({value}); PREPARE TRANSACTION '{name}'")

    run("CREATE TABLE kept AS SELECT generate_series(1, 3000) AS i; CREATE DATABASE gone")
    run("SELECT lo_from_bytea(4711, decode(repeat('ab', 9000), 'hex'))")
    prepare("before", -1)
    site.full()
    run("DROP DATABASE gone")
    run("CREATE DATABASE copied TEMPLATE template0 STRATEGY FILE_COPY")
    run(f'CREATE DATABASE {QUOTED[:-1]} too" TEMPLATE template0 STRATEGY FILE_COPY')
    run("UPDATE kept SET i = i + 10000 WHERE i % 40 = 0; SELECT lo_unlink(4711)")
    run("SELECT lo_from_bytea(4712, decode(repeat('cd', 7000), 'hex'))")
    run("CREATE TABLE inside AS SELECT generate_series(1, 500) AS i", "copied")
    prepare("between", -2)
    site.diff()
    run("ROLLBACK PREPARED 'before'")
    prepare("late", -3)
    last = site.incr()
    assert last.detector == "scan"
    expected = oracles.digests(cluster)
    copy = site.start_copy()
    assert oracles.digests(copy) == expected
    assert copy.query("SELECT gid FROM pg_prepared_xacts ORDER BY 1", ODD) == [
        ("between",),
        ("late",),
    ]
    copy.execute("COMMIT PREPARED 'between'", ODD)
    copy.execute("COMMIT PREPARED 'late'", ODD)
    assert copy.query("SELECT i FROM kept WHERE i < 0 ORDER BY 1", ODD) == [(-3,), (-2,)]
    assert oracles.server_oracle(copy) == []


@pytest.mark.parametrize(("major", "megabytes"), [(15, 64), (18, 1)])
def test_other_wal_segment_sizes_and_a_name_that_is_taken(
    make_site: SiteFactory, make_cluster: ClusterFactory, major: int, megabytes: int
) -> None:
    """A fresh cluster, so that a name in the repository can stand for another one already."""
    cluster = make_cluster(major, start=False)
    shutil.rmtree(cluster.datadir)
    cluster.init(wal_segsize_mb=megabytes, extra_args=["--no-sync"])
    cluster.configure(
        {"fsync": "off", "min_wal_size": f"{2 * megabytes}MB", "max_wal_size": f"{2 * megabytes}MB"}
    )
    cluster.start()
    site = make_site(cluster=cluster)
    cluster.execute("CREATE TABLE kept AS SELECT generate_series(1, 9000) AS i")
    site.full()
    cluster.execute("UPDATE kept SET i = -i WHERE i % 1000 = 0")
    diff = site.diff()
    assert diff.detector == "scan"
    assert diff.wal_bytes % (megabytes << 20) == 0
    assert diff.pages_changed < diff.pages_total / 4
    copy = site.start_copy()
    assert oracles.digests(copy) == oracles.digests(cluster)
    foreign = make_site(major)
    with pytest.raises(WrongClusterError, match="stands for the database cluster") as refusal:
        site.app_with(dsn=foreign.cluster.dsn(), pgdata=foreign.cluster.datadir).backup(
            BackupOptions(BackupType.FULL)
        )
    assert refusal.value.exit_code == 4
    if megabytes == 1:
        _wal_that_the_server_removes(site)


def _wal_that_the_server_removes(site: Site) -> None:
    """Kept by the slot, much WAL does no harm; removed in spite of it, there is no backup.

    Seen to fail without the slot.
    """

    def write_much() -> None:
        for number in range(9):
            site.cluster.execute(f"CREATE TABLE much_{number} (); SELECT pg_switch_wal()")
            site.cluster.execute(f"DROP TABLE much_{number}")
        site.cluster.execute("CHECKPOINT")

    kept = backup_when(site, "copy", write_much)
    assert kept.wal_bytes >= 9 << 20
    copy = site.start_copy(kept.backup_id)
    assert oracles.digests(copy) == oracles.digests(site.cluster)
    site.cluster.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    site.cluster.execute("SELECT pg_reload_conf()")
    before = site.app.backups()
    with pytest.raises((SourceError, ServerError)) as failure:
        backup_when(site, "copy", write_much)
    assert failure.value.exit_code == 6
    assert "max_slot_wal_keep_size" in failure.value.hint
    assert site.app.backups() == before
    assert site.cluster.query("SELECT FROM pg_replication_slots") == []
    site.cluster.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
    site.cluster.execute("SELECT pg_reload_conf()")
    after = site.full()
    assert parse_lsn(after.start_lsn) > parse_lsn(kept.stop_lsn)
