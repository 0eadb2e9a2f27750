"""What the use cases need from the world outside, as Protocols; `dbmodule.app` fills them in.

Only values cross these borders: no driver's, engine's or store's own types. Every method may raise
the errors named in its docstring and no others on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from dbmodule.ident import BackupId, BackupType, Lsn, SystemId, Timeline
from dbmodule.manifest import Corruption
from dbmodule.registry import FileIdentity, RelationRow

Buffer = bytes | bytearray | memoryview


class ObjectStore(Protocol):
    """Immutable named objects. Names are relative, ``/``-separated, of ``[A-Za-z0-9._-]``."""

    url: str

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        """Create an object, durable when this returns, and give its size in bytes.

        Atomic: a reader sees the whole object or none. Raises `ObjectExistsError` when the name is
        taken (then nothing changed) and `RepositoryError` when the store fails.
        """
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[offset, offset + length)``, cut at the object's end; `ObjectMissingError`."""
        ...

    def size(self, name: str) -> int:
        """Size in bytes; `ObjectMissingError`."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Names that start with `prefix`, in ascending order."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; no error when it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Tells one process from all others, on any host, as the owner of a lock."""

    host: str
    """For people."""
    boot_id: str
    namespace: str
    """Within which `pid` means something."""
    pid: int
    started: int
    """In a unit of the host's own, 0 where it is not known: numbers of processes are used again."""


class Processes(Protocol):
    """This process, and what can be known of others."""

    def me(self) -> ProcessIdentity: ...

    def runs(self, other: ProcessIdentity) -> bool | None:
        """True: it is at work. False: it has ended. None: that cannot be known from here, or it
        is there but stopped.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """Which server this is and how it is set, as far as a backup depends on it."""

    system_identifier: SystemId
    catalog_version: int
    version_num: int
    """``server_version_num``: 180006 for 18.6."""
    version: str
    timeline: Timeline
    block_size: int
    blocks_per_segment: int
    wal_segment_size: int
    data_checksums: bool
    wal_log_hints: bool
    wal_level: str
    summarize_wal: bool
    full_page_writes: bool
    in_recovery: bool
    data_directory: str
    port: int
    started_at: float
    """``pg_postmaster_start_time()`` as seconds since the epoch."""
    lsn: Lsn
    """How far WAL has come."""

    @property
    def major(self) -> int:
        return self.version_num // 10000


@dataclass(frozen=True, slots=True)
class StoppedBackup:
    """What ``pg_backup_stop`` returned."""

    stop_lsn: Lsn
    backup_label: str
    tablespace_map: str


class Server(Protocol):
    """One session on a running server, held open from before the start to after the stop."""

    def identify(self) -> ServerIdentity: ...

    def lock(self) -> None:
        """Keep other backups of this cluster out until the session ends; `LockedError`."""
        ...

    def reserve_wal(self) -> None:
        """Keep WAL from now on, until the session ends (a temporary physical slot)."""
        ...

    def start_backup(self, label: str, *, fast: bool) -> Lsn:
        """``pg_backup_start``: the LSN from which recovery will have to replay."""
        ...

    def stop_backup(self) -> StoppedBackup:
        """``pg_backup_stop``; returns once the stop record is on disk."""
        ...

    def ensure_alive(self) -> None:
        """Raise `ServerError` if the session is gone (a backup without it is not one)."""
        ...

    def missing_grants(self) -> list[str]:
        """SQL statements that a superuser must run before this role can take backups."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LineageMark:
    """A random row that a backup leaves in the catalog; seeing it proves an ancestor."""

    mark: str
    """32 lower-case hexadecimal digits."""
    xmin: int
    """The full 64-bit id of the transaction that wrote the row."""
    path: str = ""
    """File of the table's first segment, relative to the data directory."""
    block: int = 0
    item: int = 0
    """With `block`, the row's ``ctid``: a stopped cluster is asked by reading the page itself."""


@dataclass(frozen=True, slots=True)
class BackupRecord:
    """A committed backup as the SQL catalog knows it: a projection of its manifest."""

    backup_id: BackupId
    type: BackupType
    baseline_id: BackupId | None
    status: str
    label: str
    cluster: str
    system_identifier: SystemId
    timeline: Timeline
    start_lsn: Lsn
    stop_lsn: Lsn
    started_at: datetime
    finished_at: datetime
    detector: str
    files_total: int
    pages_total: int
    pages_changed: int
    bytes_read: int
    bytes_changed: int
    bytes_stored: int
    wal_bytes: int
    corrupt_pages: int
    manifest_hash: str
    """64 hexadecimal digits."""
    relations: tuple[RelationRow, ...] = ()
    corruption: tuple[Corruption, ...] = ()


class RelationId(NamedTuple):
    """A relation as the data directory knows it."""

    tablespace: int
    database: int
    """0 for relations that all databases share."""
    relfilenode: int


class RelationName(NamedTuple):
    """What a relation was called at one moment; None where that could not be found out."""

    database: str | None = None
    """None, too, for relations that all databases share."""
    relation: str | None = None
    """Schema-qualified."""
    table: str | None = None
    """The table that an index or TOAST relation belongs to; itself of any other relation."""


