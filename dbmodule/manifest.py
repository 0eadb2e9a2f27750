"""The manifest: the small document whose writing commits a backup.

It holds everything that a person may want to read about a backup, the hash of its baseline's
manifest (so a chain is tamper-evident), and the reference to the root of its binary tables.
This module turns it into a JSON body and back; sealing and storing are the repository's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dbmodule.errors import CorruptObjectError, UsageError
from dbmodule.ident import (
    BackupId,
    BackupType,
    Lsn,
    SystemId,
    Timeline,
    format_lsn,
    parse_backup_id,
    parse_lsn,
)

COMPLETED = "completed"
COMPLETED_WITH_CORRUPTION = "completed_with_corruption"


@dataclass(frozen=True, slots=True)
class Root:
    """Where the root frame is: frame 0 of this pack."""

    pack: str
    size: int
    footer: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A lineage mark and where its row lies on disk (so that a stopped cluster can be asked)."""

    mark: str
    xmin: int
    path: str
    block: int
    item: int


@dataclass(frozen=True, slots=True)
class Corruption:
    """A page of the source that failed its checksum, however often it was read."""

    path: str
    block: int
    """Within the fork."""
    lsn: Lsn
    expected: int
    """Checksum that the page's bytes give."""
    actual: int
    """Checksum that the page carries."""
    database_name: str | None
    relation_name: str | None
    table_name: str | None
    """Of an index or a TOAST relation the table that it belongs to, else as `relation_name`."""
    last_good: BackupId | None
    """The newest backup, when this one was taken, that held a copy which matches its checksum."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One committed backup."""

    backup_id: BackupId
    type: BackupType
    cluster: str
    baseline_id: BackupId | None
    baseline_hash: str | None
    status: str
    label: str
    job_id: int | None
    offline: bool

    system_identifier: SystemId
    server_version: str
    version_num: int
    catalog_version: int
    block_size: int
    blocks_per_segment: int
    wal_segment_size: int
    data_checksums: bool
    wal_log_hints: bool

    timeline: Timeline
    start_lsn: Lsn
    stop_lsn: Lsn
    history: str
    """The timeline history file of `timeline`; empty for timeline 1."""
    marks: tuple[Mark, ...]
    """The lineage marks left before the start and after the stop; empty = never provable."""
    boot_id: str
    """The host's boot in which file identities were taken; empty = identities prove nothing."""
    host: str
    """Name of the host on which the files were read."""
    backup_label: str
    tablespace_map: str
    """As the server returned it: for people; a restore writes its own links."""
    tablespaces: dict[str, str]
    """OID → location on the source, of tablespaces outside the data directory."""
    created_tablespaces: dict[str, str]
    """OID → location in CREATE TABLESPACE records of the WAL that a restore replays; empty for an
    in-place tablespace."""
    late_unlogged: tuple[str, ...]
    """Database directory and relfilenode, ``base/5/16384``, of relations whose init fork appeared
    during the backup. Nothing else of them is restored: the end of recovery makes it anew, and
    fails where it finds a file."""
    owner: str
    """Operating system user who owned the data directory."""

    detector: str
    detector_reason: str
    started_at: datetime
    finished_at: datetime
    files_total: int
    files_read: int
    files_skipped: int
    pages_total: int
    pages_changed: int
    pages_stored: int
    pages_verified: int
    divergent_pages: int
    hint_pages: int
    bytes_total: int
    bytes_read: int
    bytes_changed: int
    bytes_stored: int
    wal_bytes: int
    corruption: tuple[Corruption, ...]
    """The first corrupt pages found, at most `MAX_LISTED`."""
    corrupt_pages: int
    phases: dict[str, float]
    root: Root
    format: int = field(default=1)

    MAX_LISTED = 1000


_LSNS = ("start_lsn", "stop_lsn")
_TIMES = ("started_at", "finished_at")


def to_body(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a JSON object."""
    body = dataclasses.asdict(manifest)
    for name in _LSNS:
        body[name] = format_lsn(body[name])
    for name in _TIMES:
        body[name] = body[name].isoformat()
    body["system_identifier"] = str(manifest.system_identifier)  # 64 bits: too wide for a double
    body["corruption"] = [{**c, "lsn": format_lsn(c["lsn"])} for c in body["corruption"]]
    return body


def from_body(name: str, body: dict[str, Any]) -> Manifest:
    """The manifest in a JSON object that came from document `name`.

    Raises `CorruptObjectError` when a field is missing, unknown or malformed.
    """
    try:
        values = dict(body)
        for field_name in _LSNS:
            values[field_name] = parse_lsn(values[field_name])
        for field_name in _TIMES:
            values[field_name] = datetime.fromisoformat(values[field_name])
            if values[field_name].tzinfo is None:
                raise ValueError(f"{field_name} has no time zone")
        values["backup_id"] = parse_backup_id(values["backup_id"])
        if values["baseline_id"] is not None:
            values["baseline_id"] = parse_backup_id(values["baseline_id"])
        values["type"] = BackupType(values["type"])
        values["system_identifier"] = SystemId(int(values["system_identifier"]))
        values["marks"] = tuple(Mark(**mark) for mark in values["marks"])
        values["corruption"] = tuple(_corruption(c) for c in values["corruption"])
        values["late_unlogged"] = tuple(values["late_unlogged"])
        values["root"] = Root(**values["root"])
        manifest = Manifest(**values)
        _check_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise CorruptObjectError(f"{name}: not a valid manifest: {error}") from error
    return manifest


def _corruption(body: dict[str, Any]) -> Corruption:
    last_good = body["last_good"]
    if last_good is not None:
        last_good = parse_backup_id(last_good)
    return Corruption(**{**body, "lsn": parse_lsn(body["lsn"]), "last_good": last_good})


_HINTS = {declared: get_type_hints(declared) for declared in (Manifest, Root, Mark, Corruption)}


def _check_types(value: Any) -> None:
    """Raise `TypeError` unless every field of a dataclass holds what it declares."""
    for name, hint in _HINTS[type(value)].items():
        if not _fits(getattr(value, name), hint):
            raise TypeError(f"{name} is not of type {hint}")


def _fits(value: Any, hint: Any) -> bool:
    """Is `value` of a type that a field of the manifest may declare?"""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arm) for arm in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    plain = getattr(hint, "__supertype__", hint)  # of a NewType
    if isinstance(value, bool):
        return plain is bool
    if dataclasses.is_dataclass(value):
        _check_types(value)
    return isinstance(value, (int, float) if plain is float else plain)
