"""A repository: its description, its clusters, its committed backups.

    repository.json             what this is: format version, id, key for hashes or cipher
    keys/…                      of an encrypted one: see `keys`
    clusters/NAME.json          which database cluster a name stands for
    manifests/NAME/ID.json      one per committed backup
    packs/xx/…  husks/xx/…      see `pack` and `husk`
    index/…                     see `index`
    locks/…  condemned/…        see `locks` and `condemned`

Invariant: a backup exists if and only if its manifest does. Under a manifest's name there may be a
*tombstone* instead: it keeps a run that was taken for dead from committing that backup. In an
encrypted repository everything but the first two lies in an `EncryptedStore`, of which nothing else
need know.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING

from dbmodule.errors import (
    BrokenChainError,
    CorruptObjectError,
    FormatVersionError,
    LockedError,
    ObjectExistsError,
    ObjectMissingError,
    RefusedError,
    RepositoryError,
    UsageError,
    WrongClusterError,
)
from dbmodule.ident import BackupId, SystemId
from dbmodule.manifest import Manifest, from_body, to_body
from dbmodule.parallel import in_order
from dbmodule.ports import Cancelled, ObjectStore, Processes
from dbmodule.repository.condemned import Condemned
from dbmodule.repository.document import FORMAT, Documents, seal, unseal
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.husk import husked_packs
from dbmodule.repository.index import PackRef
from dbmodule.repository.locks import Locks, LockTiming
from dbmodule.repository.merge import tidy
from dbmodule.repository.pack import PackId
from dbmodule.repository.secret import Secret
from dbmodule.repository.tables import TableReader
from dbmodule.repository.writer import FrameWriter

if TYPE_CHECKING:
    from dbmodule.repository.vault import Vault

DESCRIPTION = "repository.json"
MANIFESTS = "manifests/"
_CONTENT = ("clusters/", MANIFESTS, "packs/")
_READERS = 8
REVOKED = "revoked"
"""Member of a tombstone, true."""
_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_cluster_name(name: str) -> str:
    """Cluster names become part of object names; raises `UsageError`."""
    if _CLUSTER.fullmatch(name) is None:
        raise UsageError(
            f"not a cluster name: {name[:80]!r}",
            hint="Use up to 63 letters, digits, dots, - and _, a letter or digit first.",
        )
    return name


def cluster_document(cluster: str) -> str:
    return f"clusters/{check_cluster_name(cluster)}.json"


def manifest_name(cluster: str, backup: BackupId) -> str:
    return f"{MANIFESTS}{cluster}/{backup}.json"


def check_hashes(chain: Sequence[Manifest], hashes: Sequence[str]) -> None:
    """Prove that each manifest of a chain names the hash of its baseline's.

    Raises `BrokenChainError` when a baseline was replaced since its dependent was taken.
    """
    for manifest, below in zip(chain[1:], hashes, strict=False):
        if manifest.baseline_hash != below:
            raise BrokenChainError(
                f"backup {manifest.baseline_id} is not the one that {manifest.backup_id}"
                " was built on: its manifest has changed",
                hint="Restore a backup of another chain, and run `dbmodule verify`.",
            )


class RevokedError(ObjectMissingError):
    """What has the name of a manifest is a tombstone: there is no such backup."""


class Repository:
    """An opened repository. Safe for threads."""

    def __init__(self, store: ObjectStore, repository_id: str, key: bytes) -> None:
        self.store = store
        self.id = repository_id
        self.key = key
        self.documents = Documents(store, key)
        self.condemned = Condemned(self.documents)
        self.frames = FrameReader(store, key)
        self.vault: Vault | None = None
        """Of an encrypted repository; `store` is its inside."""

    # -- opening --------------------------------------------------------------------------------

    @classmethod
    def create(cls, store: ObjectStore, secret: Secret | None = None) -> Repository:
        """Write a new repository's description; raises `ObjectExistsError` if there is one.

        With a `secret`, which becomes its first master key, everything in it is encrypted. Where
        only the description of an earlier one is gone, `RefusedError`: no other opens its backups.
        """
        left = next((n for folder in _CONTENT for n in store.list(folder)), None)
        if left is not None and not cls.exists(store):
            raise RefusedError(
                f"{store.url} holds {left}, but no {DESCRIPTION}: a repository has lost it",
                hint=f"Put {DESCRIPTION} back from a copy, or use another url for a new one.",
            )
        if secret is not None:
            from dbmodule.repository.vault import create_vault

            create_vault(store, DESCRIPTION, secret)
        else:
            body = {
                "format": FORMAT,
                "id": secrets.token_hex(16),
                "hash_key": secrets.token_hex(32),
                "created_at": datetime.now(UTC).isoformat(),
            }
            store.put_new(DESCRIPTION, [seal(body, None)])
        return cls.open(store, secret)

    @classmethod
    def open(cls, store: ObjectStore, secret: Secret | None = None) -> Repository:
        """Raises `RepositoryError` when there is none, `FormatVersionError` or `MasterKeyError`.

        A `secret` for a repository that is not encrypted is a `RefusedError`: somebody may have
        put that one there, so that backups are stored in the clear.
        """
        try:
            data = store.get(DESCRIPTION)
        except ObjectMissingError:
            raise RepositoryError(
                f"there is no repository at {store.url}",
                hint="Create one with `dbmodule init`, or check the URL.",
            ) from None
        body, binding = unseal(DESCRIPTION, data, None)
        try:
            if "cipher" in body:
                from dbmodule.repository.vault import open_vault

                vault = open_vault(store, DESCRIPTION, body, binding, secret)
                opened = cls(vault.store, body["id"], vault.hash_key)
                opened.vault = vault
                return opened
            opened = cls(store, body["id"], bytes.fromhex(body["hash_key"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptObjectError(f"{DESCRIPTION}: not a valid description") from error
        if secret is not None:
            raise RefusedError(
                f"a master key is configured, but the repository at {store.url} is not encrypted",
                hint="If that is meant, take the key out of the configuration; else make a new"
                " repository with `dbmodule init --key-file FILE --repo URL`.",
            )
        return opened

    @staticmethod
    def exists(store: ObjectStore) -> bool:
        """Is there a repository in `store`, of whatever kind?"""
        try:
            return store.size(DESCRIPTION) >= 0
        except ObjectMissingError:
            return False

    # -- clusters -------------------------------------------------------------------------------

    def bind(self, cluster: str, system_identifier: SystemId) -> None:
        """Tie a cluster name to a database cluster, or check that it is tied to this one."""
        body = {"format": FORMAT, "system_identifier": str(system_identifier)}
        try:
            self.store.put_new(cluster_document(cluster), [seal(body, self.key)])
        except ObjectExistsError:
            bound = self.bound_to(cluster)
            if bound != str(system_identifier):
                raise WrongClusterError(
                    f"cluster name {cluster!r} in {self.store.url} stands for the database cluster"
                    f" with system identifier {bound}, not for {system_identifier}",
                    hint="Choose another name with --cluster, or another repository.",
                ) from None

    def bound_to(self, cluster: str) -> str:
        """System identifier that a cluster name is tied to, as text.

        Raises `ObjectMissingError` or `CorruptObjectError`.
        """
        name = cluster_document(cluster)
        body, _ = unseal(name, self.store.get(name), self.key)
        return str(body.get("system_identifier"))

    # -- backups --------------------------------------------------------------------------------

    def manifest(self, cluster: str, backup: BackupId) -> tuple[Manifest, str]:
        """A manifest and its hash; `ObjectMissingError`, `CorruptObjectError`."""
        name = manifest_name(check_cluster_name(cluster), backup)
        body, digest = unseal(name, self.store.get(name), self.key)
        if body.get(REVOKED) is True:
            raise RevokedError(f"{name}: the backup was revoked before it was committed")
        manifest = from_body(name, body)
        if manifest.backup_id != backup or manifest.cluster != cluster:
            raise CorruptObjectError(f"{name}: holds the manifest of another backup")
        return manifest, digest

    def clusters(self) -> list[str]:
        """Names of the clusters under which anything was committed or revoked."""
        names = (name.split("/")[1] for name in self.store.list(MANIFESTS))
        return sorted(set(names))

    def taken_ids(self, cluster: str) -> list[BackupId]:
        """Ids that are in use, in order: of committed backups, readable or not, and of revoked."""
        prefix = f"{MANIFESTS}{check_cluster_name(cluster)}/"
        return [
            BackupId(name.removeprefix(prefix).removesuffix(".json"))
            for name in self.store.list(prefix)
        ]

    def backup_ids(self, cluster: str) -> list[BackupId]:
        """The committed backups of a cluster, oldest first; their manifests may be damaged."""
        return sorted(chain.from_iterable(self.readable_manifests(cluster)))

    def manifests(self, cluster: str) -> dict[BackupId, Manifest]:
        """All committed backups of a cluster, oldest first; raises what any of them cannot be read
        for.
        """
        found, unreadable = self.readable_manifests(cluster)
        for error in unreadable.values():
            raise error
        return found

    def readable_manifests(
        self, cluster: str
    ) -> tuple[dict[BackupId, Manifest], dict[BackupId, RepositoryError]]:
        """All committed backups of a cluster, oldest first, and why others cannot be read.

        Damage to one backup must neither hide the others nor keep new ones from being taken.
        """
        found: dict[BackupId, Manifest] = {}
        unreadable: dict[BackupId, RepositoryError] = {}

        def read(backup: BackupId) -> Manifest | RepositoryError | None:
            try:
                return self.manifest(cluster, backup)[0]
            except ObjectMissingError:
                return None  # a tombstone, or an expiry has removed it since it was listed
            except (CorruptObjectError, FormatVersionError) as error:
                return error

        ids = self.taken_ids(cluster)
        # Where every answer takes its time hundreds of backups would be read for seconds.
        for backup, outcome in in_order(read, ids, threads=_READERS, name="manifests"):
            if isinstance(outcome, Manifest):
                found[backup] = outcome
            elif outcome is not None:
                unreadable[backup] = outcome
        return found, unreadable

    def check_chain(self, members: list[Manifest]) -> list[str]:
        """The manifests' hashes, after proving that each names its baseline's.

        Raises `BrokenChainError` when a baseline was replaced since its dependent was taken.
        """
        hashes = [self.manifest(m.cluster, m.backup_id)[1] for m in members]
        check_hashes(members, hashes)
        return hashes

    def commit(self, manifest: Manifest) -> str:
        """Write the manifest: from now on the backup exists. Gives the manifest's hash.

        Raises `LockedError` when the backup was revoked.
        """
        name = manifest_name(manifest.cluster, manifest.backup_id)
        data = seal(to_body(manifest), self.key)
        try:
            self.store.put_new(name, [data])
        except ObjectExistsError:
            if self.is_revoked(manifest.cluster, manifest.backup_id):
                raise LockedError(
                    f"backup {manifest.backup_id} cannot be committed: another run has taken this"
                    " one for dead and revoked it",
                    hint="It was stopped or cut off from the repository for too long: run it"
                    " again.",
                ) from None
            raise
        return unseal(name, data, self.key)[1]

    def revoke(self, cluster: str, backup: BackupId) -> None:
        """Keep a backup from ever being committed; nothing happens if it is already."""
        body = {
            REVOKED: True,
            "backup_id": backup,
            "cluster": cluster,
            "at": datetime.now(UTC).isoformat(),
        }
        with suppress(ObjectExistsError):
            self.documents.put(manifest_name(check_cluster_name(cluster), backup), body)

    def is_revoked(self, cluster: str, backup: BackupId) -> bool:
        """Is there a tombstone in the place of this backup's manifest?"""
        try:
            self.manifest(cluster, backup)
        except RevokedError:
            return True
        return False

    def locks(self, processes: Processes, timing: LockTiming | None = None) -> Locks:
        return Locks(self.documents, processes, self.revoke, timing, stored_name=self.stored_name)

    def stored_name(self, name: str) -> str:
        """Under which name a person finds an object in the store."""
        return name if self.vault is None else self.vault.store.stored_name(name)

    def tables(self, manifest: Manifest) -> TableReader:
        root = manifest.root
        return TableReader(self.frames, PackRef(PackId(root.pack), root.size, root.footer))

    def tidy_index(self, cancelled: Cancelled) -> None:
        """Keep the content index quick, now that a backup is committed; raises nothing."""
        tidy(self.store, self.key, cancelled)

    def writer(self, compression_level: int) -> FrameWriter:
        """To be made by a run that holds its lock already: see `condemned`."""
        avoid = {p for s in self.condemned.load() for p in s.packs | s.rewritten}
        # Of a pack with a husk not every frame is there any more.
        avoid |= husked_packs(self.store)
        return FrameWriter(
            self.store, self.key, self.frames, compression_level, avoid, self._condemned_packs
        )

    def _condemned_packs(self) -> set[PackId]:
        confirmed = [s for s in self.condemned.load() if s.confirmed_at is not None]
        return {pack for sentence in confirmed for pack in sentence.packs}

    def condemned_backups(self, cluster: str) -> set[BackupId]:
        """Backups that are being removed: nothing may be built on them any more."""
        return {b for s in self.condemned.load() for name, b in s.backups if name == cluster}
