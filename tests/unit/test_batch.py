"""When a page is read again: while the server may be writing it, and only then."""

from __future__ import annotations

import numpy as np
import pytest

from dbmodule.backup.batch import Batch, OddPageError
from dbmodule.ident import PAGE_SIZE
from dbmodule.registry import FileIdentity
from tests.unit.strategies import WAL_SEGMENT, relation_page


class Counting:
    """`ports.SourceFile` of one page, which is another after `changes` reads."""

    mode = 0o600

    def __init__(self, first: bytes, then: bytes, changes: int) -> None:
        self.first, self.then, self.changes, self.reads = first, then, changes, 0

    def identity(self) -> FileIdentity:
        return FileIdentity(PAGE_SIZE, 0, 0, 0, 0)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        buffer[:] = self.first if self.reads < self.changes else self.then
        self.reads += 1
        return PAGE_SIZE

    def close(self) -> None:
        pass


GOOD = relation_page(WAL_SEGMENT, 7)
TORN = GOOD[:18] + b"\0\0" + GOOD[20:]


def batch(file: Counting) -> Batch:
    return Batch(file, memoryview(bytearray(PAGE_SIZE)), np.zeros(1, np.int64))


def test_a_page_without_its_header_is_read_again_until_it_has_one() -> None:
    file = Counting(TORN, GOOD, changes=3)
    assert not batch(file).observe(WAL_SEGMENT).odd.any()
    assert file.reads == 4


def test_a_page_that_was_never_logged_is_not_waited_for() -> None:
    """A cluster fresh from initdb without checksums has dozens of such files."""
    page = relation_page(40, 0)
    file = Counting(page, page, changes=0)
    with pytest.raises(OddPageError):
        batch(file).observe(WAL_SEGMENT)
    assert file.reads == 1
