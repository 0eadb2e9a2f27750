"""Husks: what stays of a pack whose live frames were moved to others.

Manifests are immutable and name the old pack for ever. Its husk keeps its table of contents, which
the pack's name still authenticates, and says where each frame is now. So a moved frame is checked
against the very hash that it was stored under. A husk may lead to a pack that has one itself.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, ObjectMissingError
from dbmodule.ports import ObjectStore
from dbmodule.repository.document import Documents
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import Footer, PackId

PREFIX = "husks/"
_GONE = -1


def name_of_husk(pack: PackId) -> str:
    return f"{PREFIX}{pack[:2]}/{pack}"


def husked_packs(store: ObjectStore) -> set[PackId]:
    """Packs that have a husk, whether or not they are still there themselves."""
    return {PackId(name.rpartition("/")[2]) for name in store.list(PREFIX)}


@dataclass(frozen=True, slots=True)
class Moved:
    """Frames ``first``, ``first + 1`` … are ``count`` frames of `pack` from `target` on."""

    first: int
    count: int
    pack: PackRef
    target: int


@dataclass(frozen=True, slots=True)
class Husk:
    footer: Footer
    packs: list[PackRef]
    """Where the frames are now."""
    numbers: NDArray[np.int64]
    """Row of `packs` for each frame of the old pack, -1 for one that is gone; shape (frames,)."""
    targets: NDArray[np.int64]
    """Its number there; shape (frames,)."""

    def lacks(self, frames: NDArray[Any]) -> bool:
        """Is any of these frames gone?"""
        return bool(
            len(frames)
            and (int(frames.max()) >= len(self.numbers) or (self.numbers[frames] == _GONE).any())
        )

    def places(self, frames: NDArray[Any]) -> Iterator[tuple[PackRef, NDArray[np.int64]]]:
        """The packs that hold these frames now, each with the numbers that they have there."""
        known = frames[frames < len(self.numbers)]
        for number in np.unique(self.numbers[known]).tolist():
            if number != _GONE:
                mine = known[self.numbers[known] == number]
                yield self.packs[number], np.unique(self.targets[mine])


def write_husk(documents: Documents, pack: PackId, footer: bytes, moves: Sequence[Moved]) -> None:
    """Create the husk of a pack with these bytes as its footer; `ObjectExistsError`."""
    packs = list(dict.fromkeys(move.pack for move in moves))
    rows = {ref: number for number, ref in enumerate(packs)}
    documents.put(
        name_of_husk(pack),
        {
            "footer": base64.b64encode(footer).decode(),
            "packs": [[ref.pack, ref.size, ref.footer] for ref in packs],
            "moved": [[m.first, m.count, rows[m.pack], m.target] for m in moves],
        },
    )


def read_husk(documents: Documents, pack: PackId, key: bytes) -> Husk | None:
    """None when there is none; `CorruptObjectError`, `FormatVersionError`."""
    name = name_of_husk(pack)
    try:
        body = documents.get(name)
    except ObjectMissingError:
        return None
    try:
        footer = Footer.open(pack, base64.b64decode(body["footer"], validate=True), key)
        packs = [PackRef(PackId(str(p)), int(size), int(f)) for p, size, f in body["packs"]]
        numbers = np.full(len(footer.entries), _GONE, np.int64)
        targets = np.zeros(len(footer.entries), np.int64)
        for first, count, number, target in body["moved"]:
            if not (0 <= number < len(packs) and 0 <= first < first + count <= len(numbers)):
                raise ValueError(f"frames {first} … are nowhere")
            numbers[first : first + count] = number
            targets[first : first + count] = np.arange(target, target + count)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptObjectError(f"{name}: not a valid husk: {error}") from error
    return Husk(footer, packs, numbers, targets)
