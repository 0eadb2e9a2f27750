"""The baseline registry: what a backup remembers about each file, so that a later one can prove
that a page did not change.

Three kinds of fingerprints exist. A *page mark* is (LSN, checksum) of a relation page, as in the
bytes that were stored, with the "all visible" flag mixed in (`detect.marks_of`). A *chunk hash* is
the keyed BLAKE3 of 8 kB of a file that has no reliable LSN. A *file identity* is what ``fstat``
says. Only equality ever proves anything. A backup stores fingerprints of the blocks that it
stored; folding a chain's gives the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARK = np.dtype([("lsn", "<u8"), ("checksum", "<u2")])
HASH = np.dtype("V16")
HASH_BYTES = 16

UNKNOWN_LSN = 0xFFFFFFFFFFFFFFFF
"""As a mark's LSN: the page failed its checksum when stored, and is never unchanged."""

Marks = NDArray[Any]
"""Shape (blocks,), dtype `MARK`; (0, 0) stands for a page of zero bytes."""
Hashes = NDArray[Any]
"""Shape (chunks,), dtype `HASH`."""


class EntryKind(IntEnum):
    """What a row of the file table is."""

    RELATION = 0
    """Pages with marks."""
    CONTENT = 1
    """8 kB chunks with hashes."""
    DIRECTORY = 2
    SYMLINK = 3


class EntryFlag(IntFlag):
    NONE = 0
    IDENTITY = 1
    """The identity fields may be used to skip the file."""
    OVERLAY = 2
    """Extents and fingerprints overlay those of the same path in the baseline."""
    WAL = 4
    """A WAL segment or history file that makes this backup self-contained."""
    UNCHANGED = 8
    """With OVERLAY: neither length nor bytes differ from the baseline's."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must all be equal, within one boot of the host, for a file to be the same bytes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class RelationRow:
    """What a backup stored of one fork of a relation, and what that was called at the time."""

    tablespace: int
    database: int
    """0 for a shared relation."""
    relfilenode: int
    fork: str
    pages_changed: int
    database_name: str | None = None
    relation_name: str | None = None
    """With its schema; None where the catalog could not be read."""
    table_name: str | None = None
    """Of an index or a TOAST relation the table that it belongs to, else as `relation_name`."""


def settled(mtime_ns: int, backup_called_ns: int) -> bool:
    """May a file's identity be recorded? Only if it was quiet for 2 s before the backup began:
    a stalled write or a coarse clock could otherwise hide a change behind an equal mtime."""
    return mtime_ns <= backup_called_ns - 2_000_000_000


def fold(base: NDArray[Any], blocks: int, numbers: NDArray[np.int64], new: NDArray[Any]) -> Any:
    """`base` cut or grown to `blocks` entries, with `new` at `numbers`; dtype as `base`."""
    out = np.zeros(blocks, base.dtype)
    kept = min(blocks, len(base))
    out[:kept] = base[:kept]
    out[numbers] = new
    return out
