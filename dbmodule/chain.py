"""Chains: which backups a backup needs, and which one a new backup builds on. Pure decisions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dbmodule.errors import BrokenChainError, NoBaselineError
from dbmodule.ident import BackupId, BackupType
from dbmodule.manifest import Manifest


def chain_of(backups: Mapping[BackupId, Manifest], backup: BackupId) -> list[Manifest]:
    """The manifests from the full down to `backup`.

    Raises `BrokenChainError` when one is missing, or when dependencies form a circle.
    """
    chain: list[Manifest] = []
    wanted: BackupId | None = backup
    while wanted is not None:
        found = backups.get(wanted)
        if found is None:
            dependent = f", which {chain[-1].backup_id} depends on," if chain else ""
            raise BrokenChainError(
                f"backup {wanted}{dependent} is not in the repository",
                hint="`dbmodule list` shows what is there; restore another backup.",
            )
        if len(chain) > len(backups):
            raise BrokenChainError(f"the dependencies of backup {backup} form a circle")
        chain.append(found)
        wanted = found.baseline_id
    if chain[-1].type is not BackupType.FULL:
        raise BrokenChainError(f"the chain of {backup} does not begin with a full backup")
    return chain[::-1]


def dependents_of(backups: Mapping[BackupId, Manifest], backup: BackupId) -> list[BackupId]:
    """Backups that need `backup`, directly or not, by id."""
    # Ids do not always sort a baseline before its dependents: two may begin within one second,
    # and clocks are set back.
    children: dict[BackupId | None, list[BackupId]] = defaultdict(list)
    for candidate in backups.values():
        children[candidate.baseline_id].append(candidate.backup_id)
    needed: set[BackupId] = set()
    waiting = [backup]
    while waiting:
        fresh = [child for child in children[waiting.pop()] if child not in needed]
        needed.update(fresh)
        waiting.extend(fresh)
    return sorted(needed - {backup})


def newest(backups: Sequence[Manifest]) -> Manifest | None:
    """The backup that finished last."""
    return max(backups, key=lambda m: (m.finished_at, m.backup_id), default=None)


def choose_baseline(
    backups: Mapping[BackupId, Manifest], kind: BackupType, pinned: BackupId | None
) -> Manifest:
    """The backup that a new one of type `kind`, which is no full, builds on.

    ``diff`` builds on the latest full, ``incr`` on the latest backup of any type, `pinned`
    overrides both. Raises `NoBaselineError`.
    """
    if pinned is not None:
        if pinned not in backups:
            raise NoBaselineError(
                f"the baseline {pinned} is not in the repository",
                hint="`dbmodule list` shows the backups that are there.",
            )
        return backups[pinned]
    pool = [m for m in backups.values() if kind is BackupType.INCR or m.type is BackupType.FULL]
    chosen = newest(pool)
    if chosen is None:
        raise NoBaselineError(
            f"there is no backup that a {kind} backup could build on",
            hint="Take a full backup first: dbmodule backup full.",
        )
    return chosen
