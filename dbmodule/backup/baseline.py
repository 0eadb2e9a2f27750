"""The backup that a new one builds on: which one, whether it may, and what it remembers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dbmodule import lineage, wal
from dbmodule.backup.earlier import SamePages
from dbmodule.backup.stored import Pages, StoredPages
from dbmodule.chain import chain_of
from dbmodule.delta import ZERO_FRAME
from dbmodule.errors import (
    BrokenChainError,
    CorruptObjectError,
    NotAnAncestorError,
    ObjectMissingError,
    WrongClusterError,
)
from dbmodule.ident import PAGE_SIZE, BackupId, Lsn, Timeline, format_lsn
from dbmodule.manifest import Manifest, Mark
from dbmodule.ports import Catalog, DataDirectory, LineageMark
from dbmodule.registry import HASH, MARK, EntryKind, Hashes, Marks
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry
from dbmodule.walsummary import ChangedBlocks


@dataclass(frozen=True, slots=True)
class Position:
    """Where the cluster is now, as far as a baseline must agree with it."""

    system_identifier: int
    major: int
    catalog_version: int
    block_size: int
    data_checksums: bool
    timeline: Timeline
    start_lsn: Lsn
    history: str


@dataclass(frozen=True, slots=True)
class Host:
    """Where and on which timeline files are read now."""

    name: str
    boot_id: str
    timeline: Timeline


def check_cluster(baseline: Manifest, now: Position) -> None:
    """Refuse a baseline of another cluster; raises `WrongClusterError`."""
    then = (
        int(baseline.system_identifier),
        baseline.version_num // 10000,
        baseline.catalog_version,
        baseline.block_size,
    )
    here = (now.system_identifier, now.major, now.catalog_version, now.block_size)
    names = ("system identifier", "major version", "catalog version", "block size")
    for name, a, b in zip(names, then, here, strict=True):
        if a != b:
            raise WrongClusterError(
                f"the baseline {baseline.backup_id} has {name} {a}, this cluster has {b}",
                hint="Take a full backup of this cluster: dbmodule backup full.",
            )


def check_history(baseline: Manifest, now: Position) -> None:
    """Refuse a baseline that is not in this cluster's past; raises `NotAnAncestorError`."""
    history = wal.parse_history(now.history)
    if not wal.lies_on_history(baseline.timeline, baseline.stop_lsn, now.timeline, history):
        raise NotAnAncestorError(
            f"the baseline {baseline.backup_id} stopped at {format_lsn(baseline.stop_lsn)} on"
            f" timeline {baseline.timeline}, which is not in the history of this cluster's"
            f" timeline {now.timeline}",
            hint="Take a full backup: dbmodule backup full.",
        )
    # Equal starts are those of a stopped cluster that was not started in between.
    if now.start_lsn < baseline.stop_lsn and now.start_lsn != baseline.start_lsn:
        raise NotAnAncestorError(
            f"this backup starts at {format_lsn(now.start_lsn)}, before the baseline"
            f" {baseline.backup_id} stopped at {format_lsn(baseline.stop_lsn)}",
            hint="The data directory is older than the baseline: take a full backup.",
        )


def proven_by_catalog(marks: Sequence[Mark], catalog: Catalog | None) -> bool:
    """Does the running server see both lineage marks of a baseline?"""
    if catalog is None or len(marks) != 2:
        return False
    return catalog.sees_marks([LineageMark(m.mark, m.xmin, m.path, m.block, m.item) for m in marks])


def proven_by_files(marks: Sequence[Mark], directory: DataDirectory) -> bool:
    """Does the cleanly stopped cluster hold both lineage marks of a baseline?"""
    return len(marks) == 2 and all(_holds(mark, directory) for mark in marks)


