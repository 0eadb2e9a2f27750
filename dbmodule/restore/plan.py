"""What a restore may write, decided before it writes anything. Pure but for one look at paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dbmodule.errors import CorruptObjectError, TargetError, UsageError
from dbmodule.ident import PAGE_SIZE
from dbmodule.manifest import Manifest
from dbmodule.registry import EntryKind
from dbmodule.repository.tables import FileEntry

_TABLESPACE_LINK = re.compile(r"pg_tblspc/[1-9][0-9]{0,9}")
MAX_FILE_BYTES = 2**32 * PAGE_SIZE
"""What 32-bit block numbers can address."""
RESERVED = frozenset({"backup_label", "tablespace_map", "recovery.signal", "standby.signal"})


def check_paths(entries: Iterable[FileEntry], tablespaces: Collection[str]) -> None:
    """Refuse a file table whose paths leave the target; raises `CorruptObjectError`.

    A repository may have been written by an enemy. Links are only ever made for tablespaces, to
    where the caller wants them, and no file may lie below a name that is itself a file.
    """
    seen: set[str] = set()
    files: set[str] = set()
    parents: set[str] = set()
    for entry in entries:
        path = entry.path
        parts = path.split("/")
        if (
            not path
            or "\0" in path
            or any(part in ("", ".", "..") for part in parts)
            or path in RESERVED
        ):
            raise CorruptObjectError(f"the backup holds the path {path!r}, which leaves the target")
        if entry.kind is EntryKind.SYMLINK and (
            _TABLESPACE_LINK.fullmatch(path) is None or parts[1] not in tablespaces
        ):
            raise CorruptObjectError(f"the backup holds a link at {path!r}, which is no tablespace")
        if path in seen:
            raise CorruptObjectError(f"the backup holds {path!r} twice")
        if entry.size > MAX_FILE_BYTES:
            raise CorruptObjectError(f"the backup holds {path!r} with {entry.size} bytes")
        seen.add(path)
        if entry.kind in (EntryKind.RELATION, EntryKind.CONTENT):
            files.add(path)
        parent = path.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    for path in sorted(files & parents):
        raise CorruptObjectError(f"the backup holds {path!r} as a file and a directory")


def map_tablespaces(
    manifest: Manifest, mapping: Mapping[str, Path], target: Path
) -> dict[str, Path]:
    """OID → where each tablespace goes; every one must be told.

    A copy that used its source's locations would write into the source's live files, so there is
    no default. Raises `TargetError`, or `UsageError` for a mapping that makes no sense.
    """
    locations: dict[str, Path] = {}
    for oid, source in manifest.tablespaces.items():
        if source not in mapping:
            raise TargetError(
                f"backup {manifest.backup_id} has a tablespace at {source}, and nothing says where"
                " it goes",
                hint=f"Add --tablespace-map {source}=NEW for an empty directory NEW.",
            )
        location = mapping[source]
        if not location.is_absolute():
            raise UsageError(f"the tablespace location {location} is not an absolute path")
        if location.is_relative_to(target) or target.is_relative_to(location):
            raise UsageError(
                f"the tablespace location {location} and the target {target} lie in each other"
            )
        for other in locations.values():
            if location.is_relative_to(other) or other.is_relative_to(location):
                raise UsageError(f"the tablespace locations {location} and {other} overlap")
        locations[oid] = location
    unknown = set(mapping) - set(manifest.tablespaces.values())
    if unknown:
        raise UsageError(
            f"the backup has no tablespace at {sorted(unknown)[0]}",
            hint="`dbmodule show` lists the backup's tablespaces.",
        )
    return locations


def check_replay(manifest: Manifest, exists: Mapping[str, bool]) -> None:
    """Refuse to prepare a copy whose recovery would write into a directory that is there already.

    A CREATE TABLESPACE in the WAL is replayed at its absolute path, whatever the links say.
    """
    for location in manifest.created_tablespaces.values():
        if location and exists[location]:
            raise TargetError(
                f"while backup {manifest.backup_id} was taken, a tablespace was created at"
                f" {location}; recovery would write into that directory, which exists here",
                hint="Restore on a host or in a container without it, or restore another backup.",
            )
