"""An object store in a directory: an object is a file, its name the path below the root.

All writes go through `dbmodule.storage.durable`. Files have mode 0600 and directories 0700. Writes
in progress live in ``<root>/tmp``, which no name reaches; those of dead writers are removed by the
first write of the next `LocalStore`. Safe to use from many threads and many processes at once.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from dbmodule.errors import ObjectExistsError, ObjectMissingError, RepositoryError
from dbmodule.ports import Buffer
from dbmodule.storage import durable
from dbmodule.storage.names import TEMPORARY, check_name, check_prefix, clip, is_segment
from dbmodule.storage.source import Source

_NO_HARD_LINKS = (
    "The files are immutable, or the file system knows no hard links, which the repository needs "
    "to commit atomically: put it on ext4, XFS, btrfs, ZFS or NFS."
)
_HINTS = {
    errno.ENOSPC: "Free some space on that file system, or enlarge it, and run again.",
    errno.EDQUOT: "The disk quota is used up: raise it or free some space, and run again.",
    errno.EROFS: "The file system is mounted read-only: remount it for writing.",
    errno.EACCES: "Give the user that runs dbmodule the right to read and write there.",
    errno.ENOENT: "Check that the path is right and its file system is mounted.",
    errno.ENOTDIR: "Part of the path is a file: choose another repository path.",
    errno.EIO: "The disk reports an error: check its health before you rely on this repository.",
    errno.ESTALE: "The network file system lost the directory: mount it again.",
    errno.EPERM: _NO_HARD_LINKS,
    errno.EOPNOTSUPP: _NO_HARD_LINKS,
    errno.ENOSYS: _NO_HARD_LINKS,
    errno.EXDEV: "The whole repository must be on one file system.",
}
_IS_MISSING = (FileNotFoundError, NotADirectoryError)


class LocalStore:
    """`ports.ObjectStore` in the directory `root`, which the first write creates."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.url = self._root.as_uri()
        self._temporary = self._root / TEMPORARY
        self._prepare = threading.Lock()
        self._ready: set[Path] = set()

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        path = self._path(name)
        source = Source(chunks)
        try:
            self._prepare_directory(path.parent)
            return durable.write_new(path, source, temporary=self._temporary)
        except FileExistsError as error:
            if source.failed:
                raise
            raise ObjectExistsError(f"object already exists: {path}") from error
        except OSError as error:
            if source.failed:
                raise
            raise _failure("write", path, error) from error

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                start, stop = clip(self._size(path, os.fstat(fd)), offset, length)
                return _read(fd, start, stop)
            finally:
                os.close(fd)
        except _IS_MISSING as error:
            raise self._missing(path) from error
        except OSError as error:
            raise _failure("read", path, error) from error

    def size(self, name: str) -> int:
        path = self._path(name)
        try:
            return self._size(path, path.stat())
        except _IS_MISSING as error:
            raise self._missing(path) from error
        except OSError as error:
            raise _failure("read", path, error) from error

    def list(self, prefix: str) -> Iterator[str]:
        folder, _, start = check_prefix(prefix).rpartition("/")
        return self._walk(folder + "/" if folder else "", start)

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink()
            durable.sync_directory(path.parent)
        except (*_IS_MISSING, IsADirectoryError):
            return
        except OSError as error:
            raise _failure("delete", path, error) from error

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _prepare_directory(self, folder: Path) -> None:
        """Make sure of `folder` and ``tmp``, once each; the first call sweeps ``tmp``."""
        if folder in self._ready:
            return
        with self._prepare:
            if not self._ready:
                durable.make_directory(self._temporary, top=self._root)
                durable.sweep(self._temporary)
            durable.make_directory(folder, top=self._root)
            self._ready.add(folder)

    def _walk(self, folder: str, start: str) -> Iterator[str]:
        """Names of objects below `folder` (empty or ending in ``/``) whose next part has `start`.

        A directory sorts as its name with a slash, since that is how its objects' names go on.
        """
        path = self._root / folder
        try:
            with os.scandir(path) as entries:
                found = sorted(
                    entry.name + ("/" if entry.is_dir() else "")
                    for entry in entries
                    if entry.name.startswith(start)
                    and is_segment(entry.name)
                    and (entry.is_dir() or entry.is_file())
                )
        except _IS_MISSING:
            return
        except OSError as error:
            raise _failure("list", path, error) from error
        for name in found:
            if not name.endswith("/"):
                yield folder + name
            elif folder or name != f"{TEMPORARY}/":
                yield from self._walk(folder + name, "")

    def _size(self, path: Path, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            raise self._missing(path)
        return status.st_size

    def _missing(self, path: Path) -> ObjectMissingError:
        if self._root.is_dir():
            return ObjectMissingError(f"no such object: {path}")
        return ObjectMissingError(
            f"no repository at {self._root}: the directory does not exist",
            hint="Mount it if it is on another file system, or run `dbmodule init` to create one.",
        )


def _read(fd: int, start: int, stop: int) -> bytes:
    """Bytes from `start` to `stop`; one call may give less than was asked for, at most 2 GB."""
    parts = []
    while start < stop and (part := os.pread(fd, stop - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _failure(action: str, path: Path, error: OSError) -> RepositoryError:
    return RepositoryError(
        f"cannot {action} {path}: {error.strerror or error}",
        hint=_HINTS.get(error.errno or 0, "Check the repository's file system."),
    )
