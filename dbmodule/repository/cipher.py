"""The ciphers of an encrypted repository: how one object and one name are encrypted.

All keys follow from the repository's data key, 32 random bytes, each for one purpose only. An
object is encrypted in pieces with AES-256-GCM, so that a range of it can be read; its key follows
from its own name and, but for packs, from a salt of its own. So an object that is moved, changed,
cut or put together from others is not accepted.

Invariant: a key and a nonce are never used for two different plaintexts. The nonce is the piece's
number; the key is new for every object, since its salt is random. A pack has no salt, which saves
a request for each that is read: its name is a hash over every byte of it, so that another content
has another key.

This module needs `cryptography`, and is imported only when a repository turns out to be encrypted.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

from dbmodule.errors import CorruptObjectError, RepositoryError
from dbmodule.ports import Buffer
from dbmodule.repository.secret import KEY_BYTES

SALT_BYTES = 32
TAG_BYTES = 16
PIECE = 32 << 10
"""Plain bytes of every piece but the last, which may be shorter."""
STORED_PIECE = PIECE + TAG_BYTES
_NONCE_BYTES = 12

_HASHES = "dbmodule format 1: hashes"
_OBJECTS = "dbmodule format 1: objects"
_NAMES = "dbmodule format 1: names"
_WRAP = "dbmodule format 1: wrap"
_KEY_ID = "dbmodule format 1: key id"

NAME_UNIT = 48
"""Names are padded to a multiple of this, so that their length says next to nothing."""
_PART = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,95}")
"""What can be encrypted as part of a name: twice its padded length fits into a part of a name."""


def derive(context: str, key: bytes, length: int = KEY_BYTES) -> bytes:
    """BLAKE3 in its key derivation mode."""
    return blake3(key, derive_key_context=context).digest(length)


def hash_key(data_key: bytes) -> bytes:
    """The key of all hashes: nobody without it can look for pages that he knows."""
    return derive(_HASHES, data_key)


class ObjectCipher:
    """Pieces of one object; `number` counts them from 0, and the last is marked as such."""

    def __init__(self, key: bytes) -> None:
        self._gcm = AESGCM(key)

    def seal(self, number: int, piece: Buffer, *, last: bool) -> bytes:
        return self._gcm.encrypt(_nonce(number, last), piece, None)

    def open(self, number: int, stored: Buffer, *, last: bool) -> bytes | None:
        """The plain bytes; None when they are not what was sealed as this piece."""
        try:
            return self._gcm.decrypt(_nonce(number, last), stored, None)
        except (InvalidTag, ValueError):
            return None


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(_NONCE_BYTES - 1, "little") + bytes([last])


class ObjectCiphers:
    """Makes the cipher of each object of a repository."""

    def __init__(self, data_key: bytes) -> None:
        self._key = derive(_OBJECTS, data_key)

    def of(self, name: str, salt: bytes) -> ObjectCipher:
        """`salt` is empty for a pack, whose name stands for its content."""
        return ObjectCipher(blake3(salt + name.encode(), key=self._key).digest())

    def seal(self, name: str, data: bytes) -> bytes:
        """A short object, whole: its salt and its only piece."""
        salt = secrets.token_bytes(SALT_BYTES)
        return salt + b"".join(sealed(self.of(name, salt), [data]))

    def open(self, name: str, stored: bytes) -> bytes:
        """What `seal` was given; raises `CorruptObjectError`."""
        found = self.of(name, stored[:SALT_BYTES]).open(0, stored[SALT_BYTES:], last=True)
        if found is None:
            raise changed(name)
        return found


def changed(name: str) -> CorruptObjectError:
    return CorruptObjectError(
        f"{name}: cannot be decrypted: it was changed or cut, or belongs elsewhere",
        hint="Run `dbmodule verify` to see what else is damaged.",
    )


def sealed(cipher: ObjectCipher, chunks: Iterable[Buffer]) -> Iterator[bytes]:
    """The stored pieces of an object whose plain bytes are `chunks`; at least one."""
    number = 0
    rest = bytearray()
    for chunk in chunks:
        view, at = memoryview(chunk).cast("B"), 0
        # A full piece waits until more is known to come: it may be the last.
        while len(rest) + len(view) - at > PIECE:
            if rest:
                taken = PIECE - len(rest)
                rest += view[at : at + taken]
                piece: Buffer = rest
                rest = bytearray()
            else:
                taken = PIECE
                piece = view[at : at + taken]
            yield cipher.seal(number, piece, last=False)
            at += taken
            number += 1
        rest += view[at:]
    yield cipher.seal(number, rest, last=True)


def plain_size(name: str, stored: int) -> int:
    """Plain bytes in an object's pieces, which take `stored` bytes; `CorruptObjectError`."""
    whole, rest = divmod(stored, STORED_PIECE)
    if stored == 0 or 0 < rest < TAG_BYTES:
        raise changed(name)
    return stored - TAG_BYTES * (whole + (rest > 0))


class NameCipher:
    """Parts of names, encrypted with AES-SIV: the same name is the same again, and can be read."""

    def __init__(self, data_key: bytes) -> None:
        self._siv = AESSIV(derive(_NAMES, data_key, 64))

    def seal(self, folder: str, part: str) -> str:
        """What stands for `part` below `folder`, which is given by its plain name."""
        if _PART.fullmatch(part) is None:
            raise RepositoryError(f"not an object name that can be encrypted: {part[:200]!r}")
        plain = part.encode()
        padded = plain.ljust(-(-len(plain) // NAME_UNIT) * NAME_UNIT, b"\0")
        return self._siv.encrypt(padded, [folder.encode()]).hex()

    def open(self, folder: str, stored: str) -> str | None:
        """The part of a name that `stored` stands for; None when it is none of ours."""
        try:
            plain = self._siv.decrypt(bytes.fromhex(stored), [folder.encode()])
        except (InvalidTag, ValueError):
            return None
        return plain.rstrip(b"\0").decode()


class KeyWrap:
    """How one master key holds the data key of one repository, whose description is `binding`."""

    def __init__(self, master: bytes, binding: bytes) -> None:
        self.key_id = derive(_KEY_ID, master + binding, 16).hex()
        self._gcm = AESGCM(derive(_WRAP, master + binding))

    def wrap(self, data_key: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._gcm.encrypt(nonce, data_key, None)

    def unwrap(self, wrapped: bytes) -> bytes | None:
        """The data key; None when it was changed."""
        try:
            return self._gcm.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            return None
