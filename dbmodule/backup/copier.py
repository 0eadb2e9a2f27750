"""Reading one file of the data directory and storing what changed since the baseline.

A `Copier` is used by many threads at once; it keeps no state per file. Files are read in
stretches of 1 MB into a buffer of the thread's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from dbmodule import datafile
from dbmodule.backup.batch import REREAD_SECONDS, Batch, OddPageError
from dbmodule.backup.collect import Chunks
from dbmodule.backup.relation import BATCH_BYTES, BATCH_PAGES, RelationCopy
from dbmodule.backup.small import SMALL_BYTES, copy_together
from dbmodule.backup.values import BaselineView, CopyResult, CopySettings, PlannedFile
from dbmodule.delta import EXTENT
from dbmodule.errors import CancelledError, SourceError
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import Cancelled, DataDirectory, SourceFile
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, Hashes, settled
from dbmodule.repository.tables import FileEntry
from dbmodule.repository.writer import FrameWriter
from dbmodule.selfchecked import is_sound

_NO_EXTENTS = np.empty(0, EXTENT)
_NO_MARKS = np.empty(0, MARK)
_NO_HASHES = np.empty(0, HASH)


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

    def copy_batch(self, files: Sequence[PlannedFile]) -> list[CopyResult | None]:
        """As `copy` of each of some files, in their order."""
        small = [
            path
            for path, kind, size in files
            if size <= SMALL_BYTES
            and kind in (datafile.Kind.RELATION, datafile.Kind.CONTENT)
            and self._baseline.entry(path) is None
            and datafile.relation(path) is not None
        ]
        together = copy_together(
            small, self._directory, self._frames, self._settings, self._buffer()
        )
        return [together.get(path) or self.copy(path, kind) for path, kind, _ in files]

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
                result = self._result(path, EntryKind.RELATION, file, before)
                copy = RelationCopy(result, before, self._baseline, self._settings, self._frames)
                try:
                    copy.run(file, self._buffer(), self._cancelled)
                except OddPageError:
                    before = None
                else:
                    return result
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
        return CopyResult(
            before.path,
            before.kind,
            file.mode,
            before.identity,
            True,
            before.size,
            overlay=True,
            extents=_NO_EXTENTS,
            prints=_NO_MARKS if before.kind is EntryKind.RELATION else _NO_HASHES,
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
            extents=_NO_EXTENTS,
            prints=None,
        )

    # -- everything else: by content ------------------------------------------------------------

    def _buffer(self) -> memoryview:
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = memoryview(bytearray(BATCH_BYTES))
        return found

    def _content(self, path: str, file: SourceFile, before: FileEntry | None) -> CopyResult:
        result = self._result(path, EntryKind.CONTENT, file, before)
        collected = Chunks(self._frames, self._baseline_hashes(path, before))
        if (relation := datafile.relation(path)) is not None:
            done = self._content_of_fork(relation, file, result, collected)
        else:
            done = self._content_of_file(file, result, collected)
        return self._finish_content(result, collected, done, before)

    def _content_of_file(self, file: SourceFile, result: CopyResult, collected: Chunks) -> int:
        """Compare and store all bytes; how many there were."""
        buffer, done, planned = self._buffer(), 0, result.identity.size
        while done < planned:
            if self._cancelled():
                raise CancelledError("the backup was cancelled")
            wanted = min(BATCH_BYTES, planned - done)
            got = file.read_into(buffer[:wanted], done)
            result.bytes_read += got
            collected.add(buffer[:got])
            done += got
            if got < wanted:
                break
        return done

    def _content_of_fork(
        self,
        relation: datafile.RelationFile,
        file: SourceFile,
        result: CopyResult,
        collected: Chunks,
    ) -> int:
        """As `_content_of_file`, of whole pages, whose checksums are verified."""
        first_block = relation.first_block(self._settings.blocks_per_segment)
        pages, done = result.identity.size // PAGE_SIZE, 0
        for start in range(0, pages, BATCH_PAGES):
            if self._cancelled():
                raise CancelledError("the backup was cancelled")
            numbers = np.arange(start, min(start + BATCH_PAGES, pages), dtype=np.int64)
            batch = Batch(file, self._buffer(), numbers)
            if self._settings.data_checksums and len(batch.numbers):
                every = np.ones(len(batch.numbers), np.bool_)
                result.suspects += batch.verify(result.path, first_block, every)
                result.verified += len(every)
            result.bytes_read += batch.bytes_read
            collected.add(batch.view)
            done += len(batch.numbers)
            if not batch.complete:
                break
        return done * PAGE_SIZE

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
        collected = Chunks(self._frames, self._baseline_hashes(path, before))
        collected.add(memoryview(data))
        return self._finish_content(result, collected, len(data), before)

    def _finish_content(
        self, result: CopyResult, chunks: Chunks, size: int, before: FileEntry | None
    ) -> CopyResult:
        result.size = size
        result.blocks = chunks.count
        result.extents, result.prints = chunks.collected()
        result.changed = len(result.prints)
        result.bytes_changed = min(result.changed * PAGE_SIZE, size)
        result.unchanged = before is not None and size == before.size and result.changed == 0
        return result
