"""A master key as its user keeps it, which is never stored in the repository, logged or shown."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field

from dbmodule.errors import MasterKeyError

RANDOM = "key"
TYPED = "passphrase"
KEY_BYTES = 32
SHORTEST_PASSPHRASE = 12
_RANDOM = re.compile(rb"[0-9A-Fa-f]{64}")
_COST = 1 << 17
_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Secret:
    """64 hexadecimal digits, which are 32 random bytes, or a passphrase."""

    text: bytes = field(repr=False)

    @classmethod
    def new(cls) -> Secret:
        return cls(secrets.token_hex(KEY_BYTES).encode())

    @classmethod
    def read(cls, text: bytes) -> Secret:
        """The secret in `text`, but for the end of its line; raises `MasterKeyError`."""
        text = text.rstrip(b"\r\n")
        if len(text) < SHORTEST_PASSPHRASE:
            raise MasterKeyError(
                "the master key that was given is empty or too short",
                hint="It is 64 hexadecimal digits, as `openssl rand -hex 32` makes them, or a"
                f" passphrase of at least {SHORTEST_PASSPHRASE} characters.",
            )
        return cls(text)

    @property
    def kind(self) -> str:
        """`RANDOM` or `TYPED`."""
        return TYPED if _RANDOM.fullmatch(self.text) is None else RANDOM

    def master_key(self, salt: bytes) -> bytes:
        """32 bytes; those of a passphrase take half a second and 128 MB, whoever tries it."""
        if self.kind == RANDOM:
            return bytes.fromhex(self.text.decode("ascii"))
        return hashlib.scrypt(
            self.text,
            salt=salt,
            n=_COST,
            r=_BLOCK,
            p=1,
            maxmem=256 * _COST * _BLOCK,
            dklen=KEY_BYTES,
        )
