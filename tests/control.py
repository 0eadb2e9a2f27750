"""Control files made by hand, with a right CRC."""

from __future__ import annotations

import struct

import crc32c

CRC_OFFSETS = {1300: 288, 1700: 288, 1800: 292}


def control_file(version: int, **words: int) -> bytes:
    """8 kB with a right CRC; `words` are 32-bit values by offset, as ``at_16=6``."""
    data = bytearray(8192)
    struct.pack_into("<QII", data, 0, 7_000_000_000_000_000_001, version, 202506291)
    struct.pack_into("<I", data, 172, 1)
    for name, value in words.items():
        struct.pack_into("<I", data, int(name.removeprefix("at_")), value)
    end = CRC_OFFSETS[version]
    struct.pack_into("<I", data, end, crc32c.crc32c(bytes(data[:end])))
    return bytes(data)
