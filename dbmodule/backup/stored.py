"""Pages as a chain of backups holds them, by file and unit of 32.

Each thread folds the file that it is at once, and keeps the last few frames: those of a delta are
shared by pages from all over a file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from dbmodule.delta import FRAME_PAGES, REF, ZERO_FRAME, Refs
from dbmodule.ident import PAGE_SIZE
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.frames import FrameReader

Pages = NDArray[np.uint8]
"""Shape (pages, 8192)."""

_FRAMES_KEPT = 16
"""Decompressed frames that each thread keeps: 4 MB."""


class StoredPages:
    """What `view` holds, read with `frames`. Safe for threads."""

    def __init__(self, view: ChainView, frames: FrameReader) -> None:
        self._view = view
        self._frames = frames
        self._local = threading.local()

    def refs(self, path: str, unit: int) -> Refs:
        """Folded references of up to 32 pages; none for a file that the chain does not have."""
        if getattr(self._local, "path", None) != path:
            known = path in self._view.files
            self._local.refs = self._view.page_map(path).refs if known else np.empty(0, REF)
            self._local.path = path
        refs: Refs = self._local.refs[unit * FRAME_PAGES : (unit + 1) * FRAME_PAGES]
        return refs

    def pages(self, refs: Refs) -> Pages:
        """The pages that references lead to, shape (references, 8192)."""
        pages = np.zeros((len(refs), PAGE_SIZE), np.uint8)
        stored = np.flatnonzero(refs["frame"] != ZERO_FRAME)
        places = np.stack((refs["pack"][stored], refs["frame"][stored]), axis=1)
        for pack, frame in np.unique(places, axis=0).tolist():
            here = stored[(places == (pack, frame)).all(axis=1)]
            pages[here] = self._frame(pack, frame)[refs["slot"][here]]
        return pages

    def _frame(self, pack: int, frame: int) -> Pages:
        kept: OrderedDict[tuple[int, int], Pages] | None = getattr(self._local, "frames", None)
        if kept is None:
            kept = self._local.frames = OrderedDict()
        found = kept.get((pack, frame))
        if found is None:
            raw = self._frames.frame(self._view.packs[pack], frame)
            whole = len(raw) // PAGE_SIZE * PAGE_SIZE
            found = np.frombuffer(raw, np.uint8, whole).reshape(-1, PAGE_SIZE)
            kept[pack, frame] = found
            if len(kept) > _FRAMES_KEPT:
                kept.popitem(last=False)
        return found
