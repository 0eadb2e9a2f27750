"""The session and the queries of ``docs/sql.md``, run as they stand there."""

from __future__ import annotations

import dataclasses
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dbmodule.agent import Agent
from dbmodule.catalog import SqlCatalog, SqlJobQueue
from dbmodule.ident import BackupId, BackupType, Lsn, SystemId, Timeline
from dbmodule.notify import open_listener
from dbmodule.ports import BackupRecord, Cancelled, Job, Progress
from dbmodule.postgres.extension import install_plain
from dbmodule.reports import BackupReport
from tests.fix_cluster import Database
from tests.integration.agent_process import FAST, report_for

PAGE = Path(__file__).parents[2] / "docs" / "sql.md"
FULL = BackupId("20260131-235900-full-1a2b3c")
DIFF = BackupId("20260131-235959-diff-1a2b3d")


def statements(heading: str) -> list[str]:
    """The statements of the SQL blocks below a heading of the page."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    text = "\n".join(re.findall(r"```sql\n(.*?)```", section, re.DOTALL))
    return [part.strip() for part in re.sub(r"--.*", "", text).split(";") if part.strip()]


def record(backup_id: BackupId, baseline: BackupId | None) -> BackupRecord:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    return BackupRecord(
        backup_id=backup_id,
        type=BackupType(backup_id.split("-")[2]),
        baseline_id=baseline,
        status="completed",
        label="",
        cluster="main",
        system_identifier=SystemId(1),
        timeline=Timeline(1),
        start_lsn=Lsn(1),
        stop_lsn=Lsn(2),
        started_at=now,
        finished_at=now,
        detector="content",
        files_total=0,
        pages_total=0,
        pages_changed=0,
        bytes_read=0,
        bytes_changed=0,
        bytes_stored=0,
        wal_bytes=0,
        corrupt_pages=0,
        manifest_hash="00" * 32,
    )


@pytest.fixture
def db(database: Database) -> Database:
    install_plain(database.dsn)
    return database


def test_the_session_goes_as_it_is_written(db: Database) -> None:
    catalog = SqlCatalog(db.dsn)

    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        made = record(FULL, None) if job.type is BackupType.FULL else record(DIFF, FULL)
        catalog.record(made)
        return dataclasses.replace(report_for(job.job_id), backup_id=made.backup_id)

    agent = Agent(
        "documented",
        open_queue=lambda: SqlJobQueue(db.dsn),
        open_listener=lambda: open_listener(db.dsn),
        run=run,
        find_backup=lambda job_id: None,
        timing=FAST,
    )
    stop = threading.Event()
    thread = threading.Thread(target=agent.run_forever, args=[stop])
    thread.start()
    try:
        answers = [db.query(statement) for statement in statements("A session")]
    finally:
        stop.set()
        thread.join()
    assert answers[0] == [(1,)]
    assert answers[2] == [(2,)]
    assert answers[-1] == [(1, FULL, "full"), (2, DIFF, "diff")]
    assert db.query(statements("Looking into chains")[0]) == [(DIFF,)]


def test_the_other_queries_run(db: Database) -> None:
    for statement in statements("Tables"):
        db.query(statement)
    db.execute("DROP ROLE IF EXISTS alice, backup; CREATE ROLE alice; CREATE ROLE backup")
    for statement in statements("Roles"):
        db.execute(statement)
    db.execute("DROP ROLE alice, backup")
