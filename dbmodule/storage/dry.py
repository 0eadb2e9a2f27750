"""A store that reads another and writes nothing: what a backup would store is only counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dbmodule.errors import ObjectExistsError, ObjectMissingError
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.storage.names import check_name


class DryStore:
    """`ports.ObjectStore` over `store`; an object that is put is forgotten at once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.url = store.url

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        check_name(name)
        try:
            self._store.size(name)
        except ObjectMissingError:
            return sum(memoryview(chunk).nbytes for chunk in chunks)
        raise ObjectExistsError(f"object already exists: {name}")

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._store.get(name, offset, length)

    def size(self, name: str) -> int:
        return self._store.size(name)

    def list(self, prefix: str) -> Iterator[str]:
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        """Nothing was put, so nothing is removed."""
