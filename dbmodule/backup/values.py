"""What the parts of a backup hand to each other: settings, the baseline's view, a file's result."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np

from dbmodule.backup.batch import Suspect
from dbmodule.backup.earlier import EarlierPages, SamePages
from dbmodule.backup.stored import Pages
from dbmodule.datafile import Kind
from dbmodule.delta import Extents
from dbmodule.ident import PAGE_SIZE, Lsn
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, FileIdentity, Hashes, Marks
from dbmodule.repository.tables import FileEntry
from dbmodule.walsummary import ChangedBlocks

PlannedFile = tuple[str, Kind, int]
"""Path, kind and listed size."""


class BaselineView(Protocol):
    """What the copier asks of the backup that this one builds on."""

    start_lsn: Lsn
    detector: str
    """``wal`` and ``scan`` only for a proven ancestor, whose page marks prove something."""
    identities: bool
    """May a file be skipped because its identity is that of the baseline?"""
    foreign: bool
    """Was it read on another host, or before a promotion, where hint bits may be others?"""
    unsound: bool
    """May it hold pages that failed their checksum when they were stored?"""
    changed: ChangedBlocks | None
    """With the detector ``wal``, the blocks that WAL summaries name."""

    def entry(self, path: str) -> FileEntry | None: ...

    def marks(self, path: str) -> Marks: ...

    def hashes(self, path: str) -> Hashes: ...

    def unit_hash(self, path: str, unit: int) -> bytes | None:
        """Hash of 32 aligned pages as the baseline has them, where it is known."""
        ...

    def unit_pages(self, path: str, unit: int) -> Pages:
        """The same pages themselves, read from the repository; fewer at the file's end."""
        ...

    def same_pages(self, path: str, unit: int, data: memoryview) -> SamePages | None:
        """Pages of a unit that a full need not store, since an earlier backup has them."""
        ...


class NoBaseline:
    """The view of a full backup, which builds on nothing: no file has an entry."""

    start_lsn = Lsn(0)
    detector = "full"
    identities = False
    foreign = False
    unsound = False
    changed: ChangedBlocks | None = None

    def __init__(self, earlier: EarlierPages | None = None) -> None:
        self._earlier = earlier

    def entry(self, path: str) -> FileEntry | None:
        return None

    def marks(self, path: str) -> Marks:
        return np.empty(0, MARK)

    def hashes(self, path: str) -> Hashes:
        return np.empty(0, HASH)

    def unit_hash(self, path: str, unit: int) -> bytes | None:
        return None

    def unit_pages(self, path: str, unit: int) -> Pages:
        return np.empty((0, PAGE_SIZE), np.uint8)

    def same_pages(self, path: str, unit: int, data: memoryview) -> SamePages | None:
        return None if self._earlier is None else self._earlier.same_pages(path, unit, data)


@dataclass(frozen=True, slots=True)
class CopySettings:
    """What of the server and of this backup the copier depends on."""

    start_lsn: Lsn
    called_ns: int
    """When the backup was asked for: file identities younger than 2 s before prove nothing."""
    data_checksums: bool
    wal_segment_size: int
    blocks_per_segment: int


# Adding flags up takes an enum longer than all else that an unchanged file costs here.
_FLAGS = {
    (identity, overlay, unchanged): EntryFlag(
        EntryFlag.IDENTITY * identity
        | EntryFlag.OVERLAY * overlay
        | EntryFlag.UNCHANGED * unchanged
    )
    for identity, overlay, unchanged in product((False, True), repeat=3)
}


@dataclass(slots=True)
class CopyResult:
    """One file as it goes into the tables of the backup."""

    path: str
    kind: EntryKind
    mode: int
    identity: FileIdentity
    identity_valid: bool
    size: int
    overlay: bool
    extents: Extents
    prints: Any
    """Marks or hashes of the blocks in `extents`, in their order."""
    blocks: int = 0
    changed: int = 0
    verified: int = 0
    divergent: int = 0
    hints: int = 0
    bytes_read: int = 0
    bytes_changed: int = 0
    skipped: bool = False
    unchanged: bool = False
    suspects: list[Suspect] = field(default_factory=list)

    def flags(self) -> EntryFlag:
        # A file with a page that failed its checksum is looked at again every time.
        identity = self.identity_valid and not self.suspects
        return _FLAGS[identity, self.overlay, self.unchanged]
