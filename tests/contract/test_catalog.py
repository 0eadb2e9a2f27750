"""The catalog and the queue behind their ports, on real servers."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import pytest

from dbmodule.catalog import SqlCatalog, SqlJobQueue, missing_grants
from dbmodule.catalog.engine import make_engine
from dbmodule.catalog.tables import metadata
from dbmodule.errors import LockedError, ServerError
from dbmodule.ident import BackupId, BackupType, Lsn, SystemId, Timeline
from dbmodule.manifest import Corruption
from dbmodule.ports import BackupRecord, LineageMark
from dbmodule.postgres.extension import install_plain
from dbmodule.registry import RelationRow
from tests.fix_cluster import Database

FULL = BackupId("20260131-235900-full-1a2b3c")
DIFF = BackupId("20260131-235959-diff-1a2b3d")

RECORD = BackupRecord(
    backup_id=FULL,
    type=BackupType.FULL,
    baseline_id=None,
    status="completed",
    label="O'Brien's \\ %s label",
    cluster="main",
    system_identifier=SystemId(2**64 - 1),
    timeline=Timeline(2**32 - 1),
    start_lsn=Lsn(2**64 - 2),
    stop_lsn=Lsn(2**64 - 1),
    started_at=datetime(2026, 1, 31, 23, 59, tzinfo=UTC),
    finished_at=datetime(2026, 1, 31, 23, 59, 30, 123456, tzinfo=UTC),
    detector="content",
    files_total=1,
    pages_total=2,
    pages_changed=2,
    bytes_read=2**62,
    bytes_changed=5,
    bytes_stored=6,
    wal_bytes=7,
    corrupt_pages=0,
    manifest_hash="ab" * 32,
    relations=(
        RelationRow(1663, 5, 16384, "main", 2**62, "app", 'public."O\'Brien"', "public.t"),
        RelationRow(1664, 0, 1262, "vm", 1),
    ),
    corruption=(
        Corruption(
            "base/5/16384.1", 131073, Lsn(2**64 - 1), 65535, 0, "app", "public.i", "public.t", FULL
        ),
        Corruption("global/unknown", 0, Lsn(0), 1, 2, None, None, None, None),
    ),
)


@pytest.fixture
def db(database: Database) -> Database:
    install_plain(database.dsn)
    return database


@pytest.fixture
def catalog(db: Database) -> SqlCatalog:
    return SqlCatalog(db.dsn)


@pytest.fixture
def queue(db: Database) -> Iterator[SqlJobQueue]:
    with closing(SqlJobQueue(db.dsn)) as opened:
        assert opened.become_agent("one")
        yield opened


def test_the_tables_are_those_that_are_installed(db: Database) -> None:
    rows = db.query(
        "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull "
        "FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid "
        "WHERE c.relnamespace = 'dbmodule'::regnamespace AND c.relkind = 'r' "
        "AND a.attnum > 0 AND NOT a.attisdropped ORDER BY c.relname, a.attnum"
    )
    dialect = make_engine("").dialect
    ours = [
        (
            table.name,
            column.name,
            column.type.compile(dialect).lower().replace(", ", ","),
            not column.nullable,
        )
        for table in sorted(metadata.tables.values(), key=lambda table: table.name)
        for column in table.columns
    ]
    assert ours == rows


def test_a_mark_is_seen_until_its_row_is_another(db: Database, catalog: SqlCatalog) -> None:
    start = catalog.leave_mark(FULL, "start")
    stop = catalog.leave_mark(FULL, "stop")
    assert catalog.sees_marks([start, stop])
    assert not catalog.sees_marks([start, dataclasses.replace(stop, mark="0" * 32)])
    assert not catalog.sees_marks([dataclasses.replace(start, xmin=start.xmin + 1)])
    assert not catalog.sees_marks([dataclasses.replace(start, xmin=start.xmin + 2**32)])
    # Frozen and rewritten rows keep who wrote them; a copied row has another writer.
    db.execute("VACUUM (FREEZE) dbmodule.lineage")
    assert catalog.sees_marks([start, stop])
    db.execute("VACUUM (FULL, FREEZE) dbmodule.lineage")
    assert catalog.sees_marks([start, stop])
    db.execute(
        "CREATE TABLE moved AS SELECT * FROM dbmodule.lineage; DELETE FROM dbmodule.lineage; "
        "INSERT INTO dbmodule.lineage SELECT * FROM moved"
    )
    assert not catalog.sees_marks([start])


def test_no_mark_at_all_proves_nothing(catalog: SqlCatalog) -> None:
    assert not catalog.sees_marks([])
    assert not catalog.sees_marks([LineageMark("ab" * 16, 7)])


def test_a_backup_is_recorded_once_and_exactly(db: Database, catalog: SqlCatalog) -> None:
    diff = dataclasses.replace(RECORD, backup_id=DIFF, type=BackupType.DIFF, baseline_id=FULL)
    for record in (RECORD, diff, RECORD, diff):
        catalog.record(record)
    assert db.query(
        "SELECT backup_id, label, system_identifier, timeline, start_lsn::text, finished_at, "
        "bytes_read FROM dbmodule.backup ORDER BY started_at, type DESC"
    ) == [
        (
            backup_id,
            RECORD.label,
            2**64 - 1,
            2**32 - 1,
            "FFFFFFFF/FFFFFFFE",
            RECORD.finished_at,
            2**62,
        )
        for backup_id in (FULL, DIFF)
    ]
    assert db.query("SELECT backup_id, baseline_id FROM dbmodule.backup_dependency") == [
        (DIFF, FULL)
    ]
    assert db.query(
        "SELECT relfilenode::bigint, fork, pages_changed, database_name, relation_name, table_name"
        f" FROM dbmodule.backup_relation WHERE backup_id = '{FULL}' ORDER BY 1 DESC"
    ) == [
        (16384, "main", 2**62, "app", 'public."O\'Brien"', "public.t"),
        (1262, "vm", 1, None, None, None),
    ]
    assert db.query(
        "SELECT tablespace::bigint, database::bigint, relfilenode::bigint, fork, block, lsn::text,"
        " expected, actual, relation_name, last_good_backup_id"
        f" FROM dbmodule.corrupt_page WHERE backup_id = '{DIFF}' ORDER BY path"
    ) == [
        (1663, 5, 16384, "main", 131073, "FFFFFFFF/FFFFFFFF", 65535, 0, "public.i", FULL),
        (None, None, None, None, 0, "0/0", 1, 2, None, None),
    ]


def test_a_backup_whose_baseline_is_unknown_is_refused_whole(
    db: Database, catalog: SqlCatalog
) -> None:
    diff = dataclasses.replace(RECORD, backup_id=DIFF, type=BackupType.DIFF, baseline_id=FULL)
    with pytest.raises(ServerError) as caught:
        catalog.record(diff)
    assert "catalog rebuild" in caught.value.hint
    assert db.scalar("SELECT count(*) FROM dbmodule.backup") == 0


def test_removed_backups_are_forgotten_dependents_first(db: Database, catalog: SqlCatalog) -> None:
    incr = BackupId("20260131-235959-incr-1a2b3e")
    diff = dataclasses.replace(RECORD, backup_id=DIFF, type=BackupType.DIFF, baseline_id=FULL)
    last = dataclasses.replace(diff, backup_id=incr, type=BackupType.INCR, baseline_id=DIFF)
    for record in (RECORD, diff, last):
        catalog.record(record)
    unknown = BackupId("20200101-000000-full-abcdef")
    # What is still depended on stays, whoever asks.
    assert catalog.forget([FULL, DIFF, unknown]) == {unknown}
    assert db.scalar("SELECT count(*) FROM dbmodule.backup") == 3
    assert catalog.forget([FULL, DIFF, incr]) == {FULL, DIFF, incr}
    for table in ("backup", "backup_dependency", "backup_relation", "corrupt_page"):
        assert db.scalar(f"SELECT count(*) FROM dbmodule.{table}") == 0
    assert catalog.forget([]) == set()


def test_jobs_come_oldest_first_with_what_was_asked(db: Database, queue: SqlJobQueue) -> None:
    db.execute("SELECT backup_full(label => 'first', detect => 'scan')")
    db.execute("SELECT backup_incremental()")
    first = queue.claim("one")
    second = queue.claim("one")
    assert first is not None and second is not None
    assert (first.type, first.label, first.detect) == (BackupType.FULL, "first", "scan")
    assert (first.baseline_id, first.attempts) == (None, 1)
    assert second.type is BackupType.INCR
    assert second.job_id > first.job_id
    assert queue.claim("one") is None


def test_a_claim_has_committed_and_is_made_once(db: Database, queue: SqlJobQueue) -> None:
    db.execute("SELECT backup_full() FROM generate_series(1, 20)")
    claimed: list[int] = []

    def claim_all() -> None:
        with closing(SqlJobQueue(db.dsn)) as other:
            while (job := other.claim("racer")) is not None:
                claimed.append(job.job_id)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 21))
    assert db.scalar("SELECT count(*) FROM dbmodule.job WHERE state = 'running'") == 20


def test_a_locked_row_is_skipped(db: Database, queue: SqlJobQueue) -> None:
    db.execute("SELECT backup_full() FROM generate_series(1, 2)")
    with db.connect() as other, other.transaction():
        other.execute("SELECT FROM dbmodule.job WHERE job_id = 1 FOR UPDATE")
        job = queue.claim("one")
    assert job is not None and job.job_id == 2


def test_progress_completion_and_failure_show_in_the_status(
    db: Database, queue: SqlJobQueue
) -> None:
    db.execute("SELECT backup_full() FROM generate_series(1, 2)")
    status = "SELECT state, phase, percent, backup_id, error_message, hint FROM backup_status({})"
    for _ in range(2):
        queue.claim("one")
    queue.progress(1, "copy", 30, 40)
    assert db.query(status.format(1)) == [("running", "copy", 75, None, None, None)]
    queue.complete(1, FULL, {"backup_id": FULL, "phases": {"copy": 0.5}})
    assert db.query(status.format(1)) == [("completed", "", 100, FULL, None, None)]
    assert db.scalar("SELECT report #>> '{phases,copy}' FROM dbmodule.job WHERE job_id = 1") == (
        "0.5"
    )
    queue.fail(2, {"code": "source", "message": "bad \0 name \udc80", "hint": "Look."})
    assert db.query(status.format(2)) == [
        ("failed", "starting", None, None, "bad \\0 name \\udc80", "Look.")
    ]


def test_what_is_no_longer_ours_cannot_be_ended_by_us(db: Database, queue: SqlJobQueue) -> None:
    db.execute("SELECT backup_full()")
    with pytest.raises(LockedError):
        queue.progress(1, "copy", 1, 2)
    queue.claim("another")
    with pytest.raises(LockedError):
        queue.complete(1, FULL, {})
    queue.requeue(1)
    with pytest.raises(LockedError):
        queue.fail(1, {"code": "x", "message": "", "hint": ""})
    assert db.scalar("SELECT state FROM dbmodule.job") == "queued"


def test_unfinished_jobs_are_found_and_put_back(db: Database, queue: SqlJobQueue) -> None:
    db.execute("SELECT backup_full() FROM generate_series(1, 2)")
    queue.claim("gone")
    (left,) = queue.recover()
    assert (left.job_id, left.attempts) == (1, 1)
    queue.requeue(1)
    assert queue.recover() == []
    again = queue.claim("one")
    assert again is not None and (again.job_id, again.attempts) == (1, 2)


def test_there_is_one_agent_and_its_lock_ends_with_its_session(
    db: Database, queue: SqlJobQueue
) -> None:
    assert db.scalar("SELECT dbmodule.agent_is_running()")
    with closing(SqlJobQueue(db.dsn)) as second:
        assert not second.become_agent("two")
        db.query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        for _ in range(2):
            with pytest.raises(ServerError):
                queue.claim("one")
        assert second.become_agent("two")


def test_without_the_extension_the_hint_says_what_to_do(database: Database) -> None:
    catalog = SqlCatalog(database.dsn)
    with pytest.raises(ServerError) as caught:
        catalog.leave_mark(FULL, "start")
    assert "extension install" in caught.value.hint
    with closing(SqlJobQueue(database.dsn)) as queue, pytest.raises(ServerError) as caught:
        queue.become_agent("one")
    assert "extension install" in caught.value.hint
    assert catalog.missing_grants()[0] == "CREATE EXTENSION dbmodule;"


def test_a_server_that_is_not_there_is_a_server_error() -> None:
    with pytest.raises(ServerError):
        SqlCatalog("host=/nonexistent port=1").sees_marks([LineageMark("ab" * 16, 7)])
    with pytest.raises(ServerError):
        SqlJobQueue("host=/nonexistent port=1")


def test_the_missing_grant_is_named_and_is_enough(db: Database) -> None:
    db.execute('DROP ROLE IF EXISTS "odd ""agent"; CREATE ROLE "odd ""agent" LOGIN')
    dsn = db.cluster.dsn(db.name, 'odd "agent')
    catalog = SqlCatalog(dsn)
    with pytest.raises(ServerError) as caught:
        catalog.leave_mark(FULL, "start")
    assert "dbmodule check" in caught.value.hint
    (grant,) = catalog.missing_grants()
    assert grant == 'GRANT dbmodule_agent TO "odd ""agent";'
    db.execute(grant)
    with db.connect('odd "agent') as connection:
        assert missing_grants(connection) == []
    assert catalog.sees_marks([catalog.leave_mark(FULL, "start")])
    catalog.record(RECORD)
    assert catalog.forget([RECORD.backup_id]) == {RECORD.backup_id}
    db.execute("SELECT backup_full() FROM generate_series(1, 2)")
    with closing(SqlJobQueue(dsn)) as queue:
        assert queue.become_agent("one")
        for _ in range(2):
            queue.claim("one")
        queue.progress(1, "copy", 1, 2)
        queue.complete(1, FULL, {})
        queue.fail(2, {"code": "x", "message": "y", "hint": ""})
    db.execute('DROP OWNED BY "odd ""agent"; DROP ROLE "odd ""agent"')
