"""The steps that an online and an offline backup share: baseline, files, WAL, commit."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from dbmodule import controlfile, datafile, wal, walsummary
from dbmodule.backup import baseline as ancestry
from dbmodule.backup import record, summaries, walfiles
from dbmodule.backup.baseline import Position
from dbmodule.backup.batch import Suspect
from dbmodule.backup.copier import Copier
from dbmodule.backup.copying import CopyTotals, add_result, copy_files
from dbmodule.backup.earlier import earlier_pages
from dbmodule.backup.plan import make_plan
from dbmodule.backup.values import BaselineView, CopySettings, NoBaseline
from dbmodule.chain import choose_baseline
from dbmodule.controlfile import ControlFile
from dbmodule.datafile import CONTROL_FILE
from dbmodule.errors import (
    BrokenChainError,
    CancelledError,
    NotAnAncestorError,
    RefusedError,
    SourceError,
)
from dbmodule.ident import (
    BackupId,
    BackupType,
    Lsn,
    Timeline,
    new_backup_id,
)
from dbmodule.manifest import (
    COMPLETED,
    COMPLETED_WITH_CORRUPTION,
    Manifest,
    Mark,
    Root,
)
from dbmodule.ports import (
    Cancelled,
    Catalog,
    DataDirectory,
    Progress,
    RelationNames,
    Server,
    ServerIdentity,
)
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity, RelationRow
from dbmodule.reports import BackupOptions
from dbmodule.repository.locks import Lock, Locks, backup_lock
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry, TableWriter, encode_root
from dbmodule.repository.writer import FrameWriter

log = logging.getLogger(__name__)

_CONTROL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything outside that one backup works with."""

    repository: Repository
    cluster: str
    directory: DataDirectory
    server: Server | None
    """None for an offline backup."""
    catalog: Catalog | None
    """None where the extension is not used."""
    names: RelationNames | None
    """None where no server can be asked."""
    boot_id: str
    """Of the host; empty where it cannot be known."""
    host: str
    """The host's name."""
    threads: int
    compression_level: int
    locks: Locks


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a backup builds on; an empty chain and no view for a full."""

    chain: list[Manifest]
    view: ancestry.ChainBaseline | None
    detector: str
    reason: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A backup that may read files now."""

    identity: ServerIdentity
    chosen: Chosen
    start_lsn: Lsn
    called_ns: int
    """When the start was asked for."""
    history: str


@dataclass(frozen=True, slots=True)
class Ended:
    """What the server, or the control file of a stopped one, said at the end."""

    stop_lsn: Lsn
    backup_label: str = ""
    tablespace_map: str = ""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class Copied:
    """A backup all of whose parts are stored, but not yet committed."""

    begun: Begun
    ended: Ended
    detector: str
    detector_reason: str
    tablespaces: dict[str, str]
    wal_bytes: int
    replayed: wal.WalSummary


@dataclass(frozen=True, slots=True)
class Taken:
    """A committed backup, or one that was only rehearsed."""

    manifest: Manifest
    relations: list[RelationRow]
    """Most changed pages first."""


