"""Writing one file of a restore: each needed frame decompressed once, each page written once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dbmodule.delta import ZERO_FRAME, PageMap, Refs
from dbmodule.errors import CorruptObjectError
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import TargetFile
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.frames import FrameReader

READ_BYTES = 4 << 20
"""Frames that lie close together are fetched in one read of at most about this size."""
GAP_BYTES = 64 << 10


@dataclass(slots=True)
class FileCounts:
    bytes_written: int = 0
    frames_read: int = 0
    pages_from: Counter[int] = field(default_factory=Counter)
    """Position in the chain → pages taken from there."""


def write_file(
    view: ChainView, frames: FrameReader, path: str, size: int, target: TargetFile
) -> FileCounts:
    """Fill `target`, which holds `size` zero bytes, with what the chain has for `path`."""
    counts = FileCounts()
    folded = view.page_map(path)
    origins, numbers = np.unique(folded.origin, return_counts=True)
    counts.pages_from.update(dict(zip(origins.tolist(), numbers.tolist(), strict=True)))
    for pack, frame_numbers, blocks_by_frame, slots_by_frame in _by_pack(folded):
        for number, raw in frames.frames(view.packs[pack], frame_numbers, READ_BYTES, GAP_BYTES):
            blocks, slots = blocks_by_frame[number], slots_by_frame[number]
            counts.frames_read += 1
            for first, count in _runs(blocks, slots):
                offset = int(blocks[first]) * PAGE_SIZE
                start = int(slots[first]) * PAGE_SIZE
                length = min(size - offset, count * PAGE_SIZE)
                piece = memoryview(raw)[start : start + length]
                if len(piece) != length or length <= 0:
                    raise CorruptObjectError(
                        f"{path}: block {int(blocks[first])} refers to bytes that its frame"
                        " does not have"
                    )
                target.write(piece, offset)
                counts.bytes_written += length
    return counts


def _by_pack(
    folded: PageMap,
) -> Iterator[tuple[int, list[int], dict[int, NDArray[np.int64]], dict[int, NDArray[np.int64]]]]:
    """The stored blocks of a file, grouped by pack and frame in the order of their place."""
    refs: Refs = folded.refs
    blocks = np.flatnonzero(refs["frame"] != ZERO_FRAME)
    if not len(blocks):
        return
    stored = refs[blocks]
    order = np.lexsort((blocks, stored["frame"], stored["pack"]))
    blocks, stored = blocks[order], stored[order]
    key = stored["pack"].astype(np.int64) << 32 | stored["frame"].astype(np.int64)
    starts = [0, *(np.flatnonzero(np.diff(key)) + 1).tolist()]
    ends = [*starts[1:], len(key)]
    pack, numbers = -1, list[int]()
    blocks_of: dict[int, NDArray[np.int64]] = {}
    slots_of: dict[int, NDArray[np.int64]] = {}
    for start, end in zip(starts, ends, strict=True):
        first = stored[start]
        if int(first["pack"]) != pack:
            if numbers:
                yield pack, numbers, blocks_of, slots_of
            pack, numbers, blocks_of, slots_of = int(first["pack"]), [], {}, {}
        number = int(first["frame"])
        numbers.append(number)
        blocks_of[number] = blocks[start:end]
        slots_of[number] = stored["slot"][start:end].astype(np.int64)
    if numbers:
        yield pack, numbers, blocks_of, slots_of


def _runs(blocks: NDArray[np.int64], slots: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, count) of stretches that are consecutive both in the file and in the frame."""
    breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(slots) != 1)) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
        yield start, end - start
