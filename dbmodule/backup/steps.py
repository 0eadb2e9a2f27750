"""The steps that an online and an offline backup share: baseline, files, WAL, commit."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dbmodule import controlfile, wal
from dbmodule.backup import baseline as ancestry
from dbmodule.backup import walfiles
from dbmodule.backup.copier import BaselineView, Copier, CopySettings, NoBaseline, Suspect
from dbmodule.backup.copying import CopyTotals, add_result, copy_files
from dbmodule.backup.plan import make_plan
from dbmodule.chain import choose_baseline
from dbmodule.controlfile import ControlFile
from dbmodule.datafile import CONTROL_FILE
from dbmodule.errors import (
    CancelledError,
    DbmoduleError,
    NotAnAncestorError,
    SourceError,
)
from dbmodule.ident import (
    BackupId,
    Lsn,
    Timeline,
    new_backup_id,
)
from dbmodule.manifest import (
    COMPLETED,
    COMPLETED_WITH_CORRUPTION,
    Corruption,
    Manifest,
    Mark,
    Root,
)
from dbmodule.ports import (
    BackupRecord,
    Cancelled,
    Catalog,
    DataDirectory,
    Progress,
    Server,
    ServerIdentity,
)
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity
from dbmodule.reports import BackupOptions
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
    boot_id: str
    """Of the host; empty where it cannot be known."""
    threads: int
    compression_level: int


@dataclass(frozen=True, slots=True)
class Copied:
    """What the middle of the protocol hands to its end."""

    start_lsn: Lsn
    stop_lsn: Lsn
    timeline: Timeline
    history: str
    backup_label: str
    tablespace_map: str
    marks: tuple[Mark, ...]
    wal_bytes: int
    created_tablespaces: dict[str, str]


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
            self.seconds[name] = round(time.monotonic() - began, 3)


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
        self.cancelled = cancelled
        self.phases = Phases(progress)
        self.started_at = datetime.now(UTC)
        earlier = environment.repository.backup_ids(environment.cluster)
        self.backup_id: BackupId = new_backup_id(options.type, self.started_at, earlier)

    @abstractmethod
    def take(self) -> Manifest:
        """Go through the whole protocol; gives the committed manifest."""

    # -- baseline -------------------------------------------------------------------------------

    def choose(self) -> list[Manifest]:
        """The chain that this backup builds on; empty for a full."""
        backups, unreadable = self.env.repository.readable_manifests(self.env.cluster)
        if self.options.baseline_id in unreadable:
            raise unreadable[self.options.baseline_id]
        for error in unreadable.values():
            log.warning("a backup is passed over: %s", error)
        chosen = choose_baseline(backups, self.options.type, self.options.baseline_id)
        if chosen is None:
            return []
        return ancestry.baseline_chain(self.env.repository, backups, chosen)

    def detector(self, baseline: Manifest, proven: bool, now: ancestry.Position) -> tuple[str, str]:
        """Which detector runs, and why; raises `NotAnAncestorError` when it may not."""
        asked = self.options.detect
        if asked == "content":
            return "content", "asked for"
        reason = ""
        if not proven:
            reason = f"no lineage mark proves {baseline.backup_id} to be an ancestor"
        elif baseline.data_checksums != now.data_checksums:
            reason = f"data checksums were switched since {baseline.backup_id}"
        if not reason:
            return "scan", "asked for" if asked == "scan" else "the baseline is a proven ancestor"
        if asked == "scan":
            raise NotAnAncestorError(
                f"the scan detector cannot be used: {reason}",
                hint="Use --detect content, or take a full backup.",
            )
        return "content", reason

    def view(
        self, chain: list[Manifest], now: ancestry.Position, proven: Callable[[Manifest], bool]
    ) -> tuple[BaselineView, str, str]:
        """The baseline as the copier sees it, the detector and the reason for it."""
        if not chain:
            return NoBaseline(), "full", "every page is read and stored"
        ancestry.check_history(chain[-1], now)
        detector, reason = self.detector(chain[-1], proven(chain[-1]), now)
        baseline = ancestry.ChainBaseline(
            self.env.repository,
            chain,
            trusted=detector == "scan",
            boot_id=self.env.boot_id,
        )
        return baseline, detector, reason

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
    ) -> tuple[int, dict[str, str]]:
        """WAL and history files; their bytes, and tablespaces that replaying them creates."""
        with self.phases("wal"):
            names = wal.segments_between(
                needed.timeline, needed.start_lsn, needed.stop_lsn, needed.segment_size
            )
            total, summary = walfiles.store_wal(self.env.directory, needed, tables, frames, names)
            if history:
                name = wal.history_name(needed.timeline)
                walfiles.add_file(tables, frames, f"pg_wal/{name}", history.encode())
        return total, {str(t.oid): t.path for t in summary.created_tablespaces}

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
        self,
        identity: ServerIdentity,
        copied: Copied,
        totals: CopyTotals,
        tablespaces: dict[str, str],
        chain: list[Manifest],
        detector: tuple[str, str],
        frames: FrameWriter,
        tables: TableWriter,
    ) -> Manifest:
        """Make everything durable, then write the manifest."""
        with self.phases("commit"):
            described = tables.finish()
            packs = frames.flush()
            root = frames.store_root(encode_root(described, packs))
            frames.check_references()
        corrupt = [s for s in totals.suspects if not _excused(s, copied)]
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
            timeline=copied.timeline,
            start_lsn=copied.start_lsn,
            stop_lsn=copied.stop_lsn,
            history=copied.history,
            marks=copied.marks,
            boot_id=self.env.boot_id,
            backup_label=copied.backup_label,
            tablespace_map=copied.tablespace_map,
            tablespaces=tablespaces,
            created_tablespaces=copied.created_tablespaces,
            owner=self.env.directory.owner(),
            detector=detector[0],
            detector_reason=detector[1],
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
            hint_pages=0,
            bytes_total=totals.bytes_total,
            bytes_read=totals.bytes_read + copied.wal_bytes,
            bytes_changed=totals.bytes_changed,
            bytes_stored=frames.counts.bytes_stored,
            wal_bytes=copied.wal_bytes,
            corruption=tuple(
                Corruption(s.path, s.block, s.lsn, s.expected, s.actual)
                for s in corrupt[: Manifest.MAX_LISTED]
            ),
            corrupt_pages=len(corrupt),
            phases=dict(self.phases.seconds),
            root=Root(root.pack, root.size, root.footer),
        )
        if self.cancelled():
            raise CancelledError("the backup was cancelled")
        digest = repository.commit(manifest)
        self.record([*zip(chain, hashes, strict=True), (manifest, digest)])
        return manifest

    def record(self, chain: Sequence[tuple[Manifest, str]]) -> None:
        """Tell the SQL catalog of a committed backup, and of what it builds on if it was not told.

        The backup exists already, so a failure here is not its failure.
        """
        if self.env.catalog is None:
            return
        try:
            for manifest, digest in chain:
                self.env.catalog.record(to_record(manifest, digest))
        except DbmoduleError as error:
            log.warning(
                "backup %s is committed, but the SQL catalog does not know it yet: %s",
                self.backup_id,
                error,
            )


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


def to_record(manifest: Manifest, digest: str) -> BackupRecord:
    """The catalog's projection of a manifest."""
    return BackupRecord(
        backup_id=manifest.backup_id,
        type=manifest.type,
        baseline_id=manifest.baseline_id,
        status=manifest.status,
        label=manifest.label,
        cluster=manifest.cluster,
        system_identifier=manifest.system_identifier,
        timeline=manifest.timeline,
        start_lsn=manifest.start_lsn,
        stop_lsn=manifest.stop_lsn,
        started_at=manifest.started_at,
        finished_at=manifest.finished_at,
        detector=manifest.detector,
        files_total=manifest.files_total,
        pages_total=manifest.pages_total,
        pages_changed=manifest.pages_changed,
        bytes_read=manifest.bytes_read,
        bytes_changed=manifest.bytes_changed,
        bytes_stored=manifest.bytes_stored,
        wal_bytes=manifest.wal_bytes,
        corrupt_pages=manifest.corrupt_pages,
        manifest_hash=digest,
    )


def _excused(suspect: Suspect, copied: Copied) -> bool:
    """Does the WAL of this backup hold a full image of the page, whatever we have read of it?"""
    return copied.start_lsn <= suspect.lsn <= copied.stop_lsn
