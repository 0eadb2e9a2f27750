"""Writing a restore target: nothing outside it, nothing half done that looks finished.

While a restore runs the directory holds a marker and no ``global/pg_control``, without which no
server starts. That file comes last, by a rename, after everything else is on disk.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import crc32c

from dbmodule.errors import TargetError
from dbmodule.ports import Buffer

MARKER = "dbmodule.restoring"
_MARKER_TEXT = (
    b"A restore into this directory has begun and not ended. It holds no usable cluster.\n"
)
_CHUNK = 1 << 20
_VERSION_DIRECTORY = re.compile(r"PG_[0-9]+_[0-9]+")
_MODE = 0o777
"""Bits of a mode that are restored: no server file is set-user-id."""
_STAGED = ".dbmodule.staged"


def _failed(path: Path, error: OSError) -> TargetError:
    return TargetError(
        f"cannot write {path}: {error.strerror}",
        hint="Mend the cause, remove the unfinished target, and restore again.",
    )


class LocalTargetFile:
    """`ports.TargetFile` on a file descriptor."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def write(self, data: Buffer, offset: int) -> None:
        view = memoryview(data).cast("B")
        try:
            while len(view):
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise _failed(self._path, error) from error

    def finish(self) -> int:
        try:
            crc, offset = 0, 0
            while chunk := os.pread(self._descriptor, _CHUNK, offset):
                crc = crc32c.crc32c(chunk, crc)
                offset += len(chunk)
            os.fsync(self._descriptor)
        except OSError as error:
            raise _failed(self._path, error) from error
        finally:
            os.close(self._descriptor)
        return crc

    def abandon(self) -> None:
        os.close(self._descriptor)


class LocalTargetDirectory:
    """`ports.TargetDirectory` at `root`; `locations` maps a tablespace's OID to its place here.

    With `group_access` the owner's group may read it all, as after ``initdb --allow-group-access``.
    """

    def __init__(
        self, root: Path, locations: Mapping[str, Path], owner: str, group_access: bool
    ) -> None:
        self.path = str(root)
        self._directory_mode, self._file_mode = (0o750, 0o640) if group_access else (0o700, 0o600)
        self._root = root
        self._locations = {oid: path for oid, path in locations.items()}
        self._ids = _ids_of(owner)
        self._directories: set[Path] = set()

    def begin(self) -> None:
        places = (self._root, *self._locations.values())
        for place in places:
            _check_empty(place)
            _check_outside(place)
        _check_apart(places)
        for place in (self._root, *self._locations.values()):
            try:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                place.chmod(self._directory_mode)
                self._own(place)
            except OSError as error:
                raise _failed(place, error) from error
            self._directories.update((place, place.parent))
        self.write(MARKER, _MARKER_TEXT)

    def _own(self, path: Path) -> None:
        if self._ids is not None:
            os.chown(path, *self._ids, follow_symlinks=False)

    def _place(self, path: str) -> Path:
        """Where `path` goes; the caller has checked that it is relative and has no ``..``."""
        top, _, rest = path.partition("/")
        oid, _, inside = rest.partition("/")
        if top == "pg_tblspc" and inside and oid in self._locations:
            return self._locations[oid] / inside
        return self._root / path

    def make_directory(self, path: str, mode: int) -> None:
        place = self._place(path)
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            place.chmod(mode & _MODE)
            self._own(place)
        except OSError as error:
            raise _failed(place, error) from error
        self._directories.update((place, place.parent))

    def make_link(self, path: str) -> None:
        place = self._root / path
        oid = path.rpartition("/")[2]
        try:
            place.symlink_to(self._locations[oid])
            self._own(place)
        except OSError as error:
            raise _failed(place, error) from error

    def create(self, path: str, mode: int, size: int) -> LocalTargetFile:
        place = self._place(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(place, flags, 0o600)
            try:
                os.fchmod(descriptor, mode & _MODE)
                if self._ids is not None:
                    os.fchown(descriptor, *self._ids)
                os.ftruncate(descriptor, size)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise _failed(place, error) from error
        return LocalTargetFile(place, descriptor)

    def exists(self, path: str) -> bool:
        return os.path.lexists(self._place(path))

    def read(self, path: str) -> bytes:
        place = self._place(path)
        try:
            return place.read_bytes()
        except OSError as error:
            raise _failed(place, error) from error

    def write(self, path: str, data: bytes) -> int:
        place = self._place(path)
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(place, error) from error
        file = self.create(path, self._file_mode, 0)
        file.write(data, 0)
        return file.finish()

    def finish(self, control_file: str) -> None:
        staged, final = self._root / (control_file + _STAGED), self._root / control_file
        try:
            for directory in sorted(self._directories):
                _sync_directory(directory)
            staged.rename(final)
            _sync_directory(final.parent)
            (self._root / MARKER).unlink()
            _sync_directory(self._root)
        except OSError as error:
            raise _failed(final, error) from error


def staged_name(control_file: str) -> str:
    """Under which name a control file is written before `LocalTargetDirectory.finish`."""
    return control_file + _STAGED


def _ids_of(owner: str) -> tuple[int, int] | None:
    """User and group that files are given to; None where the process cannot or need not."""
    if os.geteuid() != 0 or owner in ("", "root"):
        return None
    try:
        entry = pwd.getpwnam(owner)
    except KeyError:
        raise TargetError(
            f"the cluster belonged to the user {owner}, who does not exist here",
            hint="Create that user, or restore as the user who will run the server.",
        ) from None
    return entry.pw_uid, entry.pw_gid


def _check_empty(place: Path) -> None:
    try:
        names = set(os.listdir(place))
    except FileNotFoundError:
        return
    except OSError as error:
        raise TargetError(f"cannot use {place}: {error.strerror}") from error
    if not names:
        return
    if "postmaster.pid" in names:
        raise TargetError(
            f"{place} is the data directory of a server that may be running",
            hint="Restore into a new directory.",
        )
    if MARKER in names:
        raise TargetError(
            f"{place} holds a restore that was interrupted",
            hint=f"Remove {place} and restore again.",
        )
    raise TargetError(f"{place} is not empty", hint="Restore into a new or an empty directory.")


def _check_outside(place: Path) -> None:
    """Nothing is ever written into a data directory or tablespace, which would then be backed up
    with it, or be taken by its server for a file of its own."""
    try:
        above = place.resolve().parents
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise TargetError(f"cannot use {place}: {error}") from error
    for parent in above:
        if _VERSION_DIRECTORY.fullmatch(parent.name) or _is_a_cluster_s(parent):
            raise TargetError(
                f"{place} lies in {parent}, which belongs to a database cluster",
                hint="Restore into a directory outside of it.",
            )


def _is_a_cluster_s(directory: Path) -> bool:
    """Is this a data directory, a database in one, or the location of a tablespace?"""
    try:
        names = os.listdir(directory)
    except OSError:
        return False  # not there yet, or a directory above that may be passed but not read
    return "PG_VERSION" in names or any(map(_VERSION_DIRECTORY.fullmatch, names))


def _check_apart(places: Iterable[Path]) -> None:
    """Two places may be one and the same directory by way of a link."""
    seen: list[Path] = []
    for place in places:
        real = place.resolve()
        for other in seen:
            if real.is_relative_to(other) or other.is_relative_to(real):
                raise TargetError(
                    f"{place} and {other} lie in each other",
                    hint="Give the target and each tablespace a directory of its own.",
                )
        seen.append(real)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
