"""Reading one file of the data directory and storing what changed since the baseline.

A `Copier` is used by many threads at once; it keeps no state per file. Files are read in
stretches of 1 MB into a buffer of the thread's own, and decisions are made for a whole stretch.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dbmodule import datafile, detect, page
from dbmodule.delta import FRAME_PAGES, Extents, Refs, to_extents, zero_refs
from dbmodule.errors import CancelledError, SourceError
from dbmodule.ident import PAGE_SIZE, Lsn
from dbmodule.ports import Cancelled, DataDirectory, SourceFile
from dbmodule.registry import (
    HASH,
    MARK,
    UNKNOWN_LSN,
    EntryFlag,
    EntryKind,
    FileIdentity,
    Hashes,
    Marks,
    settled,
)
from dbmodule.repository.tables import FileEntry
from dbmodule.repository.writer import FrameWriter
from dbmodule.selfchecked import is_sound

STRETCH_PAGES = 4 * FRAME_PAGES
STRETCH_BYTES = STRETCH_PAGES * PAGE_SIZE
GATHER_PAGES = 8 * FRAME_PAGES
REREAD_SECONDS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2)
"""Pauses before a page that failed its checksum is read again: the server was writing it."""


class BaselineView(Protocol):
    """What the copier asks of the backup that this one builds on."""

    start_lsn: Lsn
    identities: bool
    """May a file be skipped because its identity is that of the baseline?"""
    trusted: bool
    """Is the baseline a proven ancestor, so that page marks prove something?"""

    def entry(self, path: str) -> FileEntry | None: ...

    def marks(self, path: str) -> Marks: ...

    def hashes(self, path: str) -> Hashes: ...

    def unit_hash(self, path: str, unit: int) -> bytes | None:
        """Hash of 32 aligned pages as the baseline has them, where it is known."""
        ...


class NoBaseline:
    """The view of a full backup, which builds on nothing: no file has an entry."""

    start_lsn = Lsn(0)
    identities = False
    trusted = False

    def entry(self, path: str) -> FileEntry | None:
        return None

    def marks(self, path: str) -> Marks:
        return np.empty(0, MARK)

    def hashes(self, path: str) -> Hashes:
        return np.empty(0, HASH)

    def unit_hash(self, path: str, unit: int) -> bytes | None:
        return None


@dataclass(frozen=True, slots=True)
class CopySettings:
    """What of the server and of this backup the copier depends on."""

    start_lsn: Lsn
    called_ns: int
    """When the backup was asked for: file identities younger than 2 s before prove nothing."""
    data_checksums: bool
    wal_segment_size: int
    blocks_per_segment: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """A page that still fails its checksum after it was read again and again."""

    path: str
    block: int
    """Within the fork."""
    lsn: Lsn
    expected: int
    actual: int


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
    bytes_read: int = 0
    bytes_changed: int = 0
    skipped: bool = False
    unchanged: bool = False
    suspects: list[Suspect] = field(default_factory=list)

    def flags(self) -> EntryFlag:
        flags = EntryFlag.NONE
        if self.identity_valid:
            flags |= EntryFlag.IDENTITY
        if self.overlay:
            flags |= EntryFlag.OVERLAY
        if self.unchanged:
            flags |= EntryFlag.UNCHANGED
        return flags


class _OddPageError(Exception):
    """A relation holds a page without a header or a real LSN: compare it by content."""


class _Collector:
    """References and fingerprints of the changed blocks of one file."""

    def __init__(self, frames: FrameWriter) -> None:
        self._frames = frames
        self._blocks: list[NDArray[np.int64]] = []
        self._refs: list[Refs] = []
        self._gathered: list[NDArray[np.uint8]] = []
        self._gathered_blocks: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, blocks: NDArray[np.int64], refs: Refs) -> None:
        self._blocks.append(blocks)
        self._refs.append(refs)

    def gather(self, blocks: NDArray[np.int64], pages: NDArray[np.uint8]) -> None:
        """Keep a copy of scattered pages, shape (n, 8192), until they fill frames."""
        self._gathered.append(pages)
        self._gathered_blocks.append(blocks)
        self._waiting += len(blocks)
        if self._waiting >= GATHER_PAGES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            pages = np.concatenate(self._gathered)
            data = memoryview(pages.data).cast("B")
            refs = self._frames.store_pages(data, self._frames.hashes(data))
            self.add(np.concatenate(self._gathered_blocks), refs)
            self._gathered, self._gathered_blocks, self._waiting = [], [], 0

    def extents(self) -> Extents:
        self._flush()
        if not self._blocks:
            return to_extents(np.empty(0, np.uint32), zero_refs(0))
        blocks = np.concatenate(self._blocks)
        refs = np.concatenate(self._refs)
        order = np.argsort(blocks, kind="stable")
        return to_extents(blocks[order].astype(np.uint32), refs[order])


class Copier:
    """Copies single files; see the module's docstring."""

    def __init__(
        self,
        directory: DataDirectory,
        frames: FrameWriter,
        settings: CopySettings,
        baseline: BaselineView,
        cancelled: Cancelled,
    ) -> None:
        self._directory = directory
        self._frames = frames
        self._settings = settings
        self._baseline = baseline
        self._cancelled = cancelled
        self._local = threading.local()

    def copy(self, path: str, kind: datafile.Kind) -> CopyResult | None:
        """Read and store `path`; None when it is not there any more."""
        file = self._directory.open(path)
        if file is None:
            return None
        try:
            before = self._baseline.entry(path)
            if before is not None and before.kind not in (EntryKind.RELATION, EntryKind.CONTENT):
                before = None
            if before is not None and self._identity_equals(file, before):
                return self._skipped(file, before)
            if kind in (datafile.Kind.ATOMIC, datafile.Kind.CONTROL):
                return self._atomic(path, file, before)
            by_marks = kind is datafile.Kind.RELATION and (
                before is None or before.kind is EntryKind.RELATION
            )
            if by_marks:
                try:
                    return self._relation(path, file, before)
                except _OddPageError:
                    before = None
            return self._content(path, file, before)
        finally:
            file.close()

    # -- file identity --------------------------------------------------------------------------

    def _identity_equals(self, file: SourceFile, before: FileEntry) -> bool:
        return (
            self._baseline.identities
            and EntryFlag.IDENTITY in before.flags
            and file.identity() == before.identity
        )

    def _skipped(self, file: SourceFile, before: FileEntry) -> CopyResult:
        none = _Collector(self._frames).extents()
        return CopyResult(
            before.path,
            before.kind,
            file.mode,
            before.identity,
            True,
            before.size,
            overlay=True,
            extents=none,
            prints=np.empty(0, MARK if before.kind is EntryKind.RELATION else HASH),
            blocks=-(-before.size // PAGE_SIZE),
            skipped=True,
            unchanged=True,
        )

    def _result(
        self, path: str, kind: EntryKind, file: SourceFile, before: FileEntry | None
    ) -> CopyResult:
        identity = file.identity()
        return CopyResult(
            path,
            kind,
            file.mode,
            identity,
            settled(identity.mtime_ns, self._settings.called_ns),
            0,
            overlay=before is not None,
            extents=_Collector(self._frames).extents(),
            prints=None,
        )

    # -- relations: by page marks ---------------------------------------------------------------

    def _buffer(self) -> memoryview:
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = memoryview(bytearray(STRETCH_BYTES))
        return found

    def _relation(self, path: str, file: SourceFile, before: FileEntry | None) -> CopyResult:
        result = self._result(path, EntryKind.RELATION, file, before)
        baseline = np.empty(0, MARK) if before is None else self._baseline.marks(path)
        relation = datafile.relation(path)
        first = 0 if relation is None else relation.first_block(self._settings.blocks_per_segment)
        planned = result.identity.size // PAGE_SIZE
        collector, prints = _Collector(self._frames), [np.empty(0, MARK)]
        buffer = self._buffer()
        for start in range(0, planned, STRETCH_PAGES):
            if self._cancelled():
                raise CancelledError("the backup was cancelled")
            wanted = min(STRETCH_PAGES, planned - start) * PAGE_SIZE
            got = file.read_into(buffer[:wanted], start * PAGE_SIZE)
            result.bytes_read += got
            pages = got // PAGE_SIZE  # a partial page at the end is being added: WAL has it
            view = buffer[: pages * PAGE_SIZE]
            seen = self._observe(file, view, start)
            known = baseline[start : start + pages]
            if before is None:
                changed = np.ones(pages, np.bool_)
            elif self._baseline.trusted:
                changes = detect.compare_marks(seen, known, self._baseline.start_lsn)
                changed = changes.changed
                result.divergent += int(changes.divergent.sum())
            else:
                changed = self._changed_units(path, view, start)
            marks = seen.marks
            if changed.any():
                marks = self._verify(result, file, view, start, first, changed, seen.zero)
                prints.append(marks[changed])
                self._store(collector, view, start, changed, seen.zero, whole=before is None)
                result.changed += int(changed.sum())
            result.blocks += pages
            if got < wanted:
                break
        result.size = result.blocks * PAGE_SIZE
        result.extents = collector.extents()
        result.prints = np.concatenate(prints)
        result.bytes_changed = result.changed * PAGE_SIZE
        result.unchanged = before is not None and result.size == before.size and result.changed == 0
        return result

    def _observe(self, file: SourceFile, view: memoryview, start: int) -> detect.Observed:
        seen = detect.observe(view, self._settings.wal_segment_size)
        if seen.odd.any():
            # Perhaps caught while the server was writing it.
            for pause in REREAD_SECONDS:
                time.sleep(pause)
                file.read_into(view, start * PAGE_SIZE)
                seen = detect.observe(view, self._settings.wal_segment_size)
                if not seen.odd.any():
                    return seen
            raise _OddPageError
        return seen

    def _changed_units(self, path: str, view: memoryview, start: int) -> NDArray[np.bool_]:
        """By content: which 32-page units are not, as a whole, what the baseline stored."""
        changed = np.ones(len(view) // PAGE_SIZE, np.bool_)
        for offset in range(0, len(changed), FRAME_PAGES):
            unit = view[offset * PAGE_SIZE : (offset + FRAME_PAGES) * PAGE_SIZE]
            expected = self._baseline.unit_hash(path, (start + offset) // FRAME_PAGES)
            if expected is not None and self._frames.digest(unit) == expected:
                changed[offset : offset + FRAME_PAGES] = False
        return changed

    def _verify(
        self,
        result: CopyResult,
        file: SourceFile,
        view: memoryview,
        start: int,
        first: int,
        changed: NDArray[np.bool_],
        zero: NDArray[np.bool_],
    ) -> Marks:
        """Check the checksums of changed pages, read torn ones again; marks of the final bytes."""
        failed = np.empty(0, np.intp)
        if self._settings.data_checksums:
            failed = page.checksum_failures(view, first + start)
            failed = failed[changed[failed]]
            for pause in REREAD_SECONDS:
                if not len(failed):
                    break
                time.sleep(pause)
                for number in failed.tolist():
                    at = number * PAGE_SIZE
                    result.bytes_read += file.read_into(
                        view[at : at + PAGE_SIZE], start * PAGE_SIZE + at
                    )
                failed = page.checksum_failures(view, first + start)
                failed = failed[changed[failed]]
            result.verified += int(changed.sum())
        headers = page.headers(view)
        marks = np.empty(len(headers), MARK)
        marks["lsn"] = page.lsns(headers)
        marks["checksum"] = headers["checksum"]
        if len(failed):
            computed = page.compute_checksums(view, first + start)
            for number in failed.tolist():
                result.suspects.append(
                    Suspect(
                        result.path,
                        first + start + number,
                        Lsn(int(marks["lsn"][number])),
                        int(computed[number]),
                        int(marks["checksum"][number]),
                    )
                )
            marks["lsn"][failed] = UNKNOWN_LSN
        return marks

    def _store(
        self,
        collector: _Collector,
        view: memoryview,
        start: int,
        changed: NDArray[np.bool_],
        zero: NDArray[np.bool_],
        *,
        whole: bool,
    ) -> None:
        """Store the changed pages of a stretch: full units as runs, scattered pages gathered."""
        rows = np.frombuffer(view, np.uint8).reshape(-1, PAGE_SIZE)
        for offset in range(0, len(changed), FRAME_PAGES):
            unit = slice(offset, min(offset + FRAME_PAGES, len(changed)))
            mask = changed[unit]
            if not mask.any():
                continue
            numbers = np.arange(start + unit.start, start + unit.stop, dtype=np.int64)
            if (mask & zero[unit]).sum() == mask.sum():
                collector.add(numbers[mask], zero_refs(int(mask.sum())))
            elif mask.all() and (whole or len(mask) == FRAME_PAGES):
                data = view[unit.start * PAGE_SIZE : unit.stop * PAGE_SIZE]
                collector.add(numbers, self._frames.store_run(data))
            else:
                empty = mask & zero[unit]
                if empty.any():
                    collector.add(numbers[empty], zero_refs(int(empty.sum())))
                    mask = mask & ~empty
                collector.gather(numbers[mask], rows[unit][mask])

    # -- everything else: by content ------------------------------------------------------------

    def _content(self, path: str, file: SourceFile, before: FileEntry | None) -> CopyResult:
        result = self._result(path, EntryKind.CONTENT, file, before)
        baseline = self._baseline_hashes(path, before)
        relation = datafile.relation(path)
        buffer = self._buffer()
        collected = _Chunks(self._frames, baseline)
        planned = result.identity.size
        if relation is not None:
            planned -= planned % PAGE_SIZE
        done = 0
        while done < planned:
            if self._cancelled():
                raise CancelledError("the backup was cancelled")
            wanted = min(STRETCH_BYTES, planned - done)
            got = file.read_into(buffer[:wanted], done)
            result.bytes_read += got
            if relation is not None:
                got -= got % PAGE_SIZE
                view, start = buffer[:got], done // PAGE_SIZE
                every = np.ones(got // PAGE_SIZE, np.bool_)
                first = relation.first_block(self._settings.blocks_per_segment)
                if got:
                    self._verify(result, file, view, start, first, every, ~every)
            collected.add(buffer[:got])
            done += got
            if got < wanted:
                break
        return self._finish_content(result, collected, done, before)

    def _baseline_hashes(self, path: str, before: FileEntry | None) -> Hashes:
        if before is None:
            return np.empty(0, HASH)
        return self._baseline.hashes(path)

    def _atomic(self, path: str, file: SourceFile, before: FileEntry | None) -> CopyResult | None:
        """A file with a CRC of its own, read in one call until it is sound."""
        for pause in REREAD_SECONDS:
            time.sleep(pause)
            data = self._directory.read(path)
            if data is None:
                return None
            if is_sound(path, data):
                break
        else:
            raise SourceError(
                f"{path} does not match its own CRC",
                hint="The cluster is damaged: check its disk, and restore it from an older backup.",
            )
        return self.store_bytes(path, data, file, before)

    def store_bytes(
        self, path: str, data: bytes, file: SourceFile, before: FileEntry | None
    ) -> CopyResult:
        """Store bytes that were already read and found sound, under `path`."""
        result = self._result(path, EntryKind.CONTENT, file, before)
        result.identity_valid = False  # read through another descriptor than the identity's
        result.bytes_read = len(data)
        collected = _Chunks(self._frames, self._baseline_hashes(path, before))
        collected.add(memoryview(data))
        return self._finish_content(result, collected, len(data), before)

    def _finish_content(
        self, result: CopyResult, chunks: _Chunks, size: int, before: FileEntry | None
    ) -> CopyResult:
        result.size = size
        result.blocks = chunks.count
        result.extents, result.prints = chunks.collected()
        result.changed = len(result.prints)
        result.bytes_changed = min(result.changed * PAGE_SIZE, size)
        result.unchanged = before is not None and size == before.size and result.changed == 0
        return result


class _Chunks:
    """Consecutive 8 kB chunks of one file, compared with the baseline's hashes as they come."""

    def __init__(self, frames: FrameWriter, baseline: Hashes) -> None:
        self._frames = frames
        self._baseline = baseline
        self._collector = _Collector(frames)
        self._prints = [np.empty(0, HASH)]
        self.count = 0

    def add(self, view: memoryview) -> None:
        if not len(view):
            return
        hashes = self._frames.hashes(view)
        now = np.frombuffer(b"".join(hashes), HASH)
        known = self._baseline[self.count : self.count + len(now)]
        changed = np.flatnonzero(detect.compare_hashes(now, known))
        if len(changed):
            self._prints.append(now[changed])
            for part in np.split(changed, np.flatnonzero(np.diff(changed) != 1) + 1):
                first, last = int(part[0]), int(part[-1])
                data = view[first * PAGE_SIZE : (last + 1) * PAGE_SIZE]
                if not np.frombuffer(data, np.uint8).any():
                    refs = zero_refs(len(part))
                else:
                    refs = self._frames.store_pages(data, hashes[first : last + 1])
                self._collector.add(part.astype(np.int64) + self.count, refs)
        self.count += len(now)

    def collected(self) -> tuple[Extents, Hashes]:
        return self._collector.extents(), np.concatenate(self._prints)