@dataclass(slots=True)
class Phases:
    """Seconds per phase, and where the progress goes."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 0)
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.seconds[name] = round(spent, 3)


def read_control_file(directory: DataDirectory) -> tuple[bytes, ControlFile]:
    """``pg_control`` in one call, again until its CRC is right; raises `SourceError`."""
    deadline = time.monotonic() + _CONTROL_SECONDS
    while True:
        data = directory.read(CONTROL_FILE)
        if data is None:
            raise SourceError(
                f"{directory.path} holds no {CONTROL_FILE}",
                hint="Set server.pgdata to the server's data directory.",
            )
        try:
            return data, controlfile.parse(data)
        except SourceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Run(ABC):
    """One backup while it is being taken."""

    def __init__(
        self,
        environment: Environment,
        options: BackupOptions,
        job_id: int | None,
        progress: Progress,
        cancelled: Cancelled,
    ) -> None:
        self.env = environment
        self.options = options
        self.job_id = job_id
        self.progress = progress
        self._asked_to_stop = cancelled
        self._lock: Lock | None = None
        self.phases = Phases(progress)
        self.started_at = datetime.now(UTC)
        self.backup_id, self._fallback_id = self._new_ids()

    def _new_ids(self) -> tuple[BackupId, BackupId | None]:
        """The id of this backup, and the one it has if it becomes a full instead."""
        taken = self.env.repository.taken_ids(self.env.cluster)
        mine = new_backup_id(self.options.type, self.started_at, taken)
        if self.options.fallback is None:
            return mine, None
        return mine, new_backup_id(self.options.fallback, self.started_at, taken)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other run that could commit a backup of this cluster out meanwhile.

        Baselines are chosen, and packs looked up, only within; expiry relies on it. Raises
        `LockedError` when another run is alive, or takes this one for dead.
        """
        if self.options.dry_run:
            yield
            return

        def commits() -> list[tuple[str, BackupId]]:
            self.backup_id, self._fallback_id = self._new_ids()
            ids = (self.backup_id, self._fallback_id)
            return [(self.env.cluster, backup) for backup in ids if backup is not None]

        name = backup_lock(self.env.cluster)
        with self.env.locks.acquire(name, commits, cancelled=self._asked_to_stop) as self._lock:
            try:
                yield
            except CancelledError:
                if self._lock.superseded:
                    raise self._lock.lost() from None
                raise

    def cancelled(self) -> bool:
        """Is there no use in going on?"""
        return self._asked_to_stop() or (self._lock is not None and self._lock.superseded)

    @abstractmethod
    def take(self) -> Taken:
        """Go through the whole protocol."""

    # -- baseline -------------------------------------------------------------------------------

    def choose(self, now: Position, proven: Callable[[Manifest], bool]) -> Chosen:
        """What this backup builds on, and how it finds changes: decided before anything begins.

        Raises a `RefusedError`, unless a full was asked for as the way out: then it is a full.
        """
        if self.options.type is BackupType.FULL:
            return Chosen([], None, "full", "every page is read and stored")
        try:
            chain = self._chain()
            ancestry.check_cluster(chain[-1], now)
            ancestry.check_history(chain[-1], now)
            detector, reason = self._detector(chain[-1], proven(chain[-1]), now)
            here = ancestry.Host(self.env.host, self.env.boot_id, now.timeline)
            view = ancestry.ChainBaseline(self.env.repository, chain, detector=detector, here=here)
            return Chosen(chain, view, detector, reason)
        except RefusedError as error:
            if self.options.fallback is not BackupType.FULL or self._fallback_id is None:
                raise
            log.warning("a full backup is taken instead: %s", error)
            self.options = replace(
                self.options, type=BackupType.FULL, baseline_id=None, detect="auto"
            )
            self.backup_id = self._fallback_id
            return Chosen([], None, "full", f"no baseline: {error}")

    def _chain(self) -> list[Manifest]:
        backups, unreadable = self.env.repository.readable_manifests(self.env.cluster)
        if self.options.baseline_id in unreadable:
            raise BrokenChainError(
                f"the baseline {self.options.baseline_id} cannot be built on:"
                f" {unreadable[self.options.baseline_id]}",
                hint="Name another baseline, or take a full backup.",
            )
        for error in unreadable.values():
            log.warning("a backup is passed over: %s", error)
        for condemned in self.env.repository.condemned_backups(self.env.cluster):
            backups.pop(condemned, None)
        chosen = choose_baseline(backups, self.options.type, self.options.baseline_id)
        return ancestry.baseline_chain(self.env.repository, backups, chosen)

    def _detector(self, baseline: Manifest, proven: bool, now: Position) -> tuple[str, str]:
        """Which detector runs, and why; raises `NotAnAncestorError` when it may not."""
        asked = self.options.detect
        if asked == "content":
            return "content", "asked for"
        reason = ""
        if not proven:
            reason = f"no lineage mark proves {baseline.backup_id} to be an ancestor"
        elif baseline.data_checksums != now.data_checksums:
            reason = f"data checksums were switched since {baseline.backup_id}"
        if reason and asked == "auto":
            return "content", reason
        if reason:
            raise NotAnAncestorError(
                f"the {asked} detector cannot be used: {reason}",
                hint="Use --detect content, or take a full backup.",
            )
        if asked == "scan":
            return "scan", "asked for"
        if now.major >= walsummary.FIRST_MAJOR:
            return "wal", "WAL summaries cover all changes since the baseline"
        return "scan", f"PostgreSQL {now.major} has no WAL summaries"

    def follow(self, chosen: Chosen, now: Position, *, wait: bool) -> tuple[BaselineView, str, str]:
        """The baseline as the copier sees it, the detector and the reason for it, now that the
        backup has begun at `now`.

        The scan detector takes over where WAL summaries leave a gap.
        """
        if chosen.view is None:
            earlier = earlier_pages(self.env.repository, self.env.cluster, now.system_identifier)
            return NoBaseline(earlier), chosen.detector, chosen.reason
        ancestry.check_history(chosen.chain[-1], now)
        if chosen.detector == "wal":
            with self.phases("summaries"):
                try:
                    chosen.view.changed = summaries.changed_since(
                        chosen.chain[-1],
                        now,
                        self.env.directory,
                        wait=wait,
                        cancelled=self.cancelled,
                    )
                except summaries.NoSummariesError as error:
                    chosen.view.detector = "scan"
                    off = not (wait or self.options.offline)
                    return chosen.view, "scan", "summarize_wal is off" if off else str(error)
        return chosen.view, chosen.detector, chosen.reason

    # -- the whole -----------------------------------------------------------------------------

    def back_up(
        self, begun: Begun, ensure_alive: Callable[[], None], end: Callable[[], Ended]
    ) -> Taken:
        """Everything from the first file to the manifest; `end` is asked when all are copied."""
        identity = begun.identity
        now = position_of(identity, begun.start_lsn, begun.history)
        baseline, detector, reason = self.follow(begun.chosen, now, wait=identity.summarize_wal)
        settings = CopySettings(
            begun.start_lsn,
            begun.called_ns,
            identity.data_checksums,
            identity.wal_segment_size,
            identity.blocks_per_segment,
        )
        frames = self.env.repository.writer(self.env.compression_level)
        try:
            tables = TableWriter(frames)
            totals, tablespaces = self.copy(frames, tables, settings, baseline, ensure_alive)
            ended = end()
            needed = walfiles.WalRange(
                identity.major,
                identity.system_identifier,
                identity.timeline,
                identity.wal_segment_size,
                begun.start_lsn,
                ended.stop_lsn,
            )
            wal_bytes, replayed = self.store_wal(needed, begun.history, tables, frames)
            copied = Copied(begun, ended, detector, reason, tablespaces, wal_bytes, replayed)
            return self.commit(copied, totals, frames, tables)
        finally:
            frames.close()

    # -- files ----------------------------------------------------------------------------------

    def copy(
        self,
        frames: FrameWriter,
        tables: TableWriter,
        settings: CopySettings,
        baseline: BaselineView,
        ensure_alive: Callable[[], None],
    ) -> tuple[CopyTotals, dict[str, str]]:
        """Copy the data directory, ``pg_control`` last; totals and tablespaces."""
        with self.phases("list"):
            plan = make_plan(self.env.directory.walk())
        none = FileIdentity(0, 0, 0, 0, 0)
        for entry in plan.directories:
            tables.add_file(
                FileEntry(entry.path, EntryKind.DIRECTORY, EntryFlag.NONE, entry.mode, 0, none)
            )
        for entry in plan.links:
            tables.add_file(
                FileEntry(
                    entry.path,
                    EntryKind.SYMLINK,
                    EntryFlag.NONE,
                    entry.mode,
                    0,
                    none,
                    target=entry.target,
                )
            )
        copier = Copier(self.env.directory, frames, settings, baseline, self.cancelled)
        with self.phases("copy"):
            totals = copy_files(
                plan.files,
                copier,
                tables,
                start_lsn=settings.start_lsn,
                threads=self.env.threads,
                ensure_alive=ensure_alive,
                progress=self.progress,
                cancelled=self.cancelled,
            )
            data, _ = read_control_file(self.env.directory)
            file = self.env.directory.open(CONTROL_FILE)
            if file is None:
                raise SourceError(f"{CONTROL_FILE} has vanished")
            try:
                before = baseline.entry(CONTROL_FILE)
                control = copier.store_bytes(CONTROL_FILE, data, file, before)
            finally:
                file.close()
            totals.count(control)
            add_result(tables, control)
        return totals, plan.tablespaces

    def store_wal(
        self,
        needed: walfiles.WalRange,
        history: str,
        tables: TableWriter,
        frames: FrameWriter,
    ) -> tuple[int, wal.WalSummary]:
        """WAL and history files; their bytes, and what replaying them does."""
        with self.phases("wal"):
            names = wal.segments_between(
                needed.timeline, needed.start_lsn, needed.stop_lsn, needed.segment_size
            )
            total, summary = walfiles.store_wal(self.env.directory, needed, tables, frames, names)
            if history:
                name = wal.history_name(needed.timeline)
                walfiles.add_file(tables, frames, f"pg_wal/{name}", history.encode())
        return total, summary

    def history(self, timeline: Timeline) -> str:
        """The history file of `timeline`, as the server has it."""
        if timeline == 1:
            return ""
        data = self.env.directory.read(f"pg_wal/{wal.history_name(timeline)}")
        if data is None:
            raise SourceError(
                f"the history file of timeline {timeline} is not in pg_wal",
                hint="Restore it from the WAL archive; differentials cannot be checked without.",
            )
        return data.decode("utf-8", "replace")

    # -- the end --------------------------------------------------------------------------------

    def commit(
        self, copied: Copied, totals: CopyTotals, frames: FrameWriter, tables: TableWriter
    ) -> Taken:
        """Make everything durable, then write the manifest."""
        begun, ended, identity = copied.begun, copied.ended, copied.begun.identity
        chain = begun.chosen.chain
        with self.phases("commit"):
            relations = record.named(self.env.names, totals.relations)
            tables.add_relations(relations)
            described = tables.finish()
            packs = frames.flush()
            root = frames.store_root(encode_root(described, packs))
            frames.check_references()
        corrupt = [s for s in totals.suspects if not _excused(s, begun.start_lsn, ended.stop_lsn)]
        baseline = chain[-1] if chain else None
        repository = self.env.repository
        hashes = repository.check_chain(chain)
        manifest = Manifest(
            backup_id=self.backup_id,
            type=self.options.type,
            cluster=self.env.cluster,
            baseline_id=None if baseline is None else baseline.backup_id,
            baseline_hash=hashes[-1] if hashes else None,
            status=COMPLETED_WITH_CORRUPTION if corrupt else COMPLETED,
            label=self.options.label,
            job_id=self.job_id,
            offline=self.options.offline,
            system_identifier=identity.system_identifier,
            server_version=identity.version,
            version_num=identity.version_num,
            catalog_version=identity.catalog_version,
            block_size=identity.block_size,
            blocks_per_segment=identity.blocks_per_segment,
            wal_segment_size=identity.wal_segment_size,
            data_checksums=identity.data_checksums,
            wal_log_hints=identity.wal_log_hints,
            timeline=identity.timeline,
            start_lsn=begun.start_lsn,
            stop_lsn=ended.stop_lsn,
            history=begun.history,
            marks=ended.marks,
            boot_id=self.env.boot_id,
            host=self.env.host,
            backup_label=ended.backup_label,
            tablespace_map=ended.tablespace_map,
            tablespaces=copied.tablespaces,
            created_tablespaces={str(t.oid): t.path for t in copied.replayed.created_tablespaces},
            late_unlogged=tuple(
                datafile.relation_path(
                    *relation,
                    datafile.tablespace_version_directory(identity.major, identity.catalog_version),
                )
                for relation in copied.replayed.init_forks
            ),
            owner=self.env.directory.owner(),
            detector=copied.detector,
            detector_reason=copied.detector_reason,
            started_at=self.started_at,
            finished_at=datetime.now(UTC),
            files_total=totals.files_total,
            files_read=totals.files_read,
            files_skipped=totals.files_skipped,
            pages_total=totals.pages_total,
            pages_changed=totals.pages_changed,
            pages_stored=frames.counts.pages_stored,
            pages_verified=totals.pages_verified,
            divergent_pages=totals.divergent_pages,
            hint_pages=totals.hint_pages,
            bytes_total=totals.bytes_total,
            bytes_read=totals.bytes_read + copied.wal_bytes,
            bytes_changed=totals.bytes_changed,
            bytes_stored=frames.counts.bytes_stored,
            wal_bytes=copied.wal_bytes,
            corruption=record.corruption(
                repository, self.env.cluster, chain, identity, corrupt, relations
            ),
            corrupt_pages=len(corrupt),
            phases=dict(self.phases.seconds),
            root=Root(root.pack, root.size, root.footer),
        )
        if self.cancelled():
            raise CancelledError("the backup was cancelled")
        if self._lock is not None:
            self._lock.ensure_held()
        digest = repository.commit(manifest)
        if not self.options.dry_run:
            committed = [*zip(chain, hashes, strict=True), (manifest, digest)]
            record.committed(self.env.catalog, repository, committed)
        return Taken(manifest, relations)


def position_of(identity: ServerIdentity, start_lsn: Lsn, history: str) -> ancestry.Position:
    """Where this cluster is, as far as a baseline must agree with it."""
    return ancestry.Position(
        identity.system_identifier,
        identity.major,
        identity.catalog_version,
        identity.block_size,
        identity.data_checksums,
        identity.timeline,
        start_lsn,
        history,
    )


def _excused(suspect: Suspect, start_lsn: Lsn, stop_lsn: Lsn) -> bool:
    """Does the WAL of this backup hold a full image of the page, whatever we have read of it?"""
    return start_lsn <= suspect.lsn <= stop_lsn
