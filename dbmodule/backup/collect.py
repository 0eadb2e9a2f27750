"""What one file contributes to a backup: its changed blocks, stored as they are found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dbmodule import detect
from dbmodule.delta import FRAME_PAGES, Extents, Refs, to_extents, zero_refs
from dbmodule.ident import PAGE_SIZE
from dbmodule.registry import HASH, Hashes
from dbmodule.repository.writer import FrameWriter

GATHER_PAGES = 8 * FRAME_PAGES


class Collector:
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


class Chunks:
    """Consecutive 8 kB chunks of one file, compared with the baseline's hashes as they come."""

    def __init__(self, frames: FrameWriter, baseline: Hashes) -> None:
        self._frames = frames
        self._baseline = baseline
        self._collector = Collector(frames)
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
