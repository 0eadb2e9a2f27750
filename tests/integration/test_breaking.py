"""What once went wrong when somebody tried to break it."""

from __future__ import annotations

import pytest

from dbmodule.app import App
from dbmodule.config import RepositorySection, ServerSection
from dbmodule.errors import RefusedError, ServerError, TargetError, UsageError
from dbmodule.ident import BackupType
from dbmodule.reports import BackupOptions, RestoreOptions
from tests import oracles
from tests.fix_backup import COPY_OPTIONS, Site, SiteFactory
from tests.fix_cluster import ClusterFactory


@pytest.fixture(scope="module")
def site(make_module_site: SiteFactory, pg_major: int) -> Site:
    return make_module_site(pg_major)


def test_a_database_that_moves_meanwhile_fails_the_backup(site: Site) -> None:
    """Replay copies the directory that it moved from: the restored one had no PG_VERSION."""
    place = site.clusters.directory()
    site.cluster.execute(f"CREATE TABLESPACE moved_to LOCATION '{place}'")
    site.cluster.execute("CREATE DATABASE moving")
    waiting = ["ALTER DATABASE moving SET TABLESPACE moved_to"]

    def move(phase: str, done: int, total: int) -> None:
        if phase == "copy" and waiting:
            site.cluster.execute(waiting.pop())

    with pytest.raises(ServerError, match="was moved out of tablespace 1663"):
        site.app.backup(BackupOptions(BackupType.FULL), progress=move)
    assert site.app.backups() == []
    site.cluster.execute("DROP DATABASE moving")
    site.cluster.execute("DROP TABLESPACE moved_to")


def test_a_copy_starts_without_the_command_line_of_its_source(make_site: SiteFactory) -> None:
    """Recovery stops where ``max_connections`` and the like are smaller than at the source."""
    site = make_site(18)
    site.cluster.restart()
    site.cluster.stop("fast")
    site.cluster.start({"max_connections": "60", "max_prepared_transactions": "7"})
    with site.cluster.connect() as session:
        session.autocommit = True
        session.execute("BEGIN")
        session.execute("CREATE TABLE prepared AS SELECT 1 AS i")
        session.execute("PREPARE TRANSACTION 'kept'")
    site.full()
    copy = site.start_copy()
    assert copy.scalar("SHOW max_connections") == "60"
    copy.execute("COMMIT PREPARED 'kept'")
    assert copy.scalar("SELECT i FROM prepared") == 1


def test_group_access_is_restored(make_site: SiteFactory) -> None:
    site = make_site(18)
    site.cluster.stop("fast")
    root = site.cluster.datadir
    for path in (root, *root.rglob("*")):
        path.chmod(0o750 if path.is_dir() else 0o640)
    site.cluster.start()
    site.full()
    restored = site.restore()
    modes = {oct(path.stat().st_mode & 0o777) for path in restored.rglob("*") if path.is_dir()}
    assert modes == {"0o750"} == {oct(restored.stat().st_mode & 0o777)}
    assert {oct(p.stat().st_mode & 0o777) for p in restored.rglob("*") if p.is_file()} == {"0o640"}
    copy = site.copy_at(restored)
    copy.start(COPY_OPTIONS)


def test_repository_and_data_directory_are_kept_apart(make_site: SiteFactory) -> None:
    site = make_site(18)
    inside = RepositorySection(url=str(site.cluster.datadir / "backups"))
    app = App.open(site.config.model_copy(update={"repository": inside}))
    with pytest.raises(TargetError, match="lie in each other"):
        app.init(config_path=site.base / "other.toml", extension=False)
    assert not (site.cluster.datadir / "backups").exists()
    site.full()
    with pytest.raises(TargetError, match="lie in each other"):
        site.app.restore(RestoreOptions(site.repository_path / "restored"))


def test_a_target_that_links_to_itself_is_refused(site: Site) -> None:
    circle = site.base / "circle"
    circle.symlink_to(circle)
    with pytest.raises(TargetError, match="circle"):
        site.app.restore(RestoreOptions(circle))


