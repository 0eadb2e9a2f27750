"""The agent against real servers and real faults: every job ends exactly once."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from dbmodule.agent import Agent, AgentTiming
from dbmodule.catalog import SqlJobQueue
from dbmodule.errors import LockedError, RepositoryError, ServerError, SourceError
from dbmodule.notify import open_listener
from dbmodule.ports import Cancelled, Job, Progress
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.postgres.extension import install_plain
from dbmodule.reports import BackupReport
from tests.fix_cluster import Database
from tests.integration import agent_process
from tests.integration.agent_process import FAST, LedgerBackups, make_agent, report_for

AGENT_BACKENDS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = '{}'"
)


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@contextmanager
def at_work(agent: Agent) -> Iterator[threading.Event]:
    """The agent at work in a thread; the test fails if its loop ends with an error."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            agent.run_forever(stop)
        except BaseException as error:
            errors.append(error)
            raise

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(20.0)
        assert not thread.is_alive()
        assert errors == []


@pytest.fixture
def db(database: Database) -> Database:
    install_plain(database.dsn)
    return database


@pytest.fixture
def backups(tmp_path: Path) -> LedgerBackups:
    return LedgerBackups(tmp_path / "ledger")


def enqueue(db: Database) -> int:
    job: int = db.scalar("SELECT backup_full()")
    return job


def state(db: Database, job: int) -> str:
    found: str = db.scalar(f"SELECT state FROM backup_status({job})")
    return found


def await_state(db: Database, job: int, wanted: str) -> None:
    eventually(lambda: state(db, job) == wanted)


def await_agent(db: Database) -> None:
    eventually(lambda: bool(db.scalar("SELECT dbmodule.agent_is_running()")))


def agent_with(
    db: Database,
    run: Callable[[Job, Progress, Cancelled], BackupReport],
    find: Callable[[int], BackupReport | None] = lambda job_id: None,
    timing: AgentTiming = FAST,
) -> Agent:
    return Agent(
        "tested",
        open_queue=lambda: SqlJobQueue(db.dsn),
        open_listener=lambda: open_listener(db.dsn),
        run=run,
        find_backup=find,
        timing=timing,
    )


def test_jobs_from_before_and_during_are_run_in_order(db: Database, backups: LedgerBackups) -> None:
    early = [enqueue(db), enqueue(db)]
    with at_work(make_agent(db.dsn, backups, "one")):
        await_agent(db)
        late = enqueue(db)
        db.execute(f"CALL backup_wait({late}, '20 s')")
    assert backups.lines() == [f"{word} {job}" for job in (*early, late)
                               for word in ("start", "commit")]  # fmt: skip
    assert db.query(f"SELECT backup_id, percent FROM backup_status({late})") == [
        (report_for(late).backup_id, 100)
    ]
    assert db.scalar(f"SELECT report ->> 'cluster' FROM dbmodule.job WHERE job_id = {late}") == (
        "main"
    )


def test_a_notification_is_faster_than_the_poll(db: Database, backups: LedgerBackups) -> None:
    patient = AgentTiming(poll=300.0, progress=0.05)
    with at_work(agent_with(db, backups.run, timing=patient)):
        await_agent(db)
        eventually(
            lambda: (
                db.scalar(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND query LIKE 'LISTEN%'"
                )
                == 1
            )
        )
        await_state(db, enqueue(db), "completed")


def test_a_job_without_a_notification_is_found_by_the_poll(
    db: Database, backups: LedgerBackups
) -> None:
    with at_work(make_agent(db.dsn, backups, "one")):
        await_agent(db)
        db.execute("INSERT INTO dbmodule.job (type) VALUES ('full')")
        await_state(db, 1, "completed")


