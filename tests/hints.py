"""What a server without checksums and ``wal_log_hints`` changes in a page and tells nobody.

The same fields as PostgreSQL's own check of replay against the primary passes over
(``wal_consistency_checking``): all of them can be found out again, so that nothing depends on them.
Not so "all visible", which that check passes over, too: it vouches for the visibility map.
"""

from __future__ import annotations

import struct

from dbmodule.ident import PAGE_SIZE

_HEADER = 24
_FLAGS, _SPECIAL, _PRUNE_XID = 10, 16, 20
_FREE_LINES, _FULL = 1, 2
_NORMAL = 1
_INFOMASK = 20
_XACT_HINTS = 0x0100 | 0x0200 | 0x0400 | 0x0800  # xmin and xmax committed, or invalid


def masked(page: bytes) -> bytes:
    """`page` without hints. A page is a heap's if it has no special space; else an index's, whose
    flags are in that space and whose line pointers may be marked dead."""
    out = bytearray(page)
    if len(page) != PAGE_SIZE:
        return page
    flags, lower = struct.unpack_from("<HH", out, _FLAGS)
    (special,) = struct.unpack_from("<H", out, _SPECIAL)
    if not _HEADER <= special <= PAGE_SIZE:
        return page
    struct.pack_into("<H", out, _FLAGS, flags & ~(_FREE_LINES | _FULL))
    struct.pack_into("<I", out, _PRUNE_XID, 0)
    if special < PAGE_SIZE:
        out[special:] = bytes(PAGE_SIZE - special)
    for at in range(_HEADER, min(lower, PAGE_SIZE - 3), 4):
        (pointer,) = struct.unpack_from("<I", out, at)
        offset, state = pointer & 0x7FFF, pointer >> 15 & 3
        if special < PAGE_SIZE:
            struct.pack_into("<I", out, at, pointer & ~(3 << 15))
        elif state == _NORMAL and offset + _INFOMASK + 2 <= PAGE_SIZE:
            (infomask,) = struct.unpack_from("<H", out, offset + _INFOMASK)
            struct.pack_into("<H", out, offset + _INFOMASK, infomask & ~_XACT_HINTS)
    return bytes(out)
