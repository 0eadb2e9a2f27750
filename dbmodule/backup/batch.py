"""Pages of one relation file in a buffer: read, looked at, verified, and read again when torn."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbmodule import detect, page
from dbmodule.ident import PAGE_SIZE, Lsn
from dbmodule.ports import SourceFile
from dbmodule.registry import UNKNOWN_LSN, Marks

REREAD_SECONDS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2)
"""Pauses before a page that failed its checksum is read again: the server was writing it."""


class OddPageError(Exception):
    """A relation holds a page without a header or a real LSN: compare it by content."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A page that still fails its checksum after it was read again and again."""

    path: str
    block: int
    """Within the fork."""
    lsn: Lsn
    expected: int
    actual: int


class Batch:
    """Some pages of a file, in the order of their numbers, in a buffer of the caller's.

    `numbers`, shape (n,), are ascending and count from the file's first page.
    """

    def __init__(self, file: SourceFile, buffer: memoryview, numbers: NDArray[np.int64]) -> None:
        """Read them: one call for each run of neighbours.

        Where the file is too short, its missing pages are left out. A partial page at its end is
        being added: WAL has it.
        """
        self._file = file
        self.bytes_read = 0
        ends = np.flatnonzero(np.diff(numbers) != 1) + 1
        pages = 0
        for first, past in zip([0, *ends.tolist()], [*ends.tolist(), len(numbers)], strict=True):
            if first == past:
                break
            run = buffer[first * PAGE_SIZE : past * PAGE_SIZE]
            got = file.read_into(run, int(numbers[first]) * PAGE_SIZE)
            self.bytes_read += got
            pages = first + got // PAGE_SIZE
            if pages < past:
                break
        self.complete = pages == len(numbers)
        self.numbers = numbers[:pages]
        self.view = buffer[: pages * PAGE_SIZE]

    def _read_again(self, which: list[int]) -> None:
        for at in which:
            part = self.view[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
            self.bytes_read += self._file.read_into(part, int(self.numbers[at]) * PAGE_SIZE)

    def observe(self, lowest_lsn: int) -> detect.Observed:
        """What the headers say; raises `OddPageError` when a page stays odd."""
        seen = detect.observe(self.view, lowest_lsn)
        for pause in REREAD_SECONDS:
            if not seen.odd.any():
                return seen
            if seen.unlogged.any():
                break
            time.sleep(pause)  # perhaps caught while the server was writing it
            self._read_again(np.flatnonzero(seen.odd).tolist())
            seen = detect.observe(self.view, lowest_lsn)
        if seen.odd.any():
            raise OddPageError
        return seen

    def verify(self, path: str, first_block: int, checked: NDArray[np.bool_]) -> list[Suspect]:
        """The pages among `checked` that do not match their checksums, however often read.

        `first_block` is the block number of the file's first page within its fork.
        """
        blocks = (self.numbers + first_block).astype(np.uint32)
        failed = self._failures(blocks, checked)
        for pause in REREAD_SECONDS:
            if not len(failed):
                return []
            time.sleep(pause)
            self._read_again(failed.tolist())
            failed = self._failures(blocks, checked)
        computed = page.compute_checksums(self.view, blocks)
        headers = page.headers(self.view)
        lsns = page.lsns(headers)
        return [
            Suspect(
                path,
                int(blocks[at]),
                Lsn(int(lsns[at])),
                int(computed[at]),
                int(headers["checksum"][at]),
            )
            for at in failed.tolist()
        ]

    def _failures(self, blocks: NDArray[np.uint32], checked: NDArray[np.bool_]) -> NDArray[np.intp]:
        failed = page.checksum_failures(self.view, blocks)
        return failed[checked[failed]]

    def marks(self) -> Marks:
        """`detect.marks_of` each page as it lies in the buffer."""
        return detect.marks_of(page.headers(self.view))

    def trusted_marks(self, suspects: list[Suspect], first_block: int) -> Marks:
        """As `marks`, with those of suspects unknown: such a page is never unchanged."""
        marks = self.marks()
        if suspects:
            bad = np.array([s.block - first_block for s in suspects], np.int64)
            marks["lsn"][np.searchsorted(self.numbers, bad)] = UNKNOWN_LSN
        return marks