class RelationNames(Protocol):
    """What relations are called now, as far as the server's catalogs can be read."""

    def resolve(self, relations: Iterable[RelationId]) -> dict[RelationId, RelationName]:
        """Names of those of which anything is known.

        A catalog that cannot be read is never an error: names are only for people.
        """
        ...


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One thing that was listed in a data directory."""

    path: str
    """Relative, POSIX; tablespaces through their link: ``pg_tblspc/16400/PG_…``."""
    kind: str
    """``file``, ``directory`` or ``symlink``."""
    mode: int
    size: int = 0
    target: str = ""
    """Of a symbolic link."""


class SourceFile(Protocol):
    """A file of the data directory, open for reading while the server may change it."""

    mode: int

    def identity(self) -> FileIdentity:
        """``fstat`` of the open descriptor."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; fewer bytes only at the file's end. `SourceError`."""
        ...

    def close(self) -> None: ...


class DataDirectory(Protocol):
    """A data directory, as files: no decisions."""

    path: str

    def walk(self) -> Iterator[SourceEntry]:
        """Everything that a backup has to look at, parents before children; lazily.

        Links are followed once where PostgreSQL makes them (tablespaces); of a tablespace only
        `version_directory` is listed. Any other link raises `SourceError`. What vanishes while
        listing is left out.
        """
        ...

    def open(self, path: str) -> SourceFile | None:
        """None when it is not there (any more)."""
        ...

    def read(self, path: str) -> bytes | None:
        """A small file in one call; None when it is not there."""
        ...

    def names(self, path: str) -> list[str]:
        """What lies in a directory; nothing when it is not there."""
        ...

    def owner(self) -> str:
        """Name of the operating system user who owns the directory."""
        ...


class TargetFile(Protocol):
    """A file of a restore target, created with its final length and a zero for every byte."""

    def write(self, data: Buffer, offset: int) -> None: ...

    def finish(self) -> int:
        """Make it durable, close it, and give the CRC-32C of its contents."""
        ...

    def abandon(self) -> None:
        """Close it after an error."""
        ...


class TargetDirectory(Protocol):
    """A directory that a data directory is being written into. Raises `TargetError`.

    Nothing outside it and the given tablespace locations is ever written to; every location is
    empty or absent at first.
    """

    path: str

    def begin(self) -> None:
        """Check that it is safe to write to, create it, and mark it as unfinished."""
        ...

    def make_directory(self, path: str, mode: int) -> None: ...

    def make_link(self, path: str) -> None:
        """The link of the tablespace ``pg_tblspc/OID`` to its location here."""
        ...

    def create(self, path: str, mode: int, size: int) -> TargetFile: ...

    def exists(self, path: str) -> bool: ...

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> int:
        """Create or replace a small file, mode 0600; gives its CRC-32C."""
        ...

    def finish(self, control_file: str) -> None:
        """Put the control file in place, durably, after everything else is durable."""
        ...


class Catalog(Protocol):
    """The extension's tables, through short transactions of their own."""

    def leave_mark(self, backup_id: BackupId, position: str) -> LineageMark:
        """Commit a new mark; `position` is ``'start'`` or ``'stop'``. Raises `ServerError`."""
        ...

    def sees_marks(self, marks: Sequence[LineageMark]) -> bool:
        """Are all of them visible here, each written by the transaction recorded for it?"""
        ...

    def unknown(self, backups: Sequence[BackupId]) -> set[BackupId]:
        """Those of `backups` that were not recorded yet."""
        ...

    def record(self, backup: BackupRecord) -> None:
        """Project a committed backup into the catalog; recording one twice changes nothing."""
        ...

    def forget(self, backups: Collection[BackupId]) -> set[BackupId]:
        """Leave out backups that were removed, and give those that are not recorded (any more).

        One that a backup depends on which is not among them stays.
        """
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of work that a SQL function enqueued."""

    job_id: int
    type: BackupType
    baseline_id: BackupId | None
    label: str
    detect: str
    attempts: int = 1
    """How often it was claimed, this time included; above 1 its backup may exist already."""
    requested_at: datetime | None = None
    """Job ids begin anew with a new extension: what is older than this belongs to another job."""


class JobQueue(Protocol):
    """The table ``dbmodule.job``: the truth, of which NOTIFY is only a hint.

    All methods raise `ServerError` when the server cannot be reached; the caller reconnects and
    asks again, and no job is lost or done twice. `progress`, `complete` and `fail` raise
    `LockedError` when the job is no longer this agent's.
    """

    def become_agent(self, agent: str) -> bool:
        """Take the agent lock on this connection; False when another holds it.

        `agent` must be unique among agents that run at one time (host name and process id).
        """
        ...

    def recover(self) -> list[Job]:
        """Jobs that an earlier agent claimed and did not end; the caller decides their fate."""
        ...

    def claim(self, agent: str) -> Job | None:
        """Claim the oldest queued job in a transaction that has committed on return."""
        ...

    def progress(self, job_id: int, phase: str, done: int, total: int) -> None:
        """Heartbeat and progress in bytes."""
        ...

    def complete(self, job_id: int, backup_id: BackupId, report: dict[str, Any]) -> None: ...

    def fail(self, job_id: int, error: dict[str, str]) -> None:
        """`error` is ``DbmoduleError.as_dict()``."""
        ...

    def requeue(self, job_id: int) -> None:
        """Put a running job back to where it was in the queue."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """LISTEN on ``dbmodule_job``; executes nothing else on its connection."""

    def wait(self, timeout: float) -> bool:
        """True when a notification came within `timeout` seconds; `ServerError` when lost."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Where a long job tells how far it is. Called from one thread; must return quickly."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`done` and `total` are bytes; `total` is 0 where it is not known."""
        ...


Cancelled = Callable[[], bool]
"""Asked between units of work; True stops the job with `CancelledError`."""


def no_progress(phase: str, done: int, total: int) -> None:
    """The `Progress` that tells nobody."""


def never_cancelled() -> bool:
    return False
