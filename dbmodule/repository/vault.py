"""What makes a repository an encrypted one: its description, its keys and the store inside.

Imported only when a repository is to be encrypted or turns out to be, and `cryptography` with it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from dbmodule.errors import (
    FormatVersionError,
    MasterKeyError,
    ObjectExistsError,
    ObjectMissingError,
)
from dbmodule.ports import ObjectStore
from dbmodule.repository.cipher import SALT_BYTES, hash_key
from dbmodule.repository.document import FORMAT, seal, unseal
from dbmodule.repository.encrypted import EncryptedStore
from dbmodule.repository.keys import PREFIX, Keyring, key_name
from dbmodule.repository.secret import KEY_BYTES, Secret

CIPHER = "aes-256-gcm"
_PROBES = "probe/"


@dataclass(frozen=True, slots=True)
class Vault:
    """The inside of an encrypted repository."""

    store: EncryptedStore
    keyring: Keyring
    hash_key: bytes


def create_vault(store: ObjectStore, description: str, secret: Secret) -> None:
    """Write the first master key, then the object `description`.

    From then on there is a repository. Raises `ObjectExistsError` if there is one already.
    """
    try:
        store.size(description)
    except ObjectMissingError:
        pass
    else:
        raise ObjectExistsError(f"there is a repository at {store.url}")
    salt = secrets.token_bytes(SALT_BYTES)
    body = {
        "format": FORMAT,
        "id": secrets.token_hex(16),
        "cipher": CIPHER,
        "salt": salt.hex(),
    }
    data = seal(body, None)
    binding = unseal(description, data, None)[1]
    key = Keyring(store, salt, binding, secrets.token_bytes(KEY_BYTES)).add(secret, "")
    try:
        store.put_new(description, [data])
    except ObjectExistsError:
        if store.get(description) != data:
            # Another was quicker: its description does not belong to this key.
            store.delete(key_name(key.key_id))
        raise


def open_vault(
    store: ObjectStore, description: str, body: dict[str, Any], binding: str, secret: Secret | None
) -> Vault:
    """Open what `body`, with the hash `binding`, describes; `MasterKeyError`, `FormatVersionError`.

    A member that is missing or malformed is a `KeyError`, `TypeError` or `ValueError`.
    """
    if body["cipher"] != CIPHER:
        raise FormatVersionError(
            f"{description}: cipher {body['cipher']!r} is not known to this version of dbmodule",
            hint="Install the version of dbmodule that wrote the repository, or a newer one.",
        )
    if secret is None:
        raise MasterKeyError(
            f"the repository at {store.url} is encrypted, and no master key is given",
            hint="Set key_file or key_command in [repository], or DBMODULE_REPOSITORY__KEY in the"
            " environment.",
        )
    keyring = Keyring.unlock(store, bytes.fromhex(body["salt"]), binding, secret)
    inside = EncryptedStore(store, keyring.data_key, plain=(description, PREFIX, _PROBES))
    return Vault(inside, keyring, hash_key(keyring.data_key))
