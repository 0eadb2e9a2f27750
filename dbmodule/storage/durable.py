"""The one way in which dbmodule creates a file that must survive a crash.

`write_new` is put-if-absent: temp file → write → fsync → hard link to the final name → unlink the
temp file → fsync the directory. ``link`` fails when the name is taken, where ``rename`` would
replace it in silence, so of any number of racing writers exactly one wins, and nobody ever sees
part of a file. What a crash leaves behind is at most a temp file.

A writer holds an flock on its temp file for as long as it needs it; the kernel drops the lock with
the process, so `sweep` can tell a dead writer's file from a live one's without guessing by age.
Everything here raises plain `OSError`; callers say what it means.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from dbmodule.ports import Buffer

_SUFFIX = ".part"


def write_new(path: Path, chunks: Iterable[Buffer], *, temporary: Path) -> int:
    """Create `path` from `chunks` and give its size; it is durable when this returns.

    `temporary` is a directory of the same file system. Raises `FileExistsError` when `path` exists
    (whose directory entry is then durable too: the racing winner may not have come that far), and
    lets through whatever `chunks` raises. When anything but the last step fails there is no
    `path`; when fsync of the directory fails, `path` is whole but may not outlive a crash.
    """
    with _locked_temp_file(temporary) as (temp, fd):
        size = sum(_write_all(fd, chunk) for chunk in chunks)
        os.fsync(fd)
        try:
            os.link(temp, path)
        except FileExistsError:
            sync_directory(path.parent)
            raise
    sync_directory(path.parent)
    return size


def make_directory(path: Path, *, top: Path) -> None:
    """Make `path` and what is missing above it, mode 0700, with durable entries.

    Below `top`, entries of directories that were there already are synced as well: another writer
    may have made them a moment ago and not yet come to that. `top` and what is above it may belong
    to somebody else, and are synced only when made here.
    """
    if path == top and path.is_dir():
        return
    if path != top:
        make_directory(path.parent, top=top)
    elif not path.parent.is_dir():
        make_directory(path.parent, top=path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """fsync a directory, which makes the names in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(temporary: Path) -> None:
    """Remove the temp files in `temporary` whose writers are dead, but not other users' files."""
    for path in temporary.glob("*" + _SUFFIX):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            # Unlinked under the lock: see the check for it in _locked_temp_file.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


@contextlib.contextmanager
def _locked_temp_file(directory: Path) -> Iterator[tuple[Path, int]]:
    """A new empty file in `directory`, locked by us; its name is gone when the block ends."""
    while True:
        path = directory / (secrets.token_hex(16) + _SUFFIX)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink == 0:
                # A sweeper came between open and flock and took the file for a dead writer's.
                continue
            try:
                yield path, fd
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(fd)


def _write_all(fd: int, chunk: Buffer) -> int:
    rest = memoryview(chunk).cast("B")
    size = len(rest)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return size
