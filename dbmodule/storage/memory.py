"""An object store in this process's memory, for tests and for embedding; it dies with the process.

It keeps every rule of `ports.ObjectStore` but durability.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from dbmodule.errors import ObjectExistsError, ObjectMissingError
from dbmodule.ports import Buffer
from dbmodule.storage.names import check_name, check_prefix, clip


class MemoryStore:
    """`ports.ObjectStore` in a dictionary."""

    url = "memory://"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        check_name(name)
        content = b"".join(chunks)
        with self._lock:
            if name in self._objects:
                raise ObjectExistsError(f"object already exists: {name}")
            self._objects[name] = content
        return len(content)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        content = self._content(name)
        start, stop = clip(len(content), offset, length)
        return content[start:stop]

    def size(self, name: str) -> int:
        return len(self._content(name))

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._lock:
            names = sorted(name for name in self._objects if name.startswith(prefix))
        return iter(names)

    def delete(self, name: str) -> None:
        check_name(name)
        with self._lock:
            self._objects.pop(name, None)

    def _content(self, name: str) -> bytes:
        check_name(name)
        with self._lock:
            if name not in self._objects:
                raise ObjectMissingError(f"no such object: {name}")
            return self._objects[name]
