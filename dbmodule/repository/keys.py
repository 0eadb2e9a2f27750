"""Master keys of an encrypted repository: each opens it, and none is stored in it.

    keys/KEYID.json     the data key, wrapped with one master key; one object per master key

Adding a master key writes one object and revoking one removes one: no data is written again.

Invariant: as long as nothing but this module removes them, one of the objects opens. A key is
removed only by somebody who opened the repository with another, and who puts that one back
afterwards if it is gone, since two may have revoked each other's.
"""

from __future__ import annotations

import contextlib
import json
import re
from datetime import UTC, datetime

from dbmodule.errors import (
    CorruptObjectError,
    MasterKeyError,
    ObjectExistsError,
    ObjectMissingError,
    UsageError,
)
from dbmodule.ports import ObjectStore
from dbmodule.reports import KeyInfo
from dbmodule.repository.cipher import KeyWrap, ObjectCiphers
from dbmodule.repository.document import FORMAT, seal, unseal
from dbmodule.repository.secret import KEY_BYTES, Secret

PREFIX = "keys/"
_SUFFIX = ".json"
_KEY_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_LABEL = 200


def key_name(key_id: str) -> str:
    return f"{PREFIX}{key_id}{_SUFFIX}"


def key_id_of(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(_SUFFIX)


class Keyring:
    """The master keys of one repository, opened with one of them or just being made.

    `binding` is the hash of the repository's description, and `salt` is in it: a master key opens
    the repository with this very description, and no other.
    """

    def __init__(
        self, store: ObjectStore, salt: bytes, binding: str, data_key: bytes, key_id: str = ""
    ) -> None:
        self._store = store
        self._salt = salt
        self._binding = bytes.fromhex(binding)
        self._objects = ObjectCiphers(data_key)
        self.data_key = data_key
        self.key_id = key_id
        """Of the master key in use; empty as long as there is none."""

    @classmethod
    def unlock(cls, store: ObjectStore, salt: bytes, binding: str, secret: Secret) -> Keyring:
        """Raises `MasterKeyError` when `secret` is not a key of this repository."""
        wrap = KeyWrap(secret.master_key(salt), bytes.fromhex(binding))
        try:
            data_key = _unwrapped(store, wrap)
        except ObjectMissingError:
            raise MasterKeyError(
                f"the master key that was given does not open the repository at {store.url}:"
                " it is another one's, or it was revoked",
                hint="Check key_file, key_command and DBMODULE_REPOSITORY__KEY; with another"
                " master key `dbmodule key list` shows which there are.",
            ) from None
        opened = cls(store, salt, binding, data_key, wrap.key_id)
        opened.info(wrap.key_id)
        return opened

    def key_ids(self) -> list[str]:
        return [key_id_of(name) for name in self._store.list(PREFIX)]

    def listed(self) -> list[KeyInfo]:
        """All master keys, also those of which nothing can be read."""
        found = []
        for key_id in self.key_ids():
            try:
                found.append(self.info(key_id))
            except (CorruptObjectError, ObjectMissingError) as error:
                current = key_id == self.key_id
                found.append(KeyInfo(key_id, "", "", "", current, error.message))
        return found

    def info(self, key_id: str) -> KeyInfo:
        """What is known of a master key; `CorruptObjectError` unless it belongs here."""
        name = key_name(key_id)
        body, _ = unseal(name, self._store.get(name), None)
        info = json.loads(self._objects.open(name, _hexadecimal(name, body, "info")))
        return KeyInfo(
            key_id, info["kind"], info["label"], info["created_at"], key_id == self.key_id
        )

    def check(self, key_id: str) -> int:
        """The size of a key's object, after a look at it; `CorruptObjectError`."""
        self.info(key_id)
        return self._store.size(key_name(key_id))

    def add(self, secret: Secret, label: str) -> KeyInfo:
        """Let one more master key open the repository; one that does already is left as it is."""
        if len(label) > _LONGEST_LABEL:
            raise UsageError(f"a label has at most {_LONGEST_LABEL} characters")
        wrap = KeyWrap(secret.master_key(self._salt), self._binding)
        name = key_name(wrap.key_id)
        info = {
            "kind": secret.kind,
            "label": label,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        body = {
            "format": FORMAT,
            "wrapped": wrap.wrap(self.data_key).hex(),
            "info": self._objects.seal(name, json.dumps(info).encode()).hex(),
        }
        with contextlib.suppress(ObjectExistsError):
            self._store.put_new(name, [seal(body, None)])
        # Whoever adds a key relies on it, and one that was there already may be damaged.
        _unwrapped(self._store, wrap)
        return self.info(wrap.key_id)

    def revoke(self, key_id: str) -> None:
        """Remove a master key other than the one in use."""
        if _KEY_ID.fullmatch(key_id) is None or key_id not in self.key_ids():
            raise UsageError(
                f"the repository has no master key {key_id[:80]!r}",
                hint="`dbmodule key list` shows the ids that exist.",
            )
        if key_id == self.key_id:
            raise UsageError(
                f"{key_id} is the master key that is in use",
                hint="Open the repository with another one to revoke it, or put another one in"
                " its place with `dbmodule key rotate`.",
            )
        self._remove(key_id, keep=self.key_id)

    def rotate(self, secret: Secret, label: str) -> KeyInfo:
        """Put another master key in the place of the one in use, which is revoked."""
        added = self.add(secret, label)
        if added.current:
            raise UsageError(
                "the new master key is the one that is in use",
                hint="Name a file that does not exist: a new key is made there.",
            )
        self._remove(self.key_id, keep=added.key_id)
        return added

    def _remove(self, key_id: str, keep: str) -> None:
        kept = self._store.get(key_name(keep))
        self._store.delete(key_name(key_id))
        try:
            self._store.size(key_name(keep))
        except ObjectMissingError:
            self._store.put_new(key_name(keep), [kept])


def _unwrapped(store: ObjectStore, wrap: KeyWrap) -> bytes:
    """The data key as `wrap` holds it; `ObjectMissingError`, `CorruptObjectError`."""
    name = key_name(wrap.key_id)
    body, _ = unseal(name, store.get(name), None)
    data_key = wrap.unwrap(_hexadecimal(name, body, "wrapped"))
    if data_key is None or len(data_key) != KEY_BYTES:
        raise CorruptObjectError(f"{name}: the key in it was changed")
    return data_key


def _hexadecimal(name: str, body: dict[str, object], member: str) -> bytes:
    try:
        return bytes.fromhex(str(body[member]))
    except (KeyError, ValueError):
        raise CorruptObjectError(f"{name}: not the document of a key") from None
