"""Files with a CRC of their own, in the layouts of each version."""

from __future__ import annotations

import struct

import crc32c
import pytest

from dbmodule.selfchecked import is_sound


def relation_map(mappings: int, size: int) -> bytes:
    """RelMapFile: magic, count, room for `mappings` pairs, CRC; padded to `size`."""
    body = struct.pack("<ii", 0x592717, 17)
    body += b"".join(struct.pack("<II", 1259 + n, 2000 + n) for n in range(17))
    body = body.ljust(8 + 8 * mappings, b"\0")
    return (body + struct.pack("<I", crc32c.crc32c(body))).ljust(size, b"\0")


def two_phase() -> bytes:
    body = struct.pack("<II", 0x57F94534, 104) + bytes(range(96))
    return body + struct.pack("<I", crc32c.crc32c(body))


SOUND = [
    ("global/pg_filenode.map", relation_map(62, 512)),
    ("base/5/pg_filenode.map", relation_map(64, 524)),
    ("pg_tblspc/16400/PG_18_202506291/5/pg_filenode.map", relation_map(64, 524)),
    ("pg_twophase/0000000000000305", two_phase()),
    ("pg_twophase/00000305", two_phase()),
]
COVERED = {512: 508, 524: 524}


@pytest.mark.parametrize(("path", "data"), SOUND)
def test_a_sound_file_is_sound(path: str, data: bytes) -> None:
    assert is_sound(path, data)


@pytest.mark.parametrize(("path", "data"), SOUND)
def test_every_flipped_byte_is_noticed(path: str, data: bytes) -> None:
    for at in range(COVERED.get(len(data), len(data))):
        flipped = bytearray(data)
        flipped[at] ^= 0x40
        assert not is_sound(path, bytes(flipped))


@pytest.mark.parametrize(("path", "data"), SOUND)
def test_a_file_cut_off_is_not_sound(path: str, data: bytes) -> None:
    for length in range(len(data)):
        assert not is_sound(path, data[:length])


def test_other_files_carry_no_crc() -> None:
    for path in ("PG_VERSION", "pg_xact/0000", "base/5/16384", "base/5/pg_filenode.map.bak"):
        assert is_sound(path, b"anything")
        assert is_sound(path, b"")
