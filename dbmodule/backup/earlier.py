"""Pages that an earlier backup of the cluster has at the same place: for a full, which is stored
by frames of 32 pages and would store each anew of which one page has changed.

A full trusts no registry. So nothing counts here but bytes: the earlier backup's frames are read
back, checked against their hashes, and compared with the pages just read. That costs a read of
each frame that changed, and saves to compress and to store it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbmodule.chain import chain_of, newest
from dbmodule.delta import FRAME_PAGES, REF, ZERO_FRAME, Refs
from dbmodule.errors import DbmoduleError, RefusedError, RepositoryError
from dbmodule.ident import PAGE_SIZE
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.index import PackRef
from dbmodule.repository.repository import Repository

log = logging.getLogger(__name__)

MOST_FRAMES = 8
"""A unit whose pages lie in more frames is stored anew: it would be read slowly for ever."""
_FRAMES_HELD = 16


@dataclass(frozen=True, slots=True)
class SamePages:
    """Pages of a unit that are stored already."""

    same: NDArray[np.bool_]
    """Which of them; shape (pages,)."""
    packs: list[PackRef]
    refs: Refs
    """Their references, in order; packs are rows of `packs`."""


class EarlierPages:
    """What the newest backup of the cluster has, by file and block. Safe for threads."""

    def __init__(self, repository: Repository, view: ChainView) -> None:
        self._repository = repository
        self._view = view
        self._local = threading.local()

    def same_pages(self, path: str, unit: int, data: memoryview) -> SamePages | None:
        """Which pages of a unit of 32 lie there as they are now; None for less than half of them.

        Damage to the earlier backup is no concern of this one: such pages are just stored.
        """
        try:
            return self._same_pages(path, unit, data)
        except (RepositoryError, RefusedError) as error:
            log.info("pages of %s are stored anew: %s", path, error)
            return None

    def _same_pages(self, path: str, unit: int, data: memoryview) -> SamePages | None:
        refs = self._refs(path)[unit * FRAME_PAGES : (unit + 1) * FRAME_PAGES]
        same = np.zeros(len(data) // PAGE_SIZE, np.bool_)
        refs = refs[: len(same)]
        stored = np.flatnonzero(refs["frame"] != ZERO_FRAME)
        frames = sorted({(int(r["pack"]), int(r["frame"])) for r in refs[stored]})
        if len(stored) * 2 < len(same) or len(frames) > MOST_FRAMES:
            return None
        raw = {key: self._frame(*key) for key in frames}
        for at in stored.tolist():
            ref = refs[at]
            start = int(ref["slot"]) * PAGE_SIZE
            old = raw[int(ref["pack"]), int(ref["frame"])][start : start + PAGE_SIZE]
            same[at] = old == bytes(data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
        if int(same.sum()) * 2 < len(same):
            return None
        return SamePages(same, self._view.packs, refs[np.flatnonzero(same)])

    def _refs(self, path: str) -> Refs:
        """The folded references of the file that this thread is at; none for a file not known."""
        if getattr(self._local, "path", None) != path:
            known = path in self._view.files
            self._local.refs = self._view.page_map(path).refs if known else np.empty(0, REF)
            self._local.path = path
        refs: Refs = self._local.refs
        return refs

    def _frame(self, pack: int, frame: int) -> bytes:
        held: OrderedDict[tuple[int, int], bytes] | None = getattr(self._local, "frames", None)
        if held is None:
            held = self._local.frames = OrderedDict()
        raw = held.get((pack, frame))
        if raw is None:
            raw = held[pack, frame] = self._repository.frames.frame(self._view.packs[pack], frame)
            if len(held) > _FRAMES_HELD:
                held.popitem(last=False)
        return raw


def earlier_pages(
    repository: Repository, cluster: str, system_identifier: int
) -> EarlierPages | None:
    """Of the newest backup of a cluster; None where there is none that can be read."""
    try:
        backups, _ = repository.readable_manifests(cluster)
        mine = [m for m in backups.values() if int(m.system_identifier) == system_identifier]
        last = newest(mine)
        if last is None:
            return None
        return EarlierPages(repository, ChainView(repository, chain_of(backups, last.backup_id)))
    except DbmoduleError as error:
        log.info("no earlier backup is compared with: %s", error)
        return None
