"""Lineage marks on heap pages built by hand: only the very row, by the very transaction."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.ident import PAGE_SIZE
from dbmodule.lineage import commit_log_path, committed, row_holds_mark
from tests.unit.strategies import quick

MARK = "0123456789abcdef" * 2
XID = 733
COMMITTED, INVALID = 0x0100, 0x0200
NORMAL, REDIRECT, DEAD, UNUSED = 1, 2, 3, 0


def heap_page(rows: list[tuple[int, bytes]]) -> bytes:
    """Rows as (state of the line pointer, tuple), laid out from the page's end as a server does."""
    data = bytearray(PAGE_SIZE)
    end = PAGE_SIZE
    for number, (state, row) in enumerate(rows):
        end = (end - len(row)) & ~7
        data[end : end + len(row)] = row
        struct.pack_into("<I", data, 24 + 4 * number, end | state << 15 | len(row) << 17)
    return bytes(data)


def heap_row(xmin: int, infomask: int, text: str) -> bytes:
    """HeapTupleHeaderData of 23 bytes and a padding byte, then a short varlena."""
    header = struct.pack("<III4xHHHB", xmin, 0, 0, 0, 2, infomask, 24)
    # t_ctid takes six bytes: block high, block low, item.
    header = header[:12] + struct.pack("<HHH", 0, 0, 1) + struct.pack("<HHB", 2, infomask, 24)
    body = text.encode()
    return header + b"\0" + bytes([(len(body) + 1) << 1 | 1]) + body


@pytest.mark.parametrize(
    ("infomask", "expected"),
    [(COMMITTED, True), (INVALID, False), (COMMITTED | INVALID, True), (0, None), (0x0802, None)],
)
def test_hint_bits_say_what_they_know(infomask: int, expected: bool | None) -> None:
    other = heap_row(XID, COMMITTED, "f" * 32)
    data = heap_page([(NORMAL, other), (NORMAL, heap_row(XID, infomask, MARK))])
    assert row_holds_mark(data, 2, MARK, XID) is expected
    assert row_holds_mark(data, 1, MARK, XID) is False


def test_a_row_of_another_transaction_is_not_the_mark() -> None:
    data = heap_page([(NORMAL, heap_row(XID, COMMITTED, MARK))])
    assert row_holds_mark(data, 1, MARK, XID + 1) is False
    # A full 64-bit id: the row holds its low half.
    assert row_holds_mark(data, 1, MARK, XID + (3 << 32)) is True


@pytest.mark.parametrize("state", [UNUSED, REDIRECT, DEAD])
def test_only_a_normal_line_pointer_leads_to_a_row(state: int) -> None:
    data = heap_page([(state, heap_row(XID, COMMITTED, MARK))])
    assert row_holds_mark(data, 1, MARK, XID) is False


@pytest.mark.parametrize("item", [-1, 0, 2, 2043, 65535])
def test_other_items_hold_nothing(item: int) -> None:
    assert row_holds_mark(
        heap_page([(NORMAL, heap_row(XID, COMMITTED, MARK))]), item, MARK, XID
    ) is (False)


def test_a_page_cut_off_or_zero_holds_nothing() -> None:
    data = heap_page([(NORMAL, heap_row(XID, COMMITTED, MARK))])
    for length in (0, 24, 27, 28, 4096, PAGE_SIZE - 70):
        assert row_holds_mark(data[:length], 1, MARK, XID) is False
    assert row_holds_mark(bytes(PAGE_SIZE), 1, MARK, XID) is False


@quick(100)
@given(st.binary(min_size=0, max_size=200), st.integers(-5, 100))
def test_no_page_makes_it_fail(data: bytes, item: int) -> None:
    assert row_holds_mark(data, item, MARK, XID) is False


@pytest.mark.parametrize(
    ("xid", "path"),
    [
        (3, "pg_xact/0000"),
        ((1 << 20) - 1, "pg_xact/0000"),
        (1 << 20, "pg_xact/0001"),
        (0xFFFFFFFF, "pg_xact/0FFF"),
    ],
)
def test_the_commit_log_is_cut_at_a_million_transactions(xid: int, path: str) -> None:
    assert commit_log_path(xid) == path


@quick(200)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 3))
def test_two_bits_a_transaction(log: bytes, offset: int, segment: int) -> None:
    bits = [byte >> shift & 3 for byte in log for shift in (0, 2, 4, 6)]
    expected = offset < len(bits) and bits[offset] == 1
    assert committed(log, segment * (1 << 20) + offset) is expected
