"""Stored pages against themselves: what hashes cannot see, since the wrong bytes were hashed.

Where a chain is folded each page must carry its own checksum, which depends on its block number,
and be the page that the registry remembers: same mark. So a map that leads to
another block's page is found by the checksum, and one that leads to an older copy of the right
page by its mark. Pages are looked at some hundreds at a time; nothing loops per page, and nothing
is kept but the few that fail.

Not damage is what the backup knew: a page that was recorded as corrupt in the source, and a torn
one of which the backup's own WAL holds the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule import datafile, detect, page
from dbmodule.delta import ZERO_FRAME, PageMap
from dbmodule.errors import CorruptObjectError
from dbmodule.ident import PAGE_SIZE
from dbmodule.registry import UNKNOWN_LSN, EntryKind
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.frames import FrameReader

_BATCH_PAGES = 512
_READ_BYTES = 4 << 20
_GAP_BYTES = 64 << 10
_SHOWN = 5
"""Blocks that a problem names."""

Blocks = NDArray[np.int64]


@dataclass(slots=True)
class PageFindings:
    """What was seen of one file."""

    pages: int = 0
    known_corrupt: int = 0
    """Of these: those that are as corrupt as the source's were."""
    problems: list[str] = field(default_factory=list)


def check_pages(
    view: ChainView, frames: FrameReader, path: str, *, inherited: bool
) -> PageFindings:
    """Look at the pages of a relation's file; of another file there is nothing to see.

    `inherited` = those too that the last backup of the chain did not store itself.
    """
    findings = PageFindings()
    relation = datafile.relation(path)
    entry = view.files[path]
    if relation is None or entry.kind not in (EntryKind.RELATION, EntryKind.CONTENT):
        return findings
    folded = view.page_map(path)
    marks = view.prints(path) if entry.kind is EntryKind.RELATION else None
    looked = _Looked(view, path, relation.first_block(view.chain[-1].blocks_per_segment), folded)
    wanted = np.ones(len(folded.refs), np.bool_)
    if not inherited:
        wanted = folded.origin == len(view.chain) - 1
    # A page that is cut off at the file's end is none.
    wanted[entry.size // PAGE_SIZE :] = False
    zero = np.flatnonzero(wanted & (folded.refs["frame"] == ZERO_FRAME))
    findings.pages += len(zero)
    if marks is not None:
        looked.strange.append(zero[(marks["lsn"][zero] != 0) | (marks["checksum"][zero] != 0)])
    stored = np.flatnonzero(wanted & (folded.refs["frame"] != ZERO_FRAME))
    for blocks, pages in _pages(view, frames, path, folded, stored):
        findings.pages += len(blocks)
        looked.at(blocks, pages, None if marks is None else marks[blocks])
    findings.known_corrupt = looked.known_corrupt
    findings.problems = list(looked.problems())
    return findings


class _Looked:
    """The pages of one file that are not as they should be."""

    def __init__(self, view: ChainView, path: str, first_block: int, folded: PageMap) -> None:
        self._chain = view.chain
        self._checksums = view.chain[-1].data_checksums
        self._path = path
        self._first_block = first_block
        self._origin = folded.origin
        listed = {c.block - first_block for m in view.chain for c in m.corruption if c.path == path}
        self._listed = np.array(sorted(listed), np.int64)
        # A manifest lists the first corrupt pages only: of others its marks are all there is.
        self._more = np.array([m.corrupt_pages > len(m.corruption) for m in view.chain])
        self.failed: list[Blocks] = []
        self.strange: list[Blocks] = []
        self.known_corrupt = 0

    def at(self, blocks: Blocks, pages: memoryview, marks: NDArray[Any] | None) -> None:
        """Judge `pages`, whose numbers within the file are `blocks`."""
        headers = page.headers(pages)
        lsns = page.lsns(headers)
        unknown = np.ones(len(blocks), np.bool_)
        if marks is not None:
            unknown = marks["lsn"] == UNKNOWN_LSN
            self.strange.append(blocks[(marks != detect.marks_of(headers)) & ~unknown])
        if not self._checksums:
            return
        numbers = (blocks + self._first_block).astype(np.uint32)
        failed = page.checksum_failures(pages, numbers)
        bad = blocks[failed]
        last = self._chain[-1]
        mended = (lsns[failed] >= last.start_lsn) & (lsns[failed] <= last.stop_lsn)
        known = np.isin(bad, self._listed) | (self._more[self._origin[bad]] & unknown[failed])
        self.known_corrupt += int((known & ~mended).sum())
        self.failed.append(bad[~known & ~mended])

    def problems(self) -> Iterator[str]:
        for found, text in (
            (self.failed, "do not match their own checksum"),
            (self.strange, "are not those that the registry remembers"),
        ):
            blocks = np.sort(np.concatenate([np.empty(0, np.int64), *found])) + self._first_block
            if len(blocks):
                shown = ", ".join(str(block) for block in blocks[:_SHOWN].tolist())
                more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
                yield f"{self._path}: the pages of block {shown}{more} {text}"


def _pages(
    view: ChainView, frames: FrameReader, path: str, folded: PageMap, blocks: Blocks
) -> Iterator[tuple[Blocks, memoryview]]:
    """The stored pages of `blocks`, some hundreds at a time, in the order of their place."""
    numbers: list[Blocks] = []
    pages: list[NDArray[np.uint8]] = []
    count = 0
    for at, slots, raw in _frames(view, frames, folded, blocks):
        whole = np.frombuffer(raw, np.uint8, len(raw) // PAGE_SIZE * PAGE_SIZE)
        rows = whole.reshape(-1, PAGE_SIZE)
        if int(slots.max()) >= len(rows):
            raise CorruptObjectError(f"{path}: refers to a page that its frame does not have")
        numbers.append(at)
        pages.append(rows[slots])
        count += len(at)
        if count >= _BATCH_PAGES:
            yield np.concatenate(numbers), np.concatenate(pages).reshape(-1).data
            numbers, pages, count = [], [], 0
    if count:
        yield np.concatenate(numbers), np.concatenate(pages).reshape(-1).data


def _frames(
    view: ChainView, frames: FrameReader, folded: PageMap, blocks: Blocks
) -> Iterator[tuple[Blocks, NDArray[np.int64], bytes]]:
    """(blocks, their slots, raw bytes) of each frame that holds any of `blocks`."""
    refs = folded.refs[blocks]
    order = np.lexsort((refs["frame"], refs["pack"]))
    blocks, refs = blocks[order], refs[order]
    slots = refs["slot"].astype(np.int64)
    packs, starts = np.unique(refs["pack"], return_index=True)
    pasts = np.searchsorted(refs["pack"], packs, side="right")
    for pack, first, past in zip(packs.tolist(), starts.tolist(), pasts.tolist(), strict=True):
        numbers, at = np.unique(refs["frame"][first:past], return_index=True)
        ends = np.append(at[1:], past - first) + first
        read = frames.frames(view.packs[pack], numbers.tolist(), _READ_BYTES, _GAP_BYTES)
        for (_, raw), start, end in zip(read, (at + first).tolist(), ends.tolist(), strict=True):
            yield blocks[start:end], slots[start:end], raw
