"""What each path of a PostgreSQL data directory is, and so how a backup treats it.

Paths are relative to the data directory, in POSIX form, tablespaces through their link:
``pg_tblspc/16400/PG_18_202506291/5/16401.1``. Only names decide here, never what lies behind
them, so a name that is not known for certain is `Kind.CONTENT`: copied, and compared by content,
which is right for any file. Nothing is left out of a backup unless its name is on a list below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Literal

from dbmodule.ident import BlockNo

Fork = Literal["main", "fsm", "vm", "init"]

DEFAULT_TABLESPACE = 1663
"""OID of ``pg_default``, which is ``base/``."""
GLOBAL_TABLESPACE = 1664
"""OID of ``pg_global``, which is ``global/``; its relations belong to database 0."""

CONTROL_FILE = "global/pg_control"

RECREATED_DIRECTORIES = (
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_wal/summaries",
)
"""Directories that a restore makes, parents first, and that hold nothing from the backup but WAL.

``pg_wal/summaries`` is read by version 17 and later; earlier ones pass over it.
"""

_EXCLUDED_FILES = frozenset(
    {
        "backup_label",
        "backup_label.old",
        "backup_manifest",
        "current_logfiles",
        "postgresql.auto.conf.tmp",
        "postmaster.opts",
        "postmaster.pid",
        "recovery.signal",
        "standby.signal",
        "tablespace_map",
        "tablespace_map.old",
    }
)
_EXCLUDED_ROOTS = frozenset(name for name in RECREATED_DIRECTORIES if "/" not in name)
_TEMPORARY_PREFIX = "pgsql_tmp"
_CACHE_PREFIX = "pg_internal.init"

# An OID, or the number of a file: no leading zero, so that no two names mean the same file.
_OID = "[1-9][0-9]{0,9}"
_OID_LIMIT = 2**32
_SUFFIX = rf"(?:_(?P<fork>fsm|vm|init))?(?:\.(?P<segment>{_OID}))?"
_DATABASE = rf"(?:base|pg_tblspc/(?P<tablespace>{_OID})/PG_[0-9]+_[0-9]+)/(?P<database>{_OID})"
_RELATION = re.compile(rf"(?:global|{_DATABASE})/(?P<relfilenode>{_OID}){_SUFFIX}")
_RELATION_NAME = re.compile(rf"(?P<relfilenode>{_OID}){_SUFFIX}")
_TEMPORARY_RELATION = re.compile(rf"{_DATABASE}/t[0-9]+_{_OID}{_SUFFIX}")
_RELATION_MAP = re.compile(rf"(?:global|{_DATABASE})/pg_filenode\.map")
# Eight digits, sixteen since version 17.
_TWO_PHASE = re.compile(r"pg_twophase/(?:[0-9A-F]{8}){1,2}")


class Kind(StrEnum):
    """How a backup reads a file, and decides whether it changed."""

    RELATION = "relation"
    """Main fork of a relation: compared page by page."""
    CONTENT = "content"
    """Compared by content: other forks, SLRUs, configuration, anything unknown."""
    ATOMIC = "atomic"
    """As CONTENT, but read in one call and its own CRC verified: relation maps, two-phase files."""
    CONTROL = "control"
    """``pg_control``: as ATOMIC, and read after everything else."""
    EXCLUDED = "excluded"
    """Not copied."""


@dataclass(frozen=True, slots=True)
class RelationFile:
    """One file of one fork of a relation; a fork over 1 GB has several, by segment number."""

    tablespace: int
    database: int
    relfilenode: int
    fork: Fork
    segment: int

    def first_block(self, blocks_per_segment: int) -> BlockNo:
        """Block number, within the fork, of the file's first page; its checksums depend on it."""
        return BlockNo(self.segment * blocks_per_segment)


def classify(path: str) -> Kind:
    """What `path` is. Names only: see `unlogged_relations` for what a name alone cannot tell."""
    if path == CONTROL_FILE:
        return Kind.CONTROL
    if _is_excluded(path):
        return Kind.EXCLUDED
    if _RELATION_MAP.fullmatch(path) or _TWO_PHASE.fullmatch(path):
        return Kind.ATOMIC
    file = relation(path)
    return Kind.RELATION if file is not None and file.fork == "main" else Kind.CONTENT


def _is_excluded(path: str) -> bool:
    directory, _, name = path.rpartition("/")
    return (
        path in _EXCLUDED_FILES
        or name.startswith((_CACHE_PREFIX, _TEMPORARY_PREFIX))
        or contents_excluded(directory)
        or _TEMPORARY_RELATION.fullmatch(path) is not None
    )


def contents_excluded(directory: str) -> bool:
    """Whether nothing in this directory, at any depth, is copied.

    The directory itself is another matter: those of `RECREATED_DIRECTORIES` are made by a restore,
    those of temporary files by the server as it needs them.
    """
    parts = directory.split("/")
    return parts[0] in _EXCLUDED_ROOTS or any(part.startswith(_TEMPORARY_PREFIX) for part in parts)


@lru_cache(maxsize=64)  # of one path it is asked several times, a moment after each other
def relation(path: str) -> RelationFile | None:
    """The relation file that `path` names, or None; temporary relations are none."""
    match = _RELATION.fullmatch(path)
    if match is None:
        return None
    in_global = path.startswith("global/")
    default = GLOBAL_TABLESPACE if in_global else DEFAULT_TABLESPACE
    file = RelationFile(
        tablespace=int(match["tablespace"] or default),
        database=int(match["database"] or 0),
        relfilenode=int(match["relfilenode"]),
        fork=_fork(match["fork"]),
        segment=int(match["segment"] or 0),
    )
    numbers = (file.tablespace, file.database, file.relfilenode, file.segment)
    return file if max(numbers) < _OID_LIMIT else None


def _fork(suffix: str | None) -> Fork:
    match suffix:
        case "fsm" | "vm" | "init":
            return suffix
        case _:
            return "main"


def is_late_unlogged(path: str, relations: frozenset[str]) -> bool:
    """Is this a file, other than the init fork's, of a relation named as ``base/5/16384``?"""
    file = relation(path)
    return (
        file is not None
        and file.fork != "init"
        and f"{path.rpartition('/')[0]}/{file.relfilenode}" in relations
    )


def relation_path(tablespace: int, database: int, relfilenode: int, version_directory: str) -> str:
    """Database directory and relfilenode; `version_directory` is that of `tablespace`."""
    if tablespace == GLOBAL_TABLESPACE:
        return f"global/{relfilenode}"
    if tablespace == DEFAULT_TABLESPACE:
        return f"base/{database}/{relfilenode}"
    return f"pg_tblspc/{tablespace}/{version_directory}/{database}/{relfilenode}"


def unlogged_relations(names: Iterable[str]) -> frozenset[int]:
    """The unlogged relations among the file names of *one* database directory, as relfilenodes.

    Those with an ``_init`` fork. Of such a relation only that fork is copied: recovery recreates
    the others from it, and whatever they hold at the time of the backup is lost anyway.
    """
    matches = (_RELATION_NAME.fullmatch(name) for name in names)
    return frozenset(
        int(match["relfilenode"]) for match in matches if match and match["fork"] == "init"
    )


def tablespace_version_directory(major: int, catalog_version: int) -> str:
    """The one directory of a tablespace that belongs to a server of this version.

    Others may lie beside it (clusters of several versions can share a location): they are not ours.
    """
    return f"PG_{major}_{catalog_version}"
