"""Holds: sealed documents that keep a backup beyond retention, each under a name of its own.

    holds/CLUSTER/BACKUP_ID/HOLD_ID.json

As all objects they are written once: another date is another object, which is there before the
earlier ones go. A backup is held as long as one of its holds is in force, so that a crash in
between, or two at a time, can only hold longer. Invariant: a hold that cannot be read holds for
ever.
"""

from __future__ import annotations

import logging
import secrets
from datetime import datetime

from dbmodule.errors import CorruptObjectError, FormatVersionError, ObjectMissingError
from dbmodule.ident import BackupId
from dbmodule.repository.document import FORMAT, seal, unseal
from dbmodule.repository.repository import Repository, check_cluster_name
from dbmodule.retention import Hold

log = logging.getLogger(__name__)

PREFIX = "holds/"


def _folder(cluster: str, backup: BackupId | None = None) -> str:
    folder = f"{PREFIX}{check_cluster_name(cluster)}/"
    return folder if backup is None else f"{folder}{backup}/"


def read_holds(repository: Repository, cluster: str) -> list[Hold]:
    """All holds on backups of a cluster, those whose moment has passed too."""
    found = []
    for name in repository.store.list(_folder(cluster)):
        backup = BackupId(name.split("/")[2])
        try:
            found.append(read_hold(repository, name))
        except ObjectMissingError:
            continue  # released meanwhile
        except (CorruptObjectError, FormatVersionError) as error:
            log.warning("backup %s is taken to be held for ever: %s", backup, error)
            found.append(Hold(backup, None))
    return found


def read_hold(repository: Repository, name: str) -> Hold:
    """The hold called `name`; `CorruptObjectError`, `FormatVersionError`, `ObjectMissingError`."""
    body, _ = unseal(name, repository.store.get(name), repository.key)
    try:
        _, cluster, backup, _ = name.split("/")
        until = body["keep_until"]
        keep_until = None if until is None else datetime.fromisoformat(until)
        if keep_until is not None and keep_until.tzinfo is None:
            raise ValueError("keep_until has no time zone")
        if (body["cluster"], body["backup_id"]) != (cluster, backup):
            raise ValueError("it is the hold of another backup")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptObjectError(f"{name}: not a valid hold: {error}") from error
    return Hold(BackupId(backup), keep_until)


def place_hold(repository: Repository, cluster: str, hold: Hold, now: datetime) -> None:
    """Hold a backup from now on; takes the place of its earlier holds."""
    earlier = list(repository.store.list(_folder(cluster, hold.backup_id)))
    body = {
        "format": FORMAT,
        "cluster": cluster,
        "backup_id": hold.backup_id,
        "keep_until": None if hold.keep_until is None else hold.keep_until.isoformat(),
        "created_at": now.isoformat(),
    }
    name = f"{_folder(cluster, hold.backup_id)}{secrets.token_hex(8)}.json"
    repository.store.put_new(name, [seal(body, repository.key)])
    for other in earlier:
        repository.store.delete(other)


def release_holds(repository: Repository, cluster: str, backup: BackupId) -> int:
    """Remove the holds on a backup; how many there were."""
    names = list(repository.store.list(_folder(cluster, backup)))
    for name in names:
        repository.store.delete(name)
    return len(names)
