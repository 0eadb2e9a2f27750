"""Proving an ancestor while the server is stopped: lineage marks read from the heap page itself.

A running server is asked with SQL. A cleanly stopped one has every committed row on disk, so the
mark's row is looked up at its ``ctid``: same inserting transaction, same mark, and that
transaction committed (hint bit, or the commit log). Layouts: ``htup_details.h``, ``itemid.h``,
``clog.c``.
"""

from __future__ import annotations

import struct

from dbmodule.ident import PAGE_SIZE

_ITEM = struct.Struct("<I")
_PAGE_HEADER = 24
_LP_NORMAL = 1
_TUPLE_HEADER = 23
_XMIN = struct.Struct("<I")
_INFOMASK = struct.Struct("<H")
_INFOMASK_AT = 20
_XMIN_COMMITTED = 0x0100
_XMIN_INVALID = 0x0200
_XIDS_PER_PAGE = PAGE_SIZE * 4
_PAGES_PER_SEGMENT = 32
_COMMITTED = 1


def commit_log_path(xid: int) -> str:
    """The commit log file that holds the status of a 32-bit transaction id."""
    return f"pg_xact/{xid // (_XIDS_PER_PAGE * _PAGES_PER_SEGMENT):04X}"


def committed(commit_log: bytes, xid: int) -> bool:
    """Does this segment of the commit log say that `xid` committed?"""
    at = xid % (_XIDS_PER_PAGE * _PAGES_PER_SEGMENT)
    return at // 4 < len(commit_log) and commit_log[at // 4] >> at % 4 * 2 & 3 == _COMMITTED


def row_holds_mark(page: bytes, item: int, mark: str, xid: int) -> bool | None:
    """Does line pointer `item` (from 1) of a heap page hold `mark`, inserted by `xid`?

    True or False when the page tells whether the insertion committed; None when the row is there
    but only the commit log knows.
    """
    at = _PAGE_HEADER + _ITEM.size * (item - 1)
    if item < 1 or at + _ITEM.size > len(page):
        return False
    (pointer,) = _ITEM.unpack_from(page, at)
    offset, state, length = pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17
    row = page[offset : offset + length]
    if state != _LP_NORMAL or len(row) < _TUPLE_HEADER:
        return False
    if _XMIN.unpack_from(row)[0] != xid & 0xFFFFFFFF or mark.encode() not in row:
        return False
    (infomask,) = _INFOMASK.unpack_from(row, _INFOMASK_AT)
    if infomask & _XMIN_COMMITTED:
        return True
    return False if infomask & _XMIN_INVALID else None
