"""Backups asked for in SQL and carried out by the agent, to the end: repository and catalog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.config import AgentSection
from dbmodule.errors import NoBaselineError, ServerError
from dbmodule.ident import BackupId, BackupType, format_lsn
from dbmodule.manifest import Manifest
from dbmodule.notify import PgPubSubListener, PsycopgListener
from dbmodule.reports import BackupOptions
from tests import oracles
from tests.fix_backup import Site, SiteFactory
from tests.integration.test_agent import eventually

ROOT = Path(__file__).parents[2]
MISSING = "20200101-000000-full-abcdef"
POLL_SECONDS = 0.3


def agent_app(site: Site, poll_seconds: float = POLL_SECONDS) -> App:
    agent = AgentSection(poll_seconds=poll_seconds)
    return App.open(site.config.model_copy(update={"agent": agent}))


@contextmanager
def agent_in_a_thread(app: App) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=app.run_agent, kwargs={"stop": stop})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30.0)
        assert not thread.is_alive()


@contextmanager
def agent_in_a_process(site: Site) -> Iterator[subprocess.Popen[str]]:
    """``dbmodule agent``, configured by its environment; killed at the end if it still runs."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
        "DBMODULE_SERVER__DSN": site.config.server.dsn,
        "DBMODULE_REPOSITORY__URL": site.config.repository.url,
        "DBMODULE_AGENT__POLL_SECONDS": str(POLL_SECONDS),
    }
    command = [sys.executable, "-c", "from dbmodule_cli.main import main; main()", "agent"]
    with subprocess.Popen(
        command,
        env=environment,
        cwd=site.base,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def checkpointer_held(site: Site) -> Iterator[None]:
    """No checkpoint ends meanwhile, so that a backup stands still in the middle of its start."""
    pid: int = site.cluster.scalar(
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
    )
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGSTOP)
    try:
        yield
    finally:
        if site.cluster.is_running():
            signal.pidfd_send_signal(handle, signal.SIGCONT)
        os.close(handle)


def backup_has_begun(site: Site) -> bool:
    found: bool = site.cluster.scalar(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'dbmodule backup'"
        " AND query LIKE '%pg_backup_start%' AND state = 'active')"
    )
    return found


def ask(site: Site, call: str) -> int:
    job: int = site.cluster.scalar(f"SELECT {call}")
    return job


def wait_for(site: Site, job: int) -> None:
    site.cluster.execute(f"CALL backup_wait({job}, '60 s')")


def manifests_of(site: Site, job: int) -> list[Manifest]:
    return [m for m in site.repository().manifests("main").values() if m.job_id == job]


@pytest.fixture(scope="module")
def shared(make_module_site: SiteFactory, pg_major: int) -> Site:
    site = make_module_site(pg_major, settings={"autovacuum": "off"})
    site.cluster.execute("CREATE TABLE kept AS SELECT generate_series(1, 9000) AS i")
    return site


def test_sql_asks_the_agent_backs_up_and_the_catalog_equals_the_repository(
    make_site: SiteFactory, pg_major: int
) -> None:
    """Three kinds from SQL and one from outside; the catalog is the manifests' projection."""
    site = make_site(pg_major, settings={"autovacuum": "off"})
    cluster = site.cluster
    cluster.execute("CREATE TABLE kept AS SELECT generate_series(1, 9000) AS i")
    calls = {
        BackupType.FULL: "backup_full('from SQL')",
        BackupType.DIFF: "backup_differential()",
        BackupType.INCR: "backup_incremental()",
    }
    with agent_in_a_process(site) as process:
        jobs = {}
        for number, (kind, call) in enumerate(calls.items(), 1):
            cluster.execute(f"UPDATE kept SET i = -i WHERE i % 1000 = {number}")
            jobs[kind] = ask(site, call)
            wait_for(site, jobs[kind])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30.0) == 0
    direct = site.incr(label="from outside").backup_id
    repository = site.repository()
    stored = repository.manifests("main")
    assert [m.type for m in stored.values()] == [*calls, BackupType.INCR]
    assert [m.job_id for m in stored.values()] == [*jobs.values(), None]
    rows = cluster.query(
        "SELECT backup_id, type, baseline_id, status, label, cluster, system_identifier::text,"
        " timeline, start_lsn::text, stop_lsn::text, started_at, finished_at, detector,"
        " files_total, pages_total, pages_changed, bytes_read, bytes_changed, bytes_stored,"
        " wal_bytes, corrupt_pages, manifest_hash FROM dbmodule.backup ORDER BY started_at"
    )
    assert rows == [
        (
            *(m.backup_id, m.type, m.baseline_id, m.status, m.label, m.cluster),
            *(str(m.system_identifier), m.timeline),
            *(format_lsn(m.start_lsn), format_lsn(m.stop_lsn), m.started_at, m.finished_at),
            *(m.detector, m.files_total, m.pages_total, m.pages_changed),
            *(m.bytes_read, m.bytes_changed, m.bytes_stored, m.wal_bytes, m.corrupt_pages),
            repository.manifest("main", m.backup_id)[1],
        )
        for m in stored.values()
    ]
    links = cluster.query("SELECT backup_id, baseline_id FROM dbmodule.backup_dependency")
    assert set(links) == {
        (m.backup_id, m.baseline_id) for m in stored.values() if m.baseline_id is not None
    }
    chain = site.app.show(direct).chain
    assert len(chain) == 4
    members = cluster.query(f"SELECT backup_id FROM backup_chain('{direct}') ORDER BY ordinal")
    assert [member for (member,) in members] == chain
    statuses = cluster.query("SELECT state, backup_id FROM dbmodule.job ORDER BY job_id")
    assert statuses == [("completed", m.backup_id) for m in stored.values() if m.job_id]
    with pytest.raises(ServerError, match="foreign key constraint"):
        cluster.execute(f"DELETE FROM dbmodule.backup WHERE backup_id = '{chain[0]}'")
    assert oracles.digests(site.start_copy()) == oracles.digests(cluster)


