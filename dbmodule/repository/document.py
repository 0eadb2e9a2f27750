"""Sealed JSON documents: one line of canonical JSON, one line with its BLAKE3.

The manifest, the repository's own description and the cluster bindings are such documents. The
hash makes any changed byte a `CorruptObjectError`; the first line can be read with any JSON tool.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.ports import ObjectStore

FORMAT = 1
"""The version of the repository format that this code writes, and the newest that it reads."""


def seal(body: dict[str, Any], key: bytes | None) -> bytes:
    """Serialise `body`; `key` (32 bytes) makes the hash a keyed one."""
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # A path that is not UTF-8 is a string with lone surrogates: \udcff is how JSON writes them.
    line = text.encode("utf-8", "backslashreplace")
    return line + b"\n" + document_hash(line, key).encode() + b"\n"


def document_hash(line: bytes, key: bytes | None) -> str:
    """64 hexadecimal digits over a document's first line, without its newline."""
    return (blake3(line) if key is None else blake3(line, key=key)).hexdigest()


def unseal(name: str, data: bytes, key: bytes | None) -> tuple[dict[str, Any], str]:
    """The body and hash of a sealed document called `name`.

    Raises `CorruptObjectError` when the bytes do not match the hash, and `FormatVersionError`
    when the document is sound but of a format version that this code does not know.
    """
    line, newline, rest = data.partition(b"\n")
    digest = document_hash(line, key)
    if newline != b"\n" or rest != digest.encode() + b"\n":
        raise CorruptObjectError(
            f"{name}: its bytes do not match its hash",
            hint="Run `dbmodule verify` to see what else is damaged.",
        )
    try:
        body = json.loads(line)
    except ValueError as error:
        raise CorruptObjectError(f"{name}: not a JSON document: {error}") from error
    if not isinstance(body, dict) or "format" not in body:
        raise CorruptObjectError(f"{name}: not a dbmodule document")
    if body["format"] != FORMAT:
        raise FormatVersionError(
            f"{name}: format version {body['format']!r} is not known to this version of dbmodule",
            hint="Install the version of dbmodule that wrote the repository, or a newer one.",
        )
    return body, digest


class Documents:
    """The sealed documents of one repository, by name."""

    def __init__(self, store: ObjectStore, key: bytes) -> None:
        self.store = store
        self._key = key

    def put(self, name: str, body: dict[str, Any]) -> None:
        """Create a document, durably; `ObjectExistsError`."""
        self.store.put_new(name, [seal({**body, "format": FORMAT}, self._key)])

    def get(self, name: str) -> dict[str, Any]:
        """A document's body; `ObjectMissingError`, `CorruptObjectError`, `FormatVersionError`."""
        return unseal(name, self.store.get(name), self._key)[0]
