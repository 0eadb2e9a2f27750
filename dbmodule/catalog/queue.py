"""The queue of jobs, worked on by the one session that holds the agent lock.

The lock is a session advisory lock, and every statement of the queue runs on the session that
holds it. So a statement that succeeds proves that its agent is still the only one: when the session
is lost the lock goes with it, and what the former holder still says reaches nobody. Claims commit
before work starts; a job that is no longer this agent's raises `LockedError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, RowMapping, func, select, update

from dbmodule.catalog.engine import make_engine, server_errors
from dbmodule.catalog.tables import job
from dbmodule.errors import LockedError, ServerError
from dbmodule.ident import BackupId, BackupType
from dbmodule.ports import Job

AGENT_LOCK = (0x64626D6F, 1)
"""``dbmo`` in ASCII and a number: ``dbmodule.agent_is_running()`` looks for the same."""

_FIELDS = (
    job.c.job_id,
    job.c.type,
    job.c.baseline_id,
    job.c.label,
    job.c.detect,
    job.c.attempts,
    job.c.requested_at,
)


class SqlJobQueue:
    """`dbmodule.ports.JobQueue` on ``dbmodule.job``; opens its session at once."""

    def __init__(self, dsn: str) -> None:
        self._agent = ""
        self._engine = make_engine(dsn)
        with server_errors("connect to the job queue"):
            self._connection = self._engine.connect()

    def become_agent(self, agent: str) -> bool:
        with self._transaction("take the agent lock") as connection:
            taken: bool = connection.execute(
                select(func.pg_try_advisory_lock(*AGENT_LOCK))
            ).scalar_one()
            # The first look at the table tells a missing extension now, not at the first job.
            connection.execute(select(job.c.job_id).limit(0))
        if taken:
            self._agent = agent
        return taken

    def recover(self) -> list[Job]:
        statement = select(*_FIELDS).where(job.c.state == "running").order_by(job.c.job_id)
        with self._transaction("look for unfinished jobs") as connection:
            return [_job(row) for row in connection.execute(statement).mappings()]

    def claim(self, agent: str) -> Job | None:
        oldest = (
            select(job.c.job_id)
            .where(job.c.state == "queued")
            .order_by(job.c.job_id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        statement = (
            update(job)
            .where(job.c.job_id == oldest.scalar_subquery())
            .values(
                state="running",
                claimed_by=agent,
                claimed_at=func.clock_timestamp(),
                heartbeat_at=func.clock_timestamp(),
                attempts=job.c.attempts + 1,
                phase="starting",
            )
            .returning(*_FIELDS)
        )
        with self._transaction("claim a job") as connection:
            row = connection.execute(statement).mappings().one_or_none()
        return None if row is None else _job(row)

    def progress(self, job_id: int, phase: str, done: int, total: int) -> None:
        self._update(job_id, "tell progress", phase=phase, bytes_done=done, bytes_total=total)

    def complete(self, job_id: int, backup_id: BackupId, report: dict[str, Any]) -> None:
        self._update(
            job_id,
            "complete a job",
            state="completed",
            phase="",
            backup_id=backup_id,
            report=report,
            finished_at=func.clock_timestamp(),
        )

    def fail(self, job_id: int, error: dict[str, str]) -> None:
        self._update(
            job_id,
            "record a failed job",
            state="failed",
            error={key: _storable(value) for key, value in error.items()},
            finished_at=func.clock_timestamp(),
        )

    def requeue(self, job_id: int) -> None:
        # Not bound to this agent: an earlier one's jobs are put back, too.
        statement = (
            update(job)
            .where(job.c.job_id == job_id, job.c.state == "running")
            .values(
                state="queued",
                claimed_by=None,
                claimed_at=None,
                heartbeat_at=None,
                phase="",
                bytes_done=0,
                bytes_total=0,
            )
        )
        with self._transaction("put a job back") as connection:
            connection.execute(statement)

    def close(self) -> None:
        with server_errors("close the job queue"):
            self._connection.close()

    def _update(self, job_id: int, action: str, **values: Any) -> None:
        statement = (
            update(job)
            .where(
                job.c.job_id == job_id,
                job.c.state == "running",
                job.c.claimed_by == self._agent,
            )
            .values(heartbeat_at=func.clock_timestamp(), **values)
            .returning(job.c.job_id)
        )
        with self._transaction(action) as connection:
            mine = connection.execute(statement).one_or_none() is not None
        if not mine:
            raise LockedError(
                f"job {job_id} is no longer run by agent {self._agent}",
                hint="Another agent took it over, or it was cancelled; nothing needs to be done.",
            )

    @contextmanager
    def _transaction(self, action: str) -> Iterator[Connection]:
        if self._connection.closed or self._connection.invalidated:
            raise ServerError(
                f"cannot {action}: the connection is lost", hint="Connect again and ask again."
            )
        with server_errors(action), self._connection.begin():
            yield self._connection


def _job(row: RowMapping) -> Job:
    baseline = row["baseline_id"]
    return Job(
        job_id=row["job_id"],
        type=BackupType(row["type"]),
        baseline_id=None if baseline is None else BackupId(baseline),
        label=row["label"],
        detect=row["detect"],
        attempts=row["attempts"],
        requested_at=row["requested_at"],
    )


def _storable(value: str) -> str:
    """`value` without what jsonb refuses: NUL, and halves of surrogate pairs from file names."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
