"""Names and numbers that identify things: LSNs, timelines, backups, blocks.

They are ``NewType`` wrappers, so that the type checker keeps an LSN from being passed as a block
number while arrays of them stay plain numpy integers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NewType

from dbmodule.errors import UsageError

Lsn = NewType("Lsn", int)
"""A byte position in the write-ahead log, 64 bits."""
Timeline = NewType("Timeline", int)
"""Timeline id, 32 bits, 1 for a cluster that was never promoted."""
SystemId = NewType("SystemId", int)
"""Database system identifier of ``pg_control``, 64 bits; shared by all copies of one cluster."""
BackupId = NewType("BackupId", str)
"""Sorts in the order of a cluster's backups: ``20260131-235959-full-1a2b3c``."""
BlockNo = NewType("BlockNo", int)
"""Block number within a fork (segment number x segment size + offset), 32 bits."""

PAGE_SIZE = 8192
"""Bytes per page; other block sizes are refused."""

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_STAMP = "%Y%m%d-%H%M%S"
_STAMP_LENGTH = len("20260131-235959")
_BACKUP_ID = re.compile(r"\d{8}-\d{6}-(full|diff|incr)-[0-9a-f]{6}")


class BackupType(StrEnum):
    FULL = "full"
    DIFF = "diff"
    INCR = "incr"


def parse_lsn(text: str) -> Lsn:
    """``'0/3000028'`` → ``0x3000028``; raises `UsageError` for anything else."""
    match = _LSN.fullmatch(text)
    if match is None:
        raise UsageError(f"not an LSN: {text!r}", hint="Write it as PostgreSQL does: 0/3000028.")
    return Lsn(int(match[1], 16) << 32 | int(match[2], 16))


def format_lsn(lsn: int) -> str:
    """``0x3000028`` → ``'0/3000028'``, as PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def new_backup_id(
    kind: BackupType, started: datetime, earlier: Iterable[BackupId] = ()
) -> BackupId:
    """A fresh id; `started` must be in UTC.

    It sorts after all `earlier` ones: where the clock says the same second or was set back, the
    id's time is one second after the newest of them. The random tail keeps two runs apart.
    """
    at = started.replace(microsecond=0, tzinfo=None)
    newest = max((t for b in earlier if (t := _time_in(b)) is not None), default=None)
    if newest is not None and at <= newest:
        at = newest + timedelta(seconds=1)
    return BackupId(f"{at.strftime(_STAMP)}-{kind}-{secrets.token_hex(3)}")


def _time_in(backup: BackupId) -> datetime | None:
    """None for names that are no backup's."""
    try:
        return datetime.strptime(backup[:_STAMP_LENGTH], _STAMP)
    except ValueError:
        return None


def parse_backup_id(text: str) -> BackupId:
    """Check the shape of a backup id; raises `UsageError`."""
    if _BACKUP_ID.fullmatch(text) is None:
        raise UsageError(
            f"not a backup id: {text[:80]!r}", hint="`dbmodule list` shows the ids that exist."
        )
    return BackupId(text)
