"""Reading a data directory that a server may be writing to.

Files are read with ``pread`` into the caller's buffer, never mapped: a file that is truncated
while it is mapped kills the process (SIGBUS).
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from dbmodule.datafile import contents_excluded
from dbmodule.errors import SourceError
from dbmodule.ports import SourceEntry
from dbmodule.registry import FileIdentity

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_boot_id() -> str:
    """Tells this boot of this host from all others; empty where that cannot be known."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


def host_name() -> str:
    """Tells this host from others, as far as its name does."""
    return socket.gethostname()


def _failed(path: Path | str, error: OSError) -> SourceError:
    return SourceError(
        f"cannot read {path}: {error.strerror}",
        hint="Run as the operating system user that owns the data directory, and check the disk.",
    )


class LocalFile:
    """An open file of the data directory."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        try:
            self._stat = os.fstat(descriptor)
        except OSError as error:
            raise _failed(path, error) from error
        self.mode = stat.S_IMODE(self._stat.st_mode)

    def identity(self) -> FileIdentity:
        s = self._stat
        return FileIdentity(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise _failed(self._path, error) from error
        return done

    def close(self) -> None:
        os.close(self._descriptor)


class LocalDataDirectory:
    """The data directory at `root`, of a server whose tablespaces use `version_directory`."""

    def __init__(self, root: Path, version_directory: str = "") -> None:
        self.path = str(root)
        self._root = root
        self._version_directory = version_directory

    def open(self, path: str) -> LocalFile | None:
        full = os.path.join(self._root, path)
        try:
            descriptor = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failed(full, error) from error
        return LocalFile(full, descriptor)

    def read(self, path: str) -> bytes | None:
        full = self._root / path
        try:
            with full.open("rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failed(full, error) from error

    def names(self, path: str) -> list[str]:
        full = self._root / path
        try:
            return os.listdir(full)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _failed(full, error) from error

    def owner(self) -> str:
        try:
            return pwd.getpwuid(self._root.stat().st_uid).pw_name
        except KeyError:
            return ""
        except OSError as error:
            raise _failed(self._root, error) from error

    def walk(self) -> Iterator[SourceEntry]:
        yield from self._directory("")

    def _directory(self, path: str) -> Iterator[SourceEntry]:
        full = self._root / path
        try:
            with os.scandir(full) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except FileNotFoundError:
            if path and not os.path.lexists(full):
                return  # dropped since its parent was listed
            raise SourceError(f"the directory {full} cannot be found") from None
        except OSError as error:
            raise _failed(full, error) from error
        for entry in entries:
            name = f"{path}/{entry.name}" if path else entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failed(self._root / name, error) from error
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                yield from self._link(name)
            elif stat.S_ISDIR(status.st_mode):
                yield from self._subdirectory(name, mode)
            elif stat.S_ISREG(status.st_mode):
                yield SourceEntry(name, "file", mode, status.st_size)

    def _subdirectory(self, name: str, mode: int) -> Iterator[SourceEntry]:
        parent, _, last = name.rpartition("/")
        in_tablespace = parent.startswith("pg_tblspc/") and parent.count("/") == 1
        if in_tablespace and last != self._version_directory:
            return  # a location may be shared with clusters of other versions
        yield SourceEntry(name, "directory", mode)
        if not contents_excluded(name):
            yield from self._directory(name)

    def _link(self, name: str) -> Iterator[SourceEntry]:
        full = self._root / name
        try:
            target = os.readlink(full)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _failed(full, error) from error
        parent = name.rpartition("/")[0]
        if name == "pg_wal":
            yield SourceEntry(name, "symlink", 0o700, target=target)
        elif parent == "pg_tblspc":
            yield SourceEntry(name, "symlink", 0o700, target=target)
            yield from self._directory(name)
        elif contents_excluded(parent):
            return
        else:
            raise SourceError(
                f"{full} is a symbolic link to {target}, which PostgreSQL does not make",
                hint="Replace the link by what it points to; only tablespaces and pg_wal may be"
                " links.",
            )
