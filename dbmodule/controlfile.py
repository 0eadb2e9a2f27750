"""The contents of ``global/pg_control``, of little-endian 64-bit PostgreSQL 13 to 18.

A `ControlFile` exists only for bytes whose CRC is right. A server rewrites the file in place, so
a CRC that is wrong once may only mean that it was read meanwhile: readers try again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import crc32c

from dbmodule.errors import SourceError
from dbmodule.ident import Lsn, SystemId, Timeline, format_lsn

_CRC_OFFSETS = {1300: 288, 1700: 288, 1800: 292}
"""Where the CRC lies, by format version: 13 to 16 write 1300. All before it is what it covers.

The fields read here have the same place in all of them: 1700 fills what was padding, 1800 adds a
field behind.
"""

# struct ControlFileData up to data_checksum_version, the padding written out.
_FIELDS = struct.Struct(
    "<"
    "Q I I"  # system_identifier, pg_control_version, catalog_version_no
    "I 4x 8x Q"  # state, (time), checkPoint
    "Q I I ? 7x 64x"  # redo, ThisTimeLineID, PrevTimeLineID, fullPageWrites of checkPointCopy
    "8x Q I 4x"  # (unloggedLSN), minRecoveryPoint, minRecoveryPointTLI
    "Q Q ? 3x"  # backupStartPoint, backupEndPoint, backupEndRequired
    "I ? 3x 5i 4x 4x 8x"  # wal_level, wal_log_hints, MaxConnections to max_locks_per_xact
    "I I I I"  # blcksz, relseg_size, xlog_blcksz, xlog_seg_size
    "16x 4x I"  # data_checksum_version
)
_VERSION = struct.Struct("<8xI")
_CRC = struct.Struct("<I")


class DBState(IntEnum):
    """What the server was doing when it last wrote the file."""

    STARTUP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


class WalLevel(IntEnum):
    MINIMAL = 0
    REPLICA = 1
    LOGICAL = 2


@dataclass(frozen=True, slots=True)
class ControlFile:
    """What a backup needs of ``pg_control``; an LSN or timeline that is not set is 0."""

    system_identifier: SystemId
    pg_control_version: int
    catalog_version: int
    state: DBState
    checkpoint: Lsn
    """Where the record of the latest checkpoint starts."""
    redo: Lsn
    """Where recovery from that checkpoint starts."""
    timeline: Timeline
    prev_timeline: Timeline
    full_page_writes: bool
    """As of the latest checkpoint."""
    min_recovery_point: Lsn
    min_recovery_timeline: Timeline
    backup_start: Lsn
    backup_end: Lsn
    backup_end_required: bool
    wal_level: WalLevel
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    block_size: int
    blocks_per_segment: int
    wal_block_size: int
    wal_segment_size: int
    data_checksum_version: int
    """0: data pages have no checksums; 1: they have."""


def parse(data: bytes) -> ControlFile:
    """The control file in `data`, the whole file or at least its first 512 bytes.

    Raises `SourceError` when the CRC is wrong, the file is cut short or its version is unknown.
    """
    if len(data) < max(_CRC_OFFSETS.values()) + _CRC.size:
        raise SourceError(
            f"pg_control is cut short: {len(data)} bytes",
            hint="The data directory is damaged, or it is not one.",
        )
    (version,) = _VERSION.unpack_from(data)
    crc_offset = _CRC_OFFSETS.get(version)
    if crc_offset is None:
        raise SourceError(
            f"pg_control has the unknown format version {version}",
            hint="PostgreSQL 13 to 18 on little-endian 64-bit machines can be read.",
        )
    (stored,) = _CRC.unpack_from(data, crc_offset)
    computed = crc32c.crc32c(data[:crc_offset])
    if stored != computed:
        raise SourceError(
            f"pg_control does not match its CRC: {stored:08x} stored, {computed:08x} computed",
            hint="If this lasts, the file is damaged: `pg_controldata` tells the same.",
        )
    return _from_fields(data)


def _from_fields(data: bytes) -> ControlFile:
    (
        system_identifier,
        pg_control_version,
        catalog_version,
        state,
        checkpoint,
        redo,
        timeline,
        prev_timeline,
        full_page_writes,
        min_recovery_point,
        min_recovery_timeline,
        backup_start,
        backup_end,
        backup_end_required,
        wal_level,
        wal_log_hints,
        max_connections,
        max_worker_processes,
        max_wal_senders,
        max_prepared_transactions,
        max_locks_per_transaction,
        block_size,
        blocks_per_segment,
        wal_block_size,
        wal_segment_size,
        data_checksum_version,
    ) = _FIELDS.unpack_from(data)
    try:
        known_state, known_level = DBState(state), WalLevel(wal_level)
    except ValueError as error:
        raise SourceError(
            f"pg_control at checkpoint {format_lsn(checkpoint)} holds an unknown value: {error}",
            hint="It was written by a server version that is not supported.",
        ) from error
    return ControlFile(
        system_identifier=SystemId(system_identifier),
        pg_control_version=pg_control_version,
        catalog_version=catalog_version,
        state=known_state,
        checkpoint=Lsn(checkpoint),
        redo=Lsn(redo),
        timeline=Timeline(timeline),
        prev_timeline=Timeline(prev_timeline),
        full_page_writes=full_page_writes,
        min_recovery_point=Lsn(min_recovery_point),
        min_recovery_timeline=Timeline(min_recovery_timeline),
        backup_start=Lsn(backup_start),
        backup_end=Lsn(backup_end),
        backup_end_required=backup_end_required,
        wal_level=known_level,
        wal_log_hints=wal_log_hints,
        max_connections=max_connections,
        max_worker_processes=max_worker_processes,
        max_wal_senders=max_wal_senders,
        max_prepared_transactions=max_prepared_transactions,
        max_locks_per_transaction=max_locks_per_transaction,
        block_size=block_size,
        blocks_per_segment=blocks_per_segment,
        wal_block_size=wal_block_size,
        wal_segment_size=wal_segment_size,
        data_checksum_version=data_checksum_version,
    )
