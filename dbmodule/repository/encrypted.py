"""An object store that encrypts: what is put into it lies in another store, and tells nothing.

Above it nothing changes: names, bytes and sizes are plain. Below it the names but for packs' and
all bytes are encrypted, as `cipher` does. Every byte that is read was authenticated, together with
the name that it was asked for and its place in the object.

Names stay in folders, and the first part of a name stays as it is: so it shows how many objects of
a kind there are, and how large each is. A pack keeps its name, which is a keyed hash.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from dbmodule.ports import Buffer, ObjectStore
from dbmodule.repository.cipher import (
    PIECE,
    SALT_BYTES,
    STORED_PIECE,
    NameCipher,
    ObjectCiphers,
    changed,
    plain_size,
    sealed,
)

log = logging.getLogger(__name__)

_PACKS = "packs/"


class EncryptedStore:
    """`ports.ObjectStore` over `store`, which holds nothing in the clear. Safe for threads.

    `plain` are names in `store`, or beginnings of names, that are not part of this one.
    """

    SALTS = 4096
    """Salts that are remembered, for the next range of the same object."""

    def __init__(self, store: ObjectStore, data_key: bytes, plain: tuple[str, ...]) -> None:
        self._store = store
        self._plain = plain
        self._names = NameCipher(data_key)
        self._objects = ObjectCiphers(data_key)
        self._salts: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.url = store.url

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        salt = b"" if name.startswith(_PACKS) else secrets.token_bytes(SALT_BYTES)
        size = 0

        def counted() -> Iterator[Buffer]:
            nonlocal size
            for chunk in chunks:
                size += memoryview(chunk).nbytes
                yield chunk

        def stored() -> Iterator[Buffer]:
            if salt:
                yield salt
            yield from sealed(self._objects.of(name, salt), counted())

        self._store.put_new(self.stored_name(name), stored())
        return size

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"negative range: offset {offset}, length {length}")
        if length == 0:
            self.size(name)
            return b""
        first = offset // PIECE
        wanted = None
        if length is not None:
            wanted = ((offset + length - 1) // PIECE + 1 - first) * STORED_PIECE
        pieces = self._pieces(name, first, wanted)
        if pieces is None and self._forget(name):
            # Somebody may have written the object anew, with another salt than is remembered.
            pieces = self._pieces(name, first, wanted)
        if pieces is None:
            raise changed(name)
        start = offset - first * PIECE
        stop = None if length is None else start + length
        if len(pieces) == 1:
            return pieces[0][start:stop]
        return memoryview(b"".join(pieces))[start:stop].tobytes()

    def size(self, name: str) -> int:
        stored = self._store.size(self.stored_name(name))
        return plain_size(name, stored - (0 if name.startswith(_PACKS) else SALT_BYTES))

    def list(self, prefix: str) -> Iterator[str]:
        if prefix.startswith(_PACKS):
            return self._store.list(prefix)
        folder, slash, start = prefix.rpartition("/")
        below = self.stored_name(folder) + slash if slash else start
        found = (self._plain_name(stored) for stored in self._ours(below))
        return iter(sorted(name for name in found if name and name.startswith(prefix)))

    def delete(self, name: str) -> None:
        self._store.delete(self.stored_name(name))
        self._forget(name)

    def stored_name(self, name: str) -> str:
        """What the object called `name` is called in the store below."""
        if name.startswith(_PACKS):
            return name
        folder, *parts = name.split("/")
        stored = [folder]
        for part in parts:
            stored.append(self._names.seal(folder, part))
            folder = f"{folder}/{part}"
        return "/".join(stored)

    def strangers(self) -> Sequence[str]:
        """Objects of the store below whose names nobody with the key has made."""
        return [stored for stored in self._ours("") if self._plain_name(stored) is None]

    def _ours(self, prefix: str) -> Iterator[str]:
        return (name for name in self._store.list(prefix) if not name.startswith(self._plain))

    def _plain_name(self, stored: str) -> str | None:
        if stored.startswith(_PACKS):
            return stored
        folder, *parts = stored.split("/")
        for part in parts:
            opened = self._names.open(folder, part)
            if opened is None:
                log.warning("%s is no object of this repository", stored)
                return None
            folder = f"{folder}/{opened}"
        return folder

    def _pieces(self, name: str, first: int, wanted: int | None) -> Sequence[bytes] | None:
        """Plain pieces from number `first` on; None when they are not what was stored."""
        salt, stored = self._read(name, first, wanted)
        # An answer that is shorter than what was asked for ends where the object ends.
        whole = len(stored) == wanted
        cipher = self._objects.of(name, salt)
        pieces: list[bytes] = []
        for at in range(0, len(stored), STORED_PIECE):
            number, piece = first + at // STORED_PIECE, stored[at : at + STORED_PIECE]
            ends = at + STORED_PIECE >= len(stored)
            opened = None
            if not ends or whole:
                opened = cipher.open(number, piece, last=False)
            if opened is None and ends:
                opened = cipher.open(number, piece, last=True)
            if opened is None:
                return None
            pieces.append(opened)
        return pieces if pieces or first > 0 else None

    def _read(self, name: str, first: int, wanted: int | None) -> tuple[bytes, memoryview]:
        """The salt of an object, and `wanted` bytes of its pieces from number `first` on."""
        stored_name = self.stored_name(name)
        if name.startswith(_PACKS):
            return b"", memoryview(self._store.get(stored_name, first * STORED_PIECE, wanted))
        if first == 0:
            length = None if wanted is None else SALT_BYTES + wanted
            data = self._store.get(stored_name, 0, length)
            self._remember(name, data[:SALT_BYTES])
            return data[:SALT_BYTES], memoryview(data)[SALT_BYTES:]
        with self._lock:
            salt = self._salts.get(name)
        if salt is None:
            salt = self._store.get(stored_name, 0, SALT_BYTES)
            self._remember(name, salt)
        data = self._store.get(stored_name, SALT_BYTES + first * STORED_PIECE, wanted)
        return salt, memoryview(data)

    def _remember(self, name: str, salt: bytes) -> None:
        with self._lock:
            self._salts[name] = salt
            if len(self._salts) > self.SALTS:
                self._salts.popitem(last=False)

    def _forget(self, name: str) -> bool:
        """Was a salt remembered?"""
        with self._lock:
            return self._salts.pop(name, None) is not None
