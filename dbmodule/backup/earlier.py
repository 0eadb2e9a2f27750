"""Pages that an earlier backup of the cluster has at the same place: for a full, which is stored
by frames of 32 pages and would store each anew of which one page has changed.

A full trusts no registry. So nothing counts here but bytes: the earlier backup's frames are read
back, checked against their hashes, and compared with the pages just read. That costs a read of
each frame that changed, and saves to compress and to store it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbmodule.backup.stored import StoredPages
from dbmodule.chain import chain_of, newest
from dbmodule.delta import ZERO_FRAME, Refs
from dbmodule.errors import DbmoduleError, RefusedError, RepositoryError
from dbmodule.ident import PAGE_SIZE
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.index import PackRef
from dbmodule.repository.repository import Repository

log = logging.getLogger(__name__)

MOST_FRAMES = 8
"""A unit whose pages lie in more frames is stored anew: it would be read slowly for ever."""


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
        self._packs = view.packs
        self._stored = StoredPages(view, repository.frames)

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
        rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        refs = self._stored.refs(path, unit)[: len(rows)]
        stored = refs["frame"] != ZERO_FRAME
        places = np.stack((refs["pack"][stored], refs["frame"][stored]), axis=1)
        if len(places) * 2 < len(rows) or len(np.unique(places, axis=0)) > MOST_FRAMES:
            return None
        same = np.zeros(len(rows), np.bool_)
        equal = (rows[: len(refs)] == self._stored.pages(refs)).all(axis=1)
        same[: len(refs)] = stored & equal
        if int(same.sum()) * 2 < len(same):
            return None
        return SamePages(same, self._packs, refs[same[: len(refs)]])


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
