"""The agent: takes jobs from the queue, one at a time, and has them run.

It knows ports and callables only. Invariants:

- The queue is the truth; a notification only shortens the wait for the next look at it, which comes
  after every connect and at least every ``poll_seconds``.
- One thread, the caller's, speaks to the queue; a job runs in another, which leaves its progress
  where the first one finds it. So heartbeats go on whatever the job does.
- An outcome counts once the queue has it. Where it could not be recorded, the job stays *running*
  and is put back by the next agent, perhaps this one, after its connection: a job that has been
  claimed before is run only after a look for the backup that it may have made already.
- Another agent's lock ends ours: a job whose agent lock went to another one is cancelled here and
  left to that one, and a backup that still runs there keeps ours waiting, not failing.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from datetime import datetime

from dbmodule.errors import CancelledError, DbmoduleError, LockedError, RepositoryError, ServerError
from dbmodule.ident import BackupId
from dbmodule.ports import Cancelled, Job, JobQueue, Listener, Progress
from dbmodule.reports import BackupReport

logger = logging.getLogger(__name__)

RunJob = Callable[[Job, Progress, Cancelled], BackupReport]
"""Take the backup that a job asks for; one that raises has not committed it.

It must record the job's id with the backup, for `FindBackup`, and raise `CancelledError` soon after
`Cancelled` says so.
"""
FindBackup = Callable[[int], BackupReport | None]
"""The latest committed backup that carries this job id, if there is one."""

_STOP_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class AgentTiming:
    """How long the agent waits for what, in seconds."""

    poll: float = 30.0
    """Between looks at the queue without a notification, and for locks of others."""
    progress: float = 1.0
    """Between two updates of a job's row at least."""
    heartbeat: float = 10.0
    """Between two updates of a job's row at most."""
    first_retry: float = 0.5
    """After a lost connection; doubled at each failure."""
    last_retry: float = 30.0
    """The longest wait before connecting again."""