def test_a_copy_does_not_run_the_commands_of_its_source_s_recovery(make_site: SiteFactory) -> None:
    """A promoted standby keeps them: they would clean up the archive that its source lives on."""
    site = make_site(18)
    ran = site.base / "ran"
    site.cluster.configure(
        {
            "archive_cleanup_command": f"echo cleanup >> {ran}",
            "recovery_end_command": f"echo end >> {ran}",
            "recovery_min_apply_delay": "1h",
        }
    )
    site.full()
    copy = site.start_copy()
    assert copy.scalar("SHOW recovery_min_apply_delay") == "0"
    copy.execute("CHECKPOINT")
    assert not ran.exists()


def test_defaults_meant_for_others_do_not_fail_a_backup(make_site: SiteFactory) -> None:
    site = make_site(18)
    site.cluster.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    full = site.full()
    recorded = site.cluster.query("SELECT backup_id FROM dbmodule.backup")
    assert recorded == [(full.backup_id,)]
    assert site.incr().detector == "scan"


def test_a_database_without_an_encoding(
    make_cluster: ClusterFactory, make_site: SiteFactory
) -> None:
    """Its text is bytes to the driver, unless it is told otherwise. ``initdb`` makes such under
    the locale C."""
    cluster = make_cluster(18)
    cluster.execute("CREATE DATABASE plain ENCODING 'SQL_ASCII' TEMPLATE template0")
    site = make_site(cluster=cluster, dbname="plain")
    assert site.app.check().status != "error"
    site.full()
    cluster.execute("CREATE TABLE added AS SELECT generate_series(1, 500) AS i", "plain")
    assert site.incr().detector == "scan"
    copy = site.start_copy()
    assert copy.query("SELECT count(*) FROM added", "plain") == [(500,)]


def test_a_server_started_on_the_copy_does_not_run_on_its_source(make_site: SiteFactory) -> None:
    """``data_directory`` in the copied postgresql.conf leads there; the source was stopped."""
    site = make_site(18)
    site.cluster.configure({"data_directory": str(site.cluster.datadir)})
    site.cluster.restart()
    site.full()
    site.cluster.stop("fast")
    restored = site.restore()
    assert oracles.pg_verifybackup(site.cluster, restored) == []
    copy = site.copy_at(restored)
    copy.start(COPY_OPTIONS)
    assert copy.scalar("SHOW data_directory") == str(restored)


def test_a_bad_connection_string_is_not_quoted(site: Site) -> None:
    """The driver's own message shows the part that it cannot read: the password."""
    dsn = "postgresql://me:s3cr3t%zzpw@localhost/postgres"
    config = site.config.model_copy(update={"server": ServerSection(dsn=dsn)})
    with pytest.raises(UsageError) as caught:
        App.open(config)
    assert "s3cr3t" not in f"{caught.value.as_dict()} {caught.value.__cause__!r}"
    assert caught.value.__suppress_context__


def test_one_damaged_manifest_does_not_hide_the_others(
    make_site: SiteFactory, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(18)
    full, diff = site.full(), site.diff()
    place = site.repository_path / "manifests" / "main" / f"{diff.backup_id}.json"
    data = bytearray(place.read_bytes())
    data[10] ^= 1
    place.write_bytes(data)
    assert [report.backup_id for report in site.app.backups()] == [full.backup_id]
    assert f"backup {diff.backup_id} is left out" in caplog.text


def test_a_server_without_a_free_replication_slot(make_site: SiteFactory) -> None:
    """Said by name before the backup begins, and foreseen by `check`."""
    site = make_site(settings={"max_replication_slots": "1", "max_wal_senders": "1"})
    site.cluster.execute("SELECT pg_create_physical_replication_slot('another')")
    with pytest.raises(ServerError, match="no replication slot free") as refusal:
        site.full()
    assert "max_replication_slots" in refusal.value.hint
    (told,) = (f for f in site.app.check().findings if f.severity == "error")
    assert (told.name, told.remedy) == ("replication slots", refusal.value.hint)
    site.cluster.execute("SELECT pg_drop_replication_slot('another')")
    assert site.full().status == "completed"


def test_init_writes_nothing_where_a_description_was_lost(
    make_site: SiteFactory,
) -> None:
    """A new one would have another key, and open none of the backups that are there."""
    site = make_site()
    site.full()
    description = site.repository_path / "repository.json"
    saved = description.read_bytes()
    description.unlink()
    with pytest.raises(RefusedError, match=r"no repository\.json"):
        site.app.init(config_path=site.base / "again.toml", extension=False)
    assert not description.exists()
    description.write_bytes(saved)
    assert site.app.verify(None).status == "sound"
