"""A data directory that changes under the reader: hooks at the moment a file is opened or read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.ports import SourceEntry, SourceFile
from dbmodule.registry import FileIdentity

OnOpen = Callable[[str], None]
OnRead = Callable[[str, memoryview, int], int]
"""(path, the bytes that were read, their offset) → how many of them there are; may change them."""


class ChangingFile:
    """`ports.SourceFile` whose reads a hook sees, and changes."""

    def __init__(self, path: str, file: SourceFile, on_read: OnRead) -> None:
        self._path = path
        self._file = file
        self._on_read = on_read
        self.mode = file.mode

    def identity(self) -> FileIdentity:
        return self._file.identity()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        got = self._file.read_into(buffer, offset)
        return self._on_read(self._path, buffer[:got], offset)

    def close(self) -> None:
        self._file.close()


class ChangingDirectory:
    """`ports.DataDirectory` with hooks before a file is opened, after it is, and when read."""

    def __init__(
        self,
        directory: LocalDataDirectory,
        *,
        before: OnOpen = lambda path: None,
        after: OnOpen = lambda path: None,
        on_read: OnRead = lambda path, data, offset: len(data),
    ) -> None:
        self._directory = directory
        self._before = before
        self._after = after
        self._on_read = on_read
        self.path = directory.path

    def names(self, path: str) -> list[str]:
        return self._directory.names(path)

    def walk(self) -> Iterator[SourceEntry]:
        return self._directory.walk()

    def open(self, path: str) -> SourceFile | None:
        self._before(path)
        file = self._directory.open(path)
        if file is None:
            return None
        self._after(path)
        return ChangingFile(path, file, self._on_read)

    def read(self, path: str) -> bytes | None:
        return self._directory.read(path)

    def owner(self) -> str:
        return self._directory.owner()


class Once:
    """A hook that acts at the first file of some, and never again."""

    def __init__(self, wanted: Callable[[str], bool], action: Callable[[], None]) -> None:
        self._wanted = wanted
        self._action = action
        self._lock = threading.Lock()
        self.happened = False

    def __call__(self, path: str) -> None:
        with self._lock:  # others that come to it wait until the change is there
            if not self.happened and self._wanted(path):
                self._action()
                self.happened = True
