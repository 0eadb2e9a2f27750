"""An agent in a process of its own, for tests that kill it: ``agent_process DSN LEDGER NAME``.

Its backups are lines in the file LEDGER: ``start JOB`` when one begins, ``commit JOB`` when it is
done. A backup lasts while the file ``LEDGER.hold`` exists. SIGTERM stops the agent cleanly.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dbmodule.agent import Agent, AgentTiming
from dbmodule.catalog import SqlJobQueue
from dbmodule.errors import CancelledError
from dbmodule.notify import open_listener
from dbmodule.ports import Cancelled, Job, Progress
from dbmodule.reports import BackupReport

FAST = AgentTiming(poll=0.3, progress=0.05, heartbeat=0.2, first_retry=0.05, last_retry=0.2)


def report_for(job_id: int) -> BackupReport:
    return BackupReport(
        backup_id=f"20260131-235959-full-{job_id:06x}",
        type="full",
        baseline_id=None,
        status="completed",
        label="",
        cluster="main",
        system_identifier="1",
        server_version="18",
        timeline=1,
        start_lsn="0/1",
        stop_lsn="0/2",
        detector="content",
        detector_reason="",
        files_total=0,
        files_read=0,
        files_skipped=0,
        pages_total=0,
        pages_changed=0,
        pages_stored=0,
        bytes_total=0,
        bytes_read=0,
        bytes_changed=0,
        bytes_stored=0,
        wal_bytes=0,
        pages_verified=0,
        corrupt_pages=0,
        divergent_pages=0,
        hint_pages=0,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        finished_at="",
        seconds=0.0,
        phases={},
    )


class LedgerBackups:
    """Backups that leave lines in a file, and that a test can hold up."""

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger
        self.hold = ledger.with_suffix(".hold")
        self.before_commit: Callable[[], object] = lambda: None

    def run(self, job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        self._write(f"start {job.job_id}")
        progress("copy", 1, 4)
        while self.hold.exists():
            if cancelled():
                raise CancelledError("cancelled")
            time.sleep(0.01)
        self.before_commit()
        self._write(f"commit {job.job_id}")
        return report_for(job.job_id)

    def find(self, job_id: int) -> BackupReport | None:
        return report_for(job_id) if f"commit {job_id}" in self.lines() else None

    def lines(self) -> list[str]:
        return self.ledger.read_text().splitlines() if self.ledger.exists() else []

    def _write(self, line: str) -> None:
        with self.ledger.open("a") as file:
            file.write(line + "\n")


def make_agent(dsn: str, backups: LedgerBackups, name: str) -> Agent:
    return Agent(
        name,
        open_queue=lambda: SqlJobQueue(dsn),
        open_listener=lambda: open_listener(dsn),
        run=backups.run,
        find_backup=backups.find,
        timing=FAST,
    )


def main() -> None:
    dsn, ledger, name = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    make_agent(dsn, LedgerBackups(Path(ledger)), name).run_forever(stop)


if __name__ == "__main__":
    main()
