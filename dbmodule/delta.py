"""Page maps: where the stored bytes of each block of a file are, and how a delta overlays them.

A *reference* says (pack, frame, slot). A backup stores, per file, *extents*: runs of consecutive
blocks that lie in consecutive slots of one frame, in ascending order of blocks. Folding the
extents of a chain from the full down gives each block exactly one reference. Everything here is
pure and vectorised; nothing loops per page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule.ident import PAGE_SIZE

FRAME_PAGES = 32
"""Pages per frame at most."""
FRAME_BYTES = FRAME_PAGES * PAGE_SIZE
ZERO_FRAME = 0xFFFFFFFF
"""As a frame number: the block's bytes are all zero and nothing is stored for it."""

EXTENT = np.dtype(
    [("block", "<u4"), ("count", "<u4"), ("pack", "<u4"), ("frame", "<u4"), ("slot", "u1")]
)
REF = np.dtype([("pack", "<u4"), ("frame", "<u4"), ("slot", "u1")])

Extents = NDArray[Any]
"""Shape (n,), dtype `EXTENT`."""
Refs = NDArray[Any]
"""Shape (n,), dtype `REF`: one reference per block."""


def zero_refs(count: int) -> Refs:
    """References of `count` blocks for which nothing is stored."""
    refs = np.zeros(count, REF)
    refs["frame"] = ZERO_FRAME
    return refs


def to_extents(blocks: NDArray[np.uint32], refs: Refs) -> Extents:
    """Merge references of ascending `blocks`, shape (n,), into the fewest extents."""
    count = len(blocks)
    if count == 0:
        return np.empty(0, EXTENT)
    same_frame = (refs["pack"][1:] == refs["pack"][:-1]) & (refs["frame"][1:] == refs["frame"][:-1])
    next_slot = refs["slot"][1:].astype(np.int16) == refs["slot"][:-1].astype(np.int16) + 1
    zero = refs["frame"][1:] == ZERO_FRAME
    joined = (np.diff(blocks.astype(np.int64)) == 1) & same_frame & (next_slot | zero)
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    extents = np.empty(len(starts), EXTENT)
    extents["block"] = blocks[starts]
    extents["count"] = np.diff(np.append(starts, count))
    for name in ("pack", "frame", "slot"):
        extents[name] = refs[name][starts]
    return extents


def expand(extents: Extents) -> tuple[NDArray[np.int64], Refs]:
    """The blocks and references of `extents`: the inverse of `to_extents`."""
    counts = extents["count"].astype(np.int64)
    total = int(counts.sum())
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    refs = np.empty(total, REF)
    for name in ("pack", "frame"):
        refs[name] = np.repeat(extents[name], counts)
    slots = np.repeat(extents["slot"], counts).astype(np.int64) + within
    refs["slot"] = np.where(refs["frame"] == ZERO_FRAME, 0, slots)
    return np.repeat(extents["block"], counts).astype(np.int64) + within, refs


@dataclass(slots=True)
class PageMap:
    """The folded map of one file: for each block a reference and the chain member it came from."""

    refs: Refs
    origin: NDArray[np.uint16]
    """Position in the chain, 0 = the full; shape (blocks,)."""

    @classmethod
    def empty(cls) -> PageMap:
        return cls(np.empty(0, REF), np.empty(0, np.uint16))

    def overlay(self, extents: Extents, blocks: int, origin: int) -> PageMap:
        """This map cut or grown to `blocks` blocks, with `extents` of chain member `origin` on top.

        Raises `ValueError` when a block beyond the old length has no reference: the delta is
        incomplete, and inventing bytes for it would be a silently wrong restore.
        """
        kept = min(blocks, len(self.refs))
        # Lengths that lie are found before memory is taken for them.
        stored = int(extents["count"].astype(np.int64).sum())
        if stored > blocks:
            raise ValueError(f"{stored} blocks are stored, beyond the file's {blocks} blocks")
        if blocks - kept > stored:
            numbers, _ = expand(extents)
            beyond = numbers[numbers >= kept] - kept
            gaps = np.flatnonzero(beyond != np.arange(len(beyond)))
            missing = int(gaps[0]) if len(gaps) else len(beyond)
            raise ValueError(f"no bytes are stored for block {kept + missing}")
        refs = np.zeros(blocks, REF)
        origins = np.full(blocks, 0xFFFF, np.uint16)
        refs[:kept] = self.refs[:kept]
        origins[:kept] = self.origin[:kept]
        numbers, new = expand(extents)
        if len(numbers) and int(numbers[-1]) >= blocks:
            raise ValueError(f"block {int(numbers[-1])} lies beyond the file's {blocks} blocks")
        refs[numbers] = new
        origins[numbers] = origin
        gap = np.flatnonzero(origins == 0xFFFF)
        if len(gap):
            raise ValueError(f"no bytes are stored for block {int(gap[0])}")
        return PageMap(refs, origins)
