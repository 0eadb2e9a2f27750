"""Small files of the data directory that carry a CRC-32C of their own bytes.

Relation maps (``relmapper.c``: the CRC follows the mappings, padded to 512 bytes before version
16) and two-phase state files (``twophase.c``: the CRC is the last four bytes). The server writes
them at once, so a reader that sees a wrong CRC has caught a write in the middle and reads again.
"""

from __future__ import annotations

import struct

import crc32c

_RELATION_MAP_CRC_AT = {512: 504, 524: 520}
_CRC = struct.Struct("<I")


def is_sound(path: str, data: bytes) -> bool:
    """Does the file match its own CRC? Files without one are always sound."""
    name = path.rpartition("/")[2]
    if name == "pg_filenode.map":
        at = _RELATION_MAP_CRC_AT.get(len(data))
        return at is not None and _matches(data[:at], data, at)
    if path.startswith("pg_twophase/"):
        at = len(data) - _CRC.size
        return at > 0 and _matches(data[:at], data, at)
    return True


def _matches(covered: bytes, data: bytes, at: int) -> bool:
    return bool(crc32c.crc32c(covered) == _CRC.unpack_from(data, at)[0])
