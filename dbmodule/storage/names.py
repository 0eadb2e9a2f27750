"""Object names and byte ranges, checked in one place for every store.

A name is one or more segments of ``[A-Za-z0-9._-]`` joined by ``/``; no segment is ``.`` or ``..``,
so a name read from a damaged document cannot leave the repository. The first segment ``tmp`` is
kept for writes in progress and is never an object.
"""

from __future__ import annotations

import re

from dbmodule.errors import RepositoryError

TEMPORARY = "tmp"

_SEGMENT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,255}")


def is_segment(text: str) -> bool:
    """May `text` stand between two slashes of an object's name?"""
    return _SEGMENT.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Give `name` back, or raise `RepositoryError` when it is not an object's name."""
    segments = name.split("/")
    if segments[0] == TEMPORARY or not all(map(is_segment, segments)):
        raise RepositoryError(
            f"not an object name: {name[:200]!r}",
            hint="A document of the repository is damaged: run `dbmodule verify --all`.",
        )
    return name


def check_prefix(prefix: str) -> str:
    """Give `prefix` back if some object's name could start with it; `RepositoryError` if none."""
    check_name(prefix + "-")
    return prefix


def clip(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """The range ``[offset, offset + length)`` cut at `size`, as (start, stop)."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"negative range: offset {offset}, length {length}")
    start = min(offset, size)
    return start, size if length is None else min(start + length, size)