def _holds(mark: Mark, directory: DataDirectory) -> bool:
    file = directory.open(mark.path) if mark.path else None
    if file is None:
        return False
    try:
        page = memoryview(bytearray(PAGE_SIZE))
        if file.read_into(page, mark.block * PAGE_SIZE) != PAGE_SIZE:
            return False
    finally:
        file.close()
    xid = mark.xmin & 0xFFFFFFFF
    found = lineage.row_holds_mark(bytes(page), mark.item, mark.mark, xid)
    if found is None:
        log = directory.read(lineage.commit_log_path(xid))
        return log is not None and lineage.committed(log, xid)
    return found


@contextmanager
def _readable(baseline: Manifest) -> Iterator[None]:
    """Say of what is damaged or missing in a baseline that it cannot be built on."""
    try:
        yield
    except (CorruptObjectError, ObjectMissingError) as error:
        raise BrokenChainError(
            f"the baseline {baseline.backup_id} cannot be built on: {error}",
            hint="Run `dbmodule verify` to see all damage, and take a full backup.",
        ) from error


class ChainBaseline:
    """What the baseline's chain remembers of each file: the copier's view of it.

    Whatever of it cannot be read raises `BrokenChainError`.
    """

    def __init__(
        self, repository: Repository, chain: Sequence[Manifest], *, detector: str, here: Host
    ) -> None:
        self.manifest = chain[-1]
        self.start_lsn = self.manifest.start_lsn
        self.detector = detector
        self.changed: ChangedBlocks | None = None
        same_boot = here.boot_id != "" and here.boot_id == self.manifest.boot_id
        self.identities = same_boot and detector in ("wal", "scan")
        self.foreign = (self.manifest.timeline, self.manifest.host) != (here.timeline, here.name)
        self.unsound = any(manifest.corrupt_pages for manifest in chain)
        self._frames = repository.frames
        with _readable(self.manifest):
            self._view = ChainView(repository, chain)
        self._stored = StoredPages(self._view, self._frames)

    def entry(self, path: str) -> FileEntry | None:
        return self._view.files.get(path)

    def marks(self, path: str) -> Marks:
        """Shape (blocks,); the file must be a RELATION in the baseline."""
        with _readable(self.manifest):
            found: Marks = self._view.prints(path)
        return found if found.dtype == MARK else np.empty(0, MARK)

    def hashes(self, path: str) -> Hashes:
        """Shape (chunks,); empty for a file that has page marks instead."""
        if self._view.files[path].kind is not EntryKind.CONTENT:
            return np.empty(0, HASH)
        with _readable(self.manifest):
            found: Hashes = self._view.prints(path)
        return found

    def unit_hash(self, path: str, unit: int) -> bytes | None:
        """Hash of 32 aligned pages, known where they are still one frame of the baseline's."""
        with _readable(self.manifest):
            return self._unit_hash(path, unit)

    def unit_pages(self, path: str, unit: int) -> Pages:
        """What the baseline holds of 32 aligned pages, shape (pages there, 8192)."""
        with _readable(self.manifest):
            return self._stored.pages(self._stored.refs(path, unit))

    def same_pages(self, path: str, unit: int, data: memoryview) -> SamePages | None:
        return None

    def _unit_hash(self, path: str, unit: int) -> bytes | None:
        refs = self._stored.refs(path, unit)
        if not len(refs) or int(refs["frame"][0]) == ZERO_FRAME:
            return None
        same = (refs["pack"] == refs["pack"][0]) & (refs["frame"] == refs["frame"][0])
        if not same.all() or not (refs["slot"] == np.arange(len(refs))).all():
            return None
        footer = self._frames.footer(self._view.packs[int(refs["pack"][0])])
        frame = int(refs["frame"][0])
        if int(footer.entries["raw"][frame]) != len(refs) * PAGE_SIZE:
            return None
        return footer.frame_hash(frame)


def baseline_chain(
    repository: Repository, backups: dict[BackupId, Manifest], baseline: Manifest
) -> list[Manifest]:
    """The baseline's chain, checked to be whole; raises `BrokenChainError`."""
    chain = chain_of(backups, baseline.backup_id)
    repository.check_chain(chain)
    return chain