class Agent:
    """Runs the jobs of one queue. `name` must be unique among the agents that run at one time.

    A job that was claimed more than `max_attempts` times without an outcome fails, so that one
    that brings its agent down does not do so for ever.
    """

    def __init__(
        self,
        name: str,
        *,
        open_queue: Callable[[], JobQueue],
        open_listener: Callable[[], Listener],
        run: RunJob,
        find_backup: FindBackup,
        timing: AgentTiming | None = None,
        max_attempts: int = 5,
    ) -> None:
        self._name = name
        self._open_queue = open_queue
        self._open_listener = open_listener
        self._run = run
        self._find_backup = find_backup
        self._timing = timing or AgentTiming()
        self._max_attempts = max_attempts

    def run_forever(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a job that runs then is cancelled and put back.

        Lost connections are logged and made again; only errors that are not of the server end it.
        """
        retry = _Backoff(self._timing)
        while not stop.is_set():
            try:
                with closing(self._open_queue()) as queue:
                    if not self._become_agent(queue, stop):
                        return
                    with closing(self._open_listener()) as listener:
                        self._put_back_unfinished(queue)
                        logger.info("agent %s is at work", self._name)
                        self._serve(queue, listener, stop, retry)
            except ServerError as error:
                delay = retry.next_delay()
                logger.warning("%s (%s) Connecting again in %.1f s.", error, error.hint, delay)
                stop.wait(delay)

    def _become_agent(self, queue: JobQueue, stop: threading.Event) -> bool:
        """Wait for the agent lock; False when stopped first."""
        told = False
        while not stop.is_set():
            if queue.become_agent(self._name):
                return True
            if not told:
                logger.info("agent %s waits: another agent is at work", self._name)
                told = True
            stop.wait(self._timing.poll)
        return False

    def _put_back_unfinished(self, queue: JobQueue) -> None:
        for job in queue.recover():
            logger.warning("job %d was left unfinished by an agent; put back", job.job_id)
            queue.requeue(job.job_id)

    def _serve(
        self, queue: JobQueue, listener: Listener, stop: threading.Event, retry: _Backoff
    ) -> None:
        while not stop.is_set():
            job = queue.claim(self._name)
            # Not before: a standby lets itself be connected to and read, and refuses this.
            retry.reset()
            if job is not None:
                _Execution(job, self, stop).carry_out(queue)
                continue
            look_again = time.monotonic() + self._timing.poll
            while not stop.is_set() and (left := look_again - time.monotonic()) > 0:
                if listener.wait(min(left, _STOP_LOOK_SECONDS)):
                    break

    def _reopen(self) -> JobQueue | None:
        """A new queue that holds the lock, or None when another agent has it; `ServerError`."""
        queue = self._open_queue()
        try:
            if queue.become_agent(self._name):
                return queue
        except ServerError:
            _close(queue)
            raise
        _close(queue)
        return None


class _Execution:
    """One claimed job, from its start to its outcome in the queue."""

    def __init__(self, job: Job, agent: Agent, stop: threading.Event) -> None:
        self._job = job
        self._agent = agent
        self._timing = agent._timing
        self._stop = stop
        self._cancel = threading.Event()
        self._board = _ProgressBoard()
        self._taken_over = False

    def carry_out(self, queue: JobQueue) -> None:
        """Run the job and record what came of it.

        Raises `ServerError` when the connection was lost meanwhile: the outcome may or may not be
        recorded then, and the caller starts over with a new connection.
        """
        logger.info("job %d: %s backup, attempt %d", *_words(self._job))
        with ThreadPoolExecutor(1, f"job-{self._job.job_id}") as pool:
            future = pool.submit(self._attempt)
            try:
                current, loss = self._supervise(future, queue)
            finally:
                self._cancel.set()
        try:
            if current is not None and not self._taken_over:
                self._settle(future, current, loss)
        finally:
            if current is not None and current is not queue:
                _close(current)
        if loss is not None:
            raise loss

    def _attempt(self) -> BackupReport:
        """In the job's own thread: the backup that was made before, or else a new one."""
        may_exist = self._job.attempts > 1
        while True:
            try:
                found = self._find_own_backup() if may_exist else None
            except RepositoryError as error:
                # Not knowing, it may neither be run again nor be called failed.
                logger.warning("job %d waits for the repository: %s", self._job.job_id, error)
                self._await_turn("waiting for the repository")
                continue
            if found is not None:
                logger.info("job %d had made %s already", self._job.job_id, found.backup_id)
                return found
            if self._job.attempts > self._agent._max_attempts:
                raise DbmoduleError(
                    f"given up after {self._job.attempts - 1} attempts that ended without a result",
                    hint="Look into the agent's log for what ended them, then ask again.",
                )
            try:
                return self._agent._run(self._job, self._board, self._cancel.is_set)
            except LockedError as error:
                # The other run may be this very job's, of an agent that lost its connection.
                logger.info("job %d waits: %s", self._job.job_id, error)
                self._await_turn("waiting for another run")
                may_exist = True

    def _find_own_backup(self) -> BackupReport | None:
        """The backup that this job made before; one of a namesake, older than it, does not count.

        The agent runs on the server's host, so both times are of one clock; the report's may be
        cut to seconds.
        """
        found = self._agent._find_backup(self._job.job_id)
        asked = self._job.requested_at
        if found is None or asked is None:
            return found
        started = datetime.fromisoformat(found.started_at)
        return found if started >= asked.replace(microsecond=0) else None

    def _await_turn(self, phase: str) -> None:
        self._board(phase, 0, 0)
        if self._cancel.wait(self._timing.poll):
            raise CancelledError("stopped while " + phase)

    def _supervise(
        self, future: Future[BackupReport], queue: JobQueue
    ) -> tuple[JobQueue | None, ServerError | None]:
        """Until the job ends: pass progress on, keep the connection, watch for a stop.

        Gives the queue that can be written to now, if any, and the first loss of a connection.
        """
        current: JobQueue | None = queue
        loss: ServerError | None = None
        retry = _Backoff(self._timing)
        beat = time.monotonic()
        connect_at = 0.0
        while not wait([future], timeout=self._timing.progress).done:
            if self._stop.is_set():
                self._cancel.set()
            now = time.monotonic()
            try:
                if current is None:
                    if self._taken_over or now < connect_at:
                        continue
                    current = self._agent._reopen()
                    if current is None:
                        self._lose_job("another agent is at work")
                        continue
                    logger.info("job %d: connected again", self._job.job_id)
                told = self._board.take_news()
                if told is None and now - beat < self._timing.heartbeat:
                    continue
                current.progress(self._job.job_id, *(told or self._board.latest))
                beat = now
                retry.reset()
            except LockedError as error:
                self._lose_job(error.message)
            except ServerError as error:
                loss = loss or error
                delay = retry.next_delay()
                logger.warning(
                    "job %d runs on: %s; connecting again in %.1f s",
                    self._job.job_id,
                    error,
                    delay,
                )
                connect_at = now + delay
                if current is not None and current is not queue:
                    _close(current)
                current = None
        return current, loss

    def _lose_job(self, reason: str) -> None:
        if not self._taken_over:
            logger.warning("job %d is cancelled here: %s", self._job.job_id, reason)
        self._taken_over = True
        self._cancel.set()

    def _settle(
        self, future: Future[BackupReport], queue: JobQueue, loss: ServerError | None
    ) -> None:
        """Tell the queue what came of the job; raises `ServerError`."""
        job_id = self._job.job_id
        error = future.exception()
        try:
            if error is None:
                report = future.result()
                logger.info("job %d completed: %s", job_id, report.backup_id)
                queue.complete(job_id, BackupId(report.backup_id), dataclasses.asdict(report))
            elif isinstance(error, CancelledError) and self._stop.is_set():
                logger.info("job %d is put back: the agent stops", job_id)
                queue.requeue(job_id)
            elif isinstance(error, ServerError) and loss is not None:
                logger.warning("job %d is put back: the server went away: %s", job_id, error)
                queue.requeue(job_id)
            elif isinstance(error, DbmoduleError):
                logger.error("job %d failed: %s", job_id, error)
                queue.fail(job_id, error.as_dict())
            else:
                logger.error("job %d failed unexpectedly", job_id, exc_info=error)
                queue.fail(job_id, _unexpected(error))
        except LockedError as lost:
            logger.warning("job %d: %s", job_id, lost)


class _ProgressBoard:
    """Where the job's thread leaves its progress; a `dbmodule.ports.Progress`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest = ("starting", 0, 0)
        self._news = False

    def __call__(self, phase: str, done: int, total: int) -> None:
        with self._lock:
            self._latest = (phase, done, total)
            self._news = True

    @property
    def latest(self) -> tuple[str, int, int]:
        with self._lock:
            return self._latest

    def take_news(self) -> tuple[str, int, int] | None:
        """The latest progress, once."""
        with self._lock:
            news, self._news = self._news, False
            return self._latest if news else None


class _Backoff:
    """Ever longer waits between attempts to connect, up to a limit."""

    def __init__(self, timing: AgentTiming) -> None:
        self._timing = timing
        self._delay = timing.first_retry

    def reset(self) -> None:
        self._delay = self._timing.first_retry

    def next_delay(self) -> float:
        delay = self._delay
        self._delay = min(2 * delay, self._timing.last_retry)
        return delay


def _close(queue: JobQueue) -> None:
    # Its connection may be dead already, which is then what closing it says.
    with suppress(ServerError):
        queue.close()


def _words(job: Job) -> tuple[int, str, int]:
    return job.job_id, str(job.type), job.attempts


def _unexpected(error: BaseException) -> dict[str, str]:
    return {
        "code": DbmoduleError.code,
        "message": f"{type(error).__name__}: {error}",
        "hint": "The agent's log has the traceback; please report it.",
    }