def test_errors_become_failed_jobs_and_the_next_one_runs(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        if job.job_id == 1:
            raise SourceError("cannot read", hint="Look.")
        if job.job_id == 2:
            raise ZeroDivisionError("oops")
        return report_for(job.job_id)

    jobs = [enqueue(db) for _ in range(3)]
    with at_work(agent_with(db, run)):
        await_state(db, jobs[2], "completed")
    assert db.query("SELECT error ->> 'code', error ->> 'message' FROM dbmodule.job") == [
        ("source", "cannot read"),
        ("unexpected", "ZeroDivisionError: oops"),
        (None, None),
    ]
    assert "Traceback" in caplog.text
    with pytest.raises(ServerError, match=r"(?s)job 1 failed: cannot read.*Look\."):
        db.execute("CALL backup_wait(1)")


def test_progress_is_throttled_and_the_heart_beats_without_it(db: Database) -> None:
    calls = 2000
    go_on = threading.Event()

    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        for done in range(calls):
            progress("copy", done, calls)
        assert go_on.wait(20.0)
        return report_for(job.job_id)

    job = enqueue(db)
    beat = f"SELECT heartbeat_at FROM dbmodule.job WHERE job_id = {job}"
    with at_work(agent_with(db, run)):
        eventually(lambda: db.query(f"SELECT bytes_done FROM backup_status({job})")[0][0] > 0)
        assert db.query(f"SELECT phase, bytes_total FROM backup_status({job})") == [("copy", calls)]
        first = db.scalar(beat)
        eventually(lambda: bool(db.scalar(beat) > first))
        go_on.set()
        await_state(db, job, "completed")
    db.execute("SELECT pg_stat_force_next_flush()")
    updates = db.scalar("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'job'")
    assert updates < 200


def test_stopping_cancels_the_backup_and_puts_the_job_back(
    db: Database, backups: LedgerBackups
) -> None:
    backups.hold.touch()
    job = enqueue(db)
    with at_work(make_agent(db.dsn, backups, "one")) as stop:
        await_state(db, job, "running")
        stop.set()
        await_state(db, job, "queued")
    backups.hold.unlink()
    with at_work(make_agent(db.dsn, backups, "two")):
        await_state(db, job, "completed")
    assert backups.lines() == [f"start {job}", f"start {job}", f"commit {job}"]


@pytest.mark.parametrize("session", ["dbmodule", "dbmodule listener"])
def test_a_terminated_session_is_made_again(
    db: Database, backups: LedgerBackups, session: str
) -> None:
    with at_work(make_agent(db.dsn, backups, "one")):
        await_state(db, enqueue(db), "completed")
        assert db.query(AGENT_BACKENDS.format(session))
        await_state(db, enqueue(db), "completed")
        backups.hold.touch()
        job = enqueue(db)
        await_state(db, job, "running")
        assert db.query(AGENT_BACKENDS.format(session))
        await_agent(db)
        backups.hold.unlink()
        await_state(db, job, "completed")
        await_state(db, enqueue(db), "completed")
    assert len(backups.lines()) == 8


def test_a_completion_that_cannot_be_recorded_is_not_done_twice(
    db: Database, backups: LedgerBackups
) -> None:
    patient = AgentTiming(poll=0.3, progress=30.0, first_retry=0.05, last_retry=0.2)

    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        report = backups.run(job, progress, cancelled)
        db.query(AGENT_BACKENDS.format("dbmodule"))
        return report

    job = enqueue(db)
    with at_work(agent_with(db, run, backups.find, patient)):
        await_state(db, job, "completed")
    assert backups.lines() == [f"start {job}", f"commit {job}"]
    assert db.scalar(f"SELECT attempts FROM dbmodule.job WHERE job_id = {job}") == 2


def test_an_agent_survives_a_server_restart(own_cluster: LocalCluster, tmp_path: Path) -> None:
    db = Database("postgres", own_cluster)
    install_plain(db.dsn)
    backups = LedgerBackups(tmp_path / "ledger")

    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        # As a real backup: a session of its own, without which it is none.
        try:
            with db.connect() as session:
                backups.before_commit = lambda: session.execute("SELECT 1")
                return backups.run(job, progress, cancelled)
        except psycopg.Error as error:
            raise ServerError(f"the session was lost: {error}") from error

    with at_work(agent_with(db, run, backups.find)):
        await_state(db, enqueue(db), "completed")
        own_cluster.restart("immediate")
        await_state(db, enqueue(db), "completed")
        backups.hold.touch()
        job = enqueue(db)
        # The row says "running" a moment before the backup has its session.
        eventually(lambda: backups.lines()[4:] == [f"start {job}"])
        own_cluster.restart("immediate")
        backups.hold.unlink()
        await_state(db, job, "completed")
        last = enqueue(db)
        await_state(db, last, "completed")
    assert backups.lines()[4:] == [
        f"start {job}",
        f"start {job}",
        f"commit {job}",
        f"start {last}",
        f"commit {last}",
    ]


def test_a_second_agent_waits_and_takes_over(db: Database, backups: LedgerBackups) -> None:
    with at_work(make_agent(db.dsn, backups, "first")) as stop_first:
        await_state(db, enqueue(db), "completed")
        with at_work(make_agent(db.dsn, backups, "second")):
            await_state(db, enqueue(db), "completed")
            stop_first.set()
            job = enqueue(db)
            eventually(
                lambda: (
                    db.scalar("SELECT claimed_by FROM dbmodule.job ORDER BY job_id DESC LIMIT 1")
                    is not None
                )
            )
            await_state(db, job, "completed")
            await_state(db, enqueue(db), "completed")
    claimed = [row[0] for row in db.query("SELECT claimed_by FROM dbmodule.job ORDER BY job_id")]
    assert claimed[:2] == ["first", "first"]
    assert claimed[-1] == "second"
    assert len(backups.lines()) == 8


def test_an_agent_that_lost_its_lock_leaves_the_job_to_the_other(
    db: Database, tmp_path: Path
) -> None:
    # The first agent reconnects late, the second one at once: it finds the job unfinished.
    slow = AgentTiming(poll=0.3, progress=0.05, heartbeat=0.1, first_retry=1.5, last_retry=1.5)
    running = threading.Lock()
    runs: list[str] = []

    def run(job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        if not running.acquire(blocking=False):
            raise LockedError("another backup runs")
        with running_released():
            runs.append("start")
            if len(runs) == 1:
                eventually(cancelled)
                raise SourceError("cancelled halfway")
            return report_for(job.job_id)

    @contextmanager
    def running_released() -> Iterator[None]:
        try:
            yield
        finally:
            running.release()

    job = enqueue(db)
    with at_work(agent_with(db, run, timing=slow)):
        await_state(db, job, "running")
        second = Agent(
            "second",
            open_queue=lambda: SqlJobQueue(db.dsn),
            open_listener=lambda: open_listener(db.dsn),
            run=run,
            find_backup=lambda job_id: None,
            timing=FAST,
        )
        with at_work(second):
            db.query(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            await_state(db, job, "completed")
    assert runs == ["start", "start"]
    assert db.query("SELECT claimed_by, state FROM dbmodule.job") == [("second", "completed")]


def test_an_unreachable_repository_keeps_a_recovered_job_waiting(
    db: Database, backups: LedgerBackups
) -> None:
    outages = 3

    def find(job_id: int) -> BackupReport | None:
        nonlocal outages
        if outages > 0:
            outages -= 1
            raise RepositoryError("unreachable")
        return report_for(job_id)

    job = enqueue(db)
    db.execute("UPDATE dbmodule.job SET state = 'running', claimed_by = 'gone', "
               "claimed_at = now(), attempts = 1")  # fmt: skip
    with at_work(agent_with(db, backups.run, find)):
        await_state(db, job, "completed")
    assert outages == 0
    assert backups.lines() == []


def test_an_older_backup_of_another_job_with_the_same_id_does_not_count(
    db: Database, backups: LedgerBackups
) -> None:
    def find(job_id: int) -> BackupReport | None:
        return dataclasses.replace(report_for(job_id), started_at="2026-01-31T23:59:59+00:00")

    job = enqueue(db)
    db.execute(
        "UPDATE dbmodule.job SET state = 'running', claimed_by = 'gone', claimed_at = now(), "
        "attempts = 1, requested_at = '2026-02-01 00:00:00+00'"
    )
    with at_work(agent_with(db, backups.run, find)):
        await_state(db, job, "completed")
    assert backups.lines() == [f"start {job}", f"commit {job}"]


def test_a_job_that_ends_every_agent_is_given_up(db: Database, backups: LedgerBackups) -> None:
    job = enqueue(db)
    db.execute("UPDATE dbmodule.job SET state = 'running', claimed_by = 'gone', "
               "claimed_at = now(), attempts = 5")  # fmt: skip
    with at_work(make_agent(db.dsn, backups, "one")):
        await_state(db, job, "failed")
    assert "given up after 5 attempts" in db.scalar(
        f"SELECT error_message FROM backup_status({job})"
    )
    assert backups.lines() == []


@contextmanager
def agent_in_a_process(db: Database, backups: LedgerBackups, name: str) -> Iterator[
    subprocess.Popen[bytes]
]:  # fmt: skip
    command = [sys.executable, "-m", agent_process.__name__, db.dsn, str(backups.ledger), name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_agents_job_is_done_exactly_once(db: Database, backups: LedgerBackups) -> None:
    backups.hold.touch()
    job = enqueue(db)
    with agent_in_a_process(db, backups, "killed") as process:
        eventually(lambda: backups.lines() == [f"start {job}"])
        process.kill()
        process.wait()
    assert state(db, job) == "running"
    backups.hold.unlink()
    with at_work(make_agent(db.dsn, backups, "heir")):
        await_state(db, job, "completed")
    assert backups.lines() == [f"start {job}", f"start {job}", f"commit {job}"]


def test_a_backup_committed_before_the_kill_is_not_repeated(
    db: Database, backups: LedgerBackups
) -> None:
    job = enqueue(db)
    # The row's lock keeps the agent from recording what it has committed.
    with db.connect() as blocker:
        backups.hold.touch()
        with agent_in_a_process(db, backups, "killed") as process:
            await_state(db, job, "running")
            with blocker.transaction():
                blocker.execute("SELECT FROM dbmodule.job FOR UPDATE")
                backups.hold.unlink()
                eventually(lambda: backups.lines() == [f"start {job}", f"commit {job}"])
                process.kill()
                process.wait()
    with at_work(make_agent(db.dsn, backups, "heir")):
        await_state(db, job, "completed")
    assert backups.lines() == [f"start {job}", f"commit {job}"]


def test_sigterm_puts_the_job_back_and_ends_the_process(
    db: Database, backups: LedgerBackups
) -> None:
    backups.hold.touch()
    job = enqueue(db)
    with agent_in_a_process(db, backups, "stopped") as process:
        await_state(db, job, "running")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20.0) == 0
    assert state(db, job) == "queued"
