"""What `expire` will do and why: the repository's backups and holds, put to the retention planner.

Reads only. Damage is found here as far as manifests show it, since a backup that cannot be
restored must not count; carrying out the plan is `dbmodule.expire`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from dbmodule.errors import (
    CorruptObjectError,
    FormatVersionError,
    ObjectMissingError,
    RefusedError,
    UsageError,
)
from dbmodule.ident import BackupId
from dbmodule.manifest import Manifest
from dbmodule.reports import ExpireReport, RetentionDecision, RetentionReport
from dbmodule.repository.holds import read_holds
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.retention import Decision, Hold, Policy, plan

FOREVER = "forever"
HOW_TO = (
    "Set what to keep in [retention] of the configuration, for example keep_days = 7, keep_weekly ="
    " 4 and keep_monthly = 12; `dbmodule expire --dry-run` shows what that means."
)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True)
class Outlook:
    """The plan for one cluster, and what it was made from."""

    manifests: Mapping[BackupId, Manifest]
    decisions: Sequence[Decision]
    unreadable: Collection[BackupId]

    def removed(self) -> list[BackupId]:
        return [d.backup_id for d in self.decisions if not d.keep]


def look_ahead(repository: Repository, cluster: str, policy: Policy, now: datetime) -> Outlook:
    """Make the plan for the backups of a cluster; raises a `RepositoryError`."""
    manifests: dict[BackupId, Manifest] = {}
    hashes: dict[BackupId, str] = {}
    damaged: dict[BackupId, str] = {}
    for backup in repository.backup_ids(cluster):
        try:
            manifests[backup], hashes[backup] = repository.manifest(cluster, backup)
        except ObjectMissingError:
            continue  # removed meanwhile
        except (CorruptObjectError, FormatVersionError) as error:
            damaged[backup] = error.message
    unreadable = list(damaged)
    for backup, manifest in manifests.items():
        baseline = manifest.baseline_id
        if baseline in hashes and hashes[baseline] != manifest.baseline_hash:
            damaged[backup] = f"{baseline} is not the backup that it was built on"
    decisions = plan(manifests, read_holds(repository, cluster), policy, now, damaged)
    return Outlook(manifests, decisions, unreadable)


def refuse_unreadable(repository: Repository, outlook: Outlook, cluster: str) -> None:
    """Raise `RefusedError` when there is a backup of which nobody knows what it is built on."""
    if outlook.unreadable:
        first = min(outlook.unreadable)
        name = repository.stored_name(manifest_name(cluster, first))
        raise RefusedError(
            f"nothing is removed: the manifest of backup {first} cannot be read, and what it is"
            " built on is not known",
            hint="`dbmodule verify` says what is wrong with it. If it is lost for good, delete the"
            f" object {name} by hand, and run this again.",
        )


def to_report(
    outlook: Outlook, policy: Policy, removal: ExpireReport | None, *, dry_run: bool
) -> RetentionReport:
    """The plan for people and scripts, with what came of it."""
    return RetentionReport(
        dry_run=dry_run,
        policy=policy.rules(),
        decisions=[_decision(d, outlook.manifests.get(d.backup_id)) for d in outlook.decisions],
        removal=removal,
        hint="" if policy.rules() else HOW_TO,
    )


def _decision(decision: Decision, manifest: Manifest | None) -> RetentionDecision:
    return RetentionDecision(
        backup_id=decision.backup_id,
        keep=decision.keep,
        reasons=list(decision.reasons),
        finished_at=None if manifest is None else manifest.finished_at.isoformat(),
    )


def holds_in_force(holds: Iterable[Hold], now: datetime) -> dict[BackupId, str]:
    """Until when each held backup is: ISO 8601 or ``forever``."""
    until: dict[BackupId, datetime | None] = {}
    for hold in holds:
        if hold.in_force(now):
            known = until.get(hold.backup_id, hold.keep_until)
            longest = None
            if known is not None and hold.keep_until is not None:
                longest = max(known, hold.keep_until)
            until[hold.backup_id] = longest
    return {backup: FOREVER if at is None else at.isoformat() for backup, at in until.items()}


def parse_moment(text: str, zone: tzinfo, now: datetime) -> datetime:
    """A moment to come, in ISO 8601; a day means its end, and what has no offset is of `zone`.

    Raises `UsageError`.
    """
    try:
        moment = datetime.fromisoformat(text)
        if _DATE.fullmatch(text):
            moment += timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"not a moment: {text[:80]!r}: {error}",
            hint="Write it as 2027-01-31, 2027-01-31T18:00 or 2027-01-31T18:00+01:00.",
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone)
    if moment <= now:
        raise UsageError(f"{text} has passed", hint="Name a moment to come, or release the backup.")
    return moment
