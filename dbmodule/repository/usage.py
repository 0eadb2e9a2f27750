"""What backups need of what is stored: packs and frames, seen from the manifests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, FormatVersionError, ObjectMissingError
from dbmodule.manifest import Manifest
from dbmodule.repository.husk import husked_packs
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import PREFIX, PackId
from dbmodule.repository.repository import Repository, manifest_name

_NONE = np.empty(0, np.int64)


class Usage:
    """Collects what some backups need, backup by backup.

    A pack with a husk is needed itself only as long as one of its frames cannot be had without it.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.present = {PackId(n.rpartition("/")[2]) for n in repository.store.list(PREFIX)}
        """All packs that are there, needed or not."""
        self.husks = husked_packs(repository.store)
        self.needed: dict[PackId, PackRef] = {}
        """Packs that must stay."""
        self.referenced: set[PackId] = set()
        """Packs that are named, be it only by way of their husks."""
        self.roots: set[PackId] = set()
        self.frames: dict[PackId, NDArray[Any]] = {}
        """Frames of needed packs that are in use, ascending; complete where every frame was asked
        for.
        """

    def add(self, manifest: Manifest, *, every_frame: bool = False) -> None:
        """Raises `CorruptObjectError` when what a backup needs cannot be known."""
        root = PackRef(PackId(manifest.root.pack), manifest.root.size, manifest.root.footer)
        try:
            tables = self._repository.tables(manifest)
            self.roots.add(root.pack)
            self._need(root, np.zeros(1, np.int64))
            look = every_frame or any(ref.pack in self.husks for ref in tables.packs)
            frames = tables.frames_in_use() if look else {}
            for number, ref in enumerate(tables.packs):
                self._need(ref, frames.get(number, _NONE))
        except (CorruptObjectError, FormatVersionError, ObjectMissingError) as error:
            name = manifest_name(manifest.cluster, manifest.backup_id)
            raise CorruptObjectError(f"{name}: its tables cannot be read: {error}") from error

    def _need(self, ref: PackRef, frames: NDArray[Any]) -> bool:
        """Mark what these frames are read from; False when they cannot be."""
        self.referenced.add(ref.pack)
        if ref.pack in self.husks:
            husk = self._repository.frames.husk(ref.pack)
            if husk is not None:
                moved = [self._need(to, numbers) for to, numbers in husk.places(frames)]
                if all(moved) and not husk.lacks(frames):
                    return True
        self.needed[ref.pack] = ref
        self.frames[ref.pack] = np.union1d(self.frames.get(ref.pack, _NONE), frames)
        return ref.pack in self.present
