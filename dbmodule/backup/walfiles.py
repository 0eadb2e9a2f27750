"""Storing the WAL that makes a backup self-contained: read, decoded, and only then trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dbmodule import wal
from dbmodule.delta import FRAME_BYTES, Extents, Refs, to_extents, zero_refs
from dbmodule.errors import ServerError, SourceError
from dbmodule.ident import PAGE_SIZE, Lsn, SystemId, Timeline
from dbmodule.ports import DataDirectory
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity
from dbmodule.repository.tables import FileEntry, TableWriter
from dbmodule.repository.writer import FrameWriter

WAL_MODE = 0o600


@dataclass(frozen=True, slots=True)
class WalRange:
    major: int
    system_identifier: SystemId
    timeline: Timeline
    segment_size: int
    start_lsn: Lsn
    stop_lsn: Lsn


_WAL_PAGE = 8192
_SHORT_HEADER = 24
_LONG_HEADER = 40
_ALIGNMENT = 8


def end_of_record(segment: bytes, lsn: Lsn, segment_size: int) -> Lsn:
    """Where the record that starts at `lsn` ends; records go on behind the next page's header.

    The first four bytes of a record are its length (``xlogrecord.h``), and never lie on two pages.
    """
    left = int.from_bytes(segment[lsn % segment_size :][:4], "little")
    end = int(lsn)
    while left > (room := _WAL_PAGE - end % _WAL_PAGE):
        left -= room
        end += room
        end += _LONG_HEADER if end % segment_size == 0 else _SHORT_HEADER
    return Lsn((end + left + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT)


def store_bytes(frames: FrameWriter, data: memoryview) -> Extents:
    """Store a file's bytes as runs of up to 32 chunks; chunks count as blocks."""
    parts: list[Refs] = [zero_refs(0)]
    for start in range(0, len(data), FRAME_BYTES):
        unit = data[start : start + FRAME_BYTES]
        if np.frombuffer(unit, np.uint8).any():
            parts.append(frames.store_run(unit))
        else:
            parts.append(zero_refs(-(-len(unit) // PAGE_SIZE)))
    refs = np.concatenate(parts)
    return to_extents(np.arange(len(refs), dtype=np.uint32), refs)


def add_file(tables: TableWriter, frames: FrameWriter, path: str, data: bytes) -> None:
    """Store a file of ``pg_wal`` whole."""
    extents = store_bytes(frames, memoryview(data))
    tables.add_file(
        FileEntry(
            path,
            EntryKind.CONTENT,
            EntryFlag.WAL,
            WAL_MODE,
            len(data),
            FileIdentity(len(data), 0, 0, 0, 0),
            first_extent=tables.add("extents", extents),
            extents=len(extents),
        )
    )


def store_wal(
    directory: DataDirectory,
    needed: WalRange,
    tables: TableWriter,
    frames: FrameWriter,
    names: Sequence[str],
) -> tuple[int, wal.WalSummary]:
    """Store and check the segments `names`; gives their bytes and what their records say.

    Raises `SourceError` when a segment is missing or not sound: a backup whose WAL is not stored
    is not a backup; `ServerError` when replaying it would copy a database that is not there.
    """
    total = 0

    def segments() -> Iterator[tuple[str, bytes]]:
        nonlocal total
        for name in names:
            data = directory.read(f"pg_wal/{name}")
            if data is None or len(data) != needed.segment_size:
                raise SourceError(
                    f"WAL segment {name} is missing from pg_wal, or incomplete",
                    hint="The server removed WAL that it was to keep: raise"
                    " max_slot_wal_keep_size.",
                )
            add_file(tables, frames, f"pg_wal/{name}", data)
            total += len(data)
            yield name, data

    summary = wal.check_segments(
        segments(),
        major=needed.major,
        system_identifier=needed.system_identifier,
        timeline=needed.timeline,
        segment_size=needed.segment_size,
        start_lsn=needed.start_lsn,
        stop_lsn=needed.stop_lsn,
    )
    if summary.lost_copies:
        tablespace, database = summary.lost_copies[0].source
        raise ServerError(
            f"during the backup the database with OID {database} was moved out of tablespace"
            f" {tablespace}, or copied from there and dropped: recovery would repeat that from"
            " files of which the backup may hold a part only",
            hint="Run the backup again.",
        )
    return total, summary
