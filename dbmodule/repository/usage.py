"""What backups need of what is stored: their packs, seen from all manifests."""

from __future__ import annotations

from collections.abc import Iterable

from dbmodule.errors import CorruptObjectError, FormatVersionError, ObjectMissingError
from dbmodule.manifest import Manifest
from dbmodule.repository.pack import PREFIX, PackId
from dbmodule.repository.repository import Repository, manifest_name


def stored_packs(repository: Repository) -> set[PackId]:
    """All packs that are there, needed or not."""
    return {PackId(name.rpartition("/")[2]) for name in repository.store.list(PREFIX)}


def needed_packs(repository: Repository, manifests: Iterable[Manifest]) -> set[PackId]:
    """The packs without which these backups cannot be read.

    Raises `CorruptObjectError` when that cannot be known for one of them.
    """
    needed: set[PackId] = set()
    for manifest in manifests:
        try:
            refs = repository.tables(manifest).packs
        except (CorruptObjectError, FormatVersionError, ObjectMissingError) as error:
            name = manifest_name(manifest.cluster, manifest.backup_id)
            raise CorruptObjectError(f"{name}: its tables cannot be read: {error}") from error
        needed.add(PackId(manifest.root.pack))
        needed.update(ref.pack for ref in refs)
    return needed
