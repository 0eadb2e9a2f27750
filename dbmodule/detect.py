"""Deciding which pages changed since the baseline: pure functions over whole buffers.

For a page of a relation's main fork *unchanged* is a claim that needs proof: the page is within
the baseline's file, its header is one, its LSN lies below the baseline's start (a later page may
have been torn when the baseline read it), and (LSN, checksum) *equal* the baseline's mark. Being
merely older proves nothing: timeline switches, reverted snapshots, reused file numbers and
offline checksum changes all bring back old LSNs. Everything else is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbmodule import page
from dbmodule.ident import Lsn
from dbmodule.ports import Buffer
from dbmodule.registry import MARK, Hashes, Marks


@dataclass(frozen=True, slots=True)
class Observed:
    """What the headers of a stretch of pages say; arrays of one element per page."""

    marks: Marks
    """As `marks_of`; (0, 0) for pages of zero bytes."""
    zero: NDArray[np.bool_]
    odd: NDArray[np.bool_]
    """Neither zero nor a page with a header and an LSN that could prove anything: the file has to
    be compared by content."""
    unlogged: NDArray[np.bool_]
    """Of those, the ones with a header: nobody was writing them when they were read."""


def marks_of(headers: NDArray[np.void]) -> Marks:
    """(LSN, checksum) of pages, the bit for "all visible" mixed into the checksum.

    Without checksums a vacuum sets that bit at an unchanged LSN. A copy that has it in the
    visibility map but not in the page would never clear it there again, and index-only scans
    would return rows that were deleted.
    """
    marks = np.empty(len(headers), MARK)
    marks["lsn"] = page.lsns(headers)
    marks["checksum"] = headers["checksum"] ^ (headers["flags"] & page.ALL_VISIBLE)
    return marks


def observe(buffer: Buffer, lowest_lsn: int) -> Observed:
    """Look at the headers of whole pages.

    An LSN below `lowest_lsn` (the size of a WAL segment: no real LSN is) comes from an operation
    that was not logged, such as a bulk load under ``wal_level=minimal``, and proves nothing.
    """
    headers = page.headers(buffer)
    marks = marks_of(headers)
    zero = page.all_zero(buffer)
    valid = page.looks_valid(headers)
    unlogged = ~zero & valid & (marks["lsn"] < lowest_lsn)
    return Observed(marks, zero, ~zero & ~valid | unlogged, unlogged)


@dataclass(frozen=True, slots=True)
class PageChanges:
    changed: NDArray[np.bool_]
    divergent: NDArray[np.bool_]
    """Older than the baseline, and yet not what the baseline stored."""
    hints: NDArray[np.bool_]
    """Of those, the ones that differ in nothing but the checksum: hint bits, if the baseline was
    read from another copy of the cluster, or if there are no checksums."""


def compare_marks(seen: Observed, baseline: Marks, baseline_start: Lsn) -> PageChanges:
    """Compare a stretch of pages with the baseline's marks of the same blocks.

    `baseline` may be shorter than the stretch: pages beyond it are changed.
    """
    count = len(seen.marks)
    known = min(count, len(baseline))
    same_lsn = np.zeros(count, np.bool_)
    same_lsn[:known] = seen.marks["lsn"][:known] == baseline["lsn"][:known]
    same = same_lsn.copy()
    same[:known] &= seen.marks["checksum"][:known] == baseline["checksum"][:known]
    old = seen.marks["lsn"] < baseline_start
    # Equal marks of a zero page mean that the baseline's was zero too: only such have LSN 0.
    unchanged = same & old & ~seen.odd
    divergent = old & ~same & ~seen.zero & ~seen.odd
    divergent[known:] = False
    return PageChanges(~unchanged, divergent, divergent & same_lsn)


def compare_hashes(now: Hashes, baseline: Hashes) -> NDArray[np.bool_]:
    """Which chunks differ from the baseline's of the same place, or have none there."""
    changed = np.ones(len(now), np.bool_)
    known = min(len(now), len(baseline))
    pair = np.dtype(("<u8", 2))
    a = np.ascontiguousarray(now[:known]).view(pair).reshape(known, 2)
    b = np.ascontiguousarray(baseline[:known]).view(pair).reshape(known, 2)
    changed[:known] = (a != b).any(axis=1)
    return changed
