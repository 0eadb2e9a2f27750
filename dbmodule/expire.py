"""Removal of backups: what retention has decided, carried out.

A backup exists exactly when its manifest does, so its manifest is what goes. Invariant: a backup
never loses what it is built on, however this run ends: dependents go first, and nothing goes when
one that stays needs one that goes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from dbmodule.chain import dependents_of
from dbmodule.errors import CancelledError, RefusedError
from dbmodule.ident import BackupId
from dbmodule.manifest import Manifest
from dbmodule.ports import Cancelled, Progress
from dbmodule.repository.holds import read_holds
from dbmodule.repository.repository import Repository, manifest_name


@dataclass(frozen=True, slots=True)
class ExpireReport:
    removed: list[str] = field(default_factory=list)
    """Backups that are gone, in the order in which they went."""


def expire(
    repository: Repository,
    cluster: str,
    remove: Collection[BackupId],
    *,
    now: datetime,
    progress: Progress,
    cancelled: Cancelled,
) -> ExpireReport:
    """Remove these backups.

    Raises `RefusedError` when one that stays is built on one of them, or when one of them was held
    since it was decided.
    """
    manifests, unreadable = repository.readable_manifests(cluster)
    if remove and unreadable:
        raise RefusedError(
            f"the manifest of backup {min(unreadable)} cannot be read, and it may be built on one"
            " of those that are to be removed",
            hint="`dbmodule verify` says what is wrong with it.",
        )
    order = _dependents_first(manifests, remove)
    held = [hold.backup_id for hold in read_holds(repository, cluster) if hold.in_force(now)]
    for backup in order:
        if backup in held:
            raise RefusedError(
                f"backup {backup} is not removed: it is held", hint="Run `dbmodule expire` again."
            )
    removed: list[str] = []
    for backup in order:
        if cancelled():
            raise CancelledError(
                f"expire was cancelled; {len(removed)} of {len(order)} backups were removed",
                hint="What is left is whole. Run it again to go on.",
            )
        repository.store.delete(manifest_name(cluster, backup))
        removed.append(backup)
        progress("remove", len(removed), len(order))
    return ExpireReport(removed)


def _dependents_first(
    manifests: Mapping[BackupId, Manifest], remove: Collection[BackupId]
) -> list[BackupId]:
    depths: dict[BackupId, int] = {}
    for backup in remove:
        if backup not in manifests:
            continue
        dependents = dependents_of(manifests, backup)
        staying = [dependent for dependent in dependents if dependent not in remove]
        if staying:
            raise RefusedError(
                f"backup {backup} is not removed: {staying[0]}, which stays, is built on it",
                hint="Remove both, or keep both.",
            )
        depths[backup] = len(dependents)
    return sorted(depths, key=lambda backup: (depths[backup], backup))
