"""The judge that passes over hint bits passes over nothing else."""

from __future__ import annotations

import struct

import pytest

from tests.hints import masked

SIZE = 8192


def page(*, special: int = SIZE) -> bytes:
    """One tuple of 40 bytes with a data byte at its end."""
    out = bytearray(SIZE)
    at = special - 40
    struct.pack_into("<QHHHHHHI", out, 0, 77, 5, 0, 28, at, special, 0x2004, 0)
    struct.pack_into("<I", out, 24, at | 1 << 15 | 40 << 17)
    out[at + 20 : at + 22] = struct.pack("<H", 0x0802)
    out[special - 1] = 9
    return bytes(out)


def flipped(content: bytes, at: int, mask: int) -> bytes:
    out = bytearray(content)
    out[at] ^= mask
    return bytes(out)


HEAP, INDEX = page(), page(special=SIZE - 16)
TUPLE = SIZE - 40


@pytest.mark.parametrize(
    ("content", "at", "mask"),
    [
        (HEAP, 10, 1),  # has free line pointers
        (HEAP, 20, 1),  # the next transaction worth a pruning
        (HEAP, TUPLE + 21, 0x01),  # xmin committed
        (HEAP, TUPLE + 21, 0x08),  # xmax invalid
        (INDEX, 25, 0x80),  # a line pointer, dead
        (INDEX, SIZE - 4, 0x40),  # has garbage
    ],
)
def test_hints_are_passed_over(content: bytes, at: int, mask: int) -> None:
    changed = flipped(content, at, mask)
    assert changed != content
    assert masked(changed) == masked(content)


@pytest.mark.parametrize(
    ("content", "at", "mask"),
    [
        (HEAP, 0, 1),  # LSN
        (HEAP, 8, 1),  # checksum
        (HEAP, 10, 4),  # all visible: the visibility map relies on it
        (HEAP, 24, 8),  # where the tuple is
        (HEAP, 25, 0x80),  # a heap's line pointers are not hints
        (HEAP, TUPLE, 1),  # xmin
        (HEAP, TUPLE + 20, 2),  # an infomask bit that is none
        (HEAP, SIZE - 1, 1),  # data
        (INDEX, SIZE - 17, 1),
        (bytes(SIZE), 100, 1),
        (bytes(SIZE), 0, 1),
    ],
)
def test_nothing_else_is(content: bytes, at: int, mask: int) -> None:
    assert masked(flipped(content, at, mask)) != masked(content)