def test_an_impossible_job_fails_with_the_librarys_words(shared: Site) -> None:
    with pytest.raises(NoBaselineError) as said:
        shared.app.backup(BackupOptions(BackupType.DIFF, baseline_id=BackupId(MISSING)))
    with pytest.raises(ServerError, match="there is no backup"):
        ask(shared, f"backup_differential(baseline => '{MISSING}')")
    with agent_in_a_thread(agent_app(shared)):
        # As where the catalog knows a backup that the repository has lost.
        job: int = shared.cluster.scalar(
            f"INSERT INTO dbmodule.job (type, baseline_id) VALUES ('diff', '{MISSING}')"
            " RETURNING job_id"
        )
        with pytest.raises(ServerError, match=r"is not in the repository"):
            wait_for(shared, job)
    status = shared.cluster.query(
        f"SELECT state, error_message, hint, backup_id FROM backup_status({job})"
    )
    assert status == [("failed", said.value.message, said.value.hint, None)]
    assert manifests_of(shared, job) == []


@pytest.mark.parametrize("listener", [PgPubSubListener, PsycopgListener])
def test_a_notification_through_either_listener_starts_the_backup(
    shared: Site,
    listener: type[PgPubSubListener | PsycopgListener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The queue is read once an hour here, so only the notification can have done it."""
    monkeypatch.setattr("dbmodule.app.open_listener", listener)
    with agent_in_a_thread(agent_app(shared, poll_seconds=3600.0)):
        eventually(
            lambda: (
                shared.cluster.scalar(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE application_name = 'dbmodule listener' AND query LIKE 'LISTEN%'"
                )
                == 1
            )
        )
        job = ask(shared, "backup_full()")
        wait_for(shared, job)
    assert len(manifests_of(shared, job)) == 1


def test_a_killed_agents_backup_is_made_once_by_the_next(shared: Site) -> None:
    """SIGKILL between the first lineage mark and the start of copying."""
    job = ask(shared, "backup_full()")
    with checkpointer_held(shared), agent_in_a_process(shared) as process:
        eventually(lambda: backup_has_begun(shared), 60.0)
        process.kill()
        process.wait()
        assert shared.cluster.scalar(f"SELECT state FROM backup_status({job})") == "running"
    with agent_in_a_process(shared):
        wait_for(shared, job)
    (manifest,) = manifests_of(shared, job)
    done = shared.cluster.query(
        f"SELECT backup_id, attempts FROM dbmodule.job WHERE job_id = {job}"
    )
    assert done == [(manifest.backup_id, 2)]
    assert shared.cluster.query("SELECT FROM pg_replication_slots") == []


def test_a_job_outlives_a_crash_of_the_server(shared: Site) -> None:
    """The server is killed with a backup under way; the agent, in this process, goes on."""
    with agent_in_a_thread(agent_app(shared)):
        with checkpointer_held(shared):
            job = ask(shared, "backup_full()")
            eventually(lambda: backup_has_begun(shared))
            shared.cluster.kill()
        shared.cluster.start()
        wait_for(shared, job)
        later = ask(shared, "backup_incremental()")
        wait_for(shared, later)
    for number in (job, later):
        (manifest,) = manifests_of(shared, number)
        assert shared.cluster.query(
            f"SELECT backup_id FROM dbmodule.backup WHERE backup_id = '{manifest.backup_id}'"
        )
    assert shared.cluster.scalar(f"SELECT attempts FROM dbmodule.job WHERE job_id = {job}") == 2
