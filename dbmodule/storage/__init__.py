"""Object stores: the adapters behind `ports.ObjectStore`, and how a URL names one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dbmodule.errors import UsageError
from dbmodule.ports import ObjectStore
from dbmodule.storage.dry import DryStore
from dbmodule.storage.local import LocalStore
from dbmodule.storage.memory import MemoryStore
from dbmodule.storage.names import is_segment
from dbmodule.storage.remote import RemoteStore, open_remote

__all__ = ["DryStore", "LocalStore", "MemoryStore", "RemoteStore", "local_path", "open_store"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")


def open_store(
    url: str, options: Mapping[str, str] | None = None, *, allow_memory: bool = False
) -> ObjectStore:
    """The store that `url` names; nothing is read or written yet.

    A path or ``file:///path`` is a directory, which need not exist; ``s3://bucket/prefix``, ``gs://``
    and ``az://`` are object stores, set by `options`; ``memory://`` is a new, empty store, for
    library and tests. Raises `UsageError` for anything else.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        if not url:
            raise UsageError("no repository is configured", hint="Set url in [repository].")
        return LocalStore(Path(url))
    match scheme[0].lower():
        case "file":
            return LocalStore(_path_of(url))
        case "memory" if allow_memory:
            return MemoryStore()
        case "s3" | "gs" | "az" as remote:
            return open_remote(remote, *_bucket_of(url), options or {})
        case other:
            raise UsageError(
                f"repository scheme {other}:// is not supported",
                hint="Use a path, file:///path, s3://bucket/prefix, gs://… or az://….",
            )


def local_path(url: str) -> Path | None:
    """Where a repository's directory is, links resolved; None for one that is elsewhere."""
    scheme = _SCHEME.match(url)
    if scheme is None:
        return Path(url).resolve()
    return _path_of(url).resolve() if scheme[0].lower() == "file" else None


def _bucket_of(url: str) -> tuple[str, str]:
    """Bucket and prefix; raises `UsageError`."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,}", parts.netloc) or (
        prefix and not all(map(is_segment, prefix.split("/")))
    ):
        raise UsageError(
            f"not the URL of an object store: {parts.scheme}://…",
            hint="Write s3://bucket/prefix, of letters, digits, dots, dashes and underscores.",
        )
    if parts.query or parts.fragment:
        raise UsageError(
            f"the URL of an object store takes no parameters: {parts.scheme}://{parts.netloc}",
            hint="Set endpoint, region and so on in options of [repository].",
        )
    return parts.netloc, prefix


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or parts.query or parts.fragment:
        raise UsageError(
            f"not the URL of a local directory: {url!r}",
            hint="Write three slashes and an absolute path: file:///var/backups/pg.",
        )
    return Path(path)
