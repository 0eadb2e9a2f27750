"""Retention: which backups stay, which go, and why. Pure: values and a moment in, decisions out.

Rules only ever add to what is kept, so no two of them can contradict each other. Invariants, each a
property test: the baseline of a kept backup is kept; a held backup is kept; the newest backup is
kept; a later moment or a smaller number never keeps more; what is left after a plan was carried
out is what the same plan keeps.

A backup with corrupt pages, or one that cannot be restored, never takes the place of a sound one:
every rule is applied to the sound ones alone, then once more to all that can be restored, then to
all. So what is not sound is kept beside the others for as long as it would be if it were, and no
longer.

*Newest* goes by when a backup finished, as it does for the choice of a baseline: that is the
moment whose state it holds, also of a full that was made of a chain. Where a clock was set back,
the one that was taken last is another, and it is kept too.

Archived WAL has the same two reasons to stay: a kept backup (`Decision.keep`) that replays it, and
the window (`recovery_window`), which its anchor opens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, tzinfo

from dbmodule.chain import chain_of, dependents_of, newest
from dbmodule.errors import BrokenChainError
from dbmodule.ident import BackupId, BackupType
from dbmodule.manifest import COMPLETED, Manifest

NOT_KEPT = "no rule keeps it"
NO_POLICY = "no retention policy is configured"


@dataclass(frozen=True, slots=True)
class Policy:
    """How much to keep; None = the rule is not used. Numbers are at least 1."""

    keep_last: int | None = None
    """Newest backups of any type."""
    keep_chains: int | None = None
    """Newest fulls, each with everything that is built on it."""
    keep_days: int | None = None
    """Backups of the last days of 24 hours, and the newest one before them."""
    keep_daily: int | None = None
    """The newest backup of each of the last days that have one; and so on."""
    keep_weekly: int | None = None
    keep_monthly: int | None = None
    keep_yearly: int | None = None
    zone: tzinfo = UTC
    """Whose midnight ends a day; weeks are those of ISO 8601 and begin on Monday."""

    def rules(self) -> dict[str, int]:
        """The rules that are used, by name."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "zone"}
        return {name: number for name, number in numbers.items() if number is not None}


@dataclass(frozen=True, slots=True)
class Hold:
    """A backup that must stay, whatever the policy says."""

    backup_id: BackupId
    keep_until: datetime | None
    """None = until it is released."""

    def in_force(self, now: datetime) -> bool:
        return self.keep_until is None or self.keep_until > now


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one backup; there is always a reason."""

    backup_id: BackupId
    keep: bool
    reasons: tuple[str, ...]


Kept = Iterator[tuple[BackupId, str]]
Rule = Callable[[Sequence[Manifest], Mapping[BackupId, Manifest], Policy, datetime], Kept]
"""(the backups that count, newest first; all backups; policy; now) → what to keep, and why."""


def plan(
    manifests: Mapping[BackupId, Manifest],
    holds: Iterable[Hold],
    policy: Policy,
    now: datetime,
    damaged: Mapping[BackupId, str] | None = None,
) -> list[Decision]:
    """Keep or remove, for every backup, by id.

    `damaged` says why a backup cannot be restored although its manifest may be there. One that is
    not among `manifests` cannot be read, and nobody knows what it builds on: as long as there is
    one, nothing is removed.
    """
    damaged = damaged or {}
    reasons: dict[BackupId, list[str]] = {backup: [] for backup in {*manifests, *damaged}}
    for hold in holds:
        if hold.backup_id in reasons and hold.in_force(now):
            until = "" if hold.keep_until is None else f" until {hold.keep_until.isoformat()}"
            _add(reasons, hold.backup_id, f"held{until}")
    unreadable = sorted(damaged.keys() - manifests.keys())
    if unreadable or not policy.rules():
        for backup, why in reasons.items():
            if backup in unreadable:
                why.append(f"its manifest cannot be read: {damaged[backup]}")
            elif unreadable:
                why.append(f"{unreadable[0]} cannot be read, and may be built on it")
            else:
                why.append(NO_POLICY)
        return [Decision(backup, True, tuple(reasons[backup])) for backup in sorted(reasons)]

    flaws = _flaws(manifests, damaged)
    flawed = {m.backup_id: flaws.get(m.backup_id, "") for m in manifests.values()}
    pools = [
        [manifests[backup] for backup, flaw in flawed.items() if not flaw],
        [manifests[backup] for backup, flaw in flawed.items() if flaw in ("", _CORRUPT_PAGES)],
        list(manifests.values()),
    ]
    for pool, name in zip(pools, _NEWEST, strict=True):
        for backup, reason in _newest(pool, name):
            _add(reasons, backup, reason)
        ordered = sorted(pool, key=lambda m: (m.finished_at, m.backup_id), reverse=True)
        for rule in _RULES:
            for backup, reason in rule(ordered, manifests, policy, now):
                _add(reasons, backup, reason)
    _keep_baselines(manifests, reasons)
    return [
        Decision(backup, bool(why), (*(why or [NOT_KEPT]), *_flaw(flaws, backup)))
        for backup, why in sorted(reasons.items())
    ]


def recovery_window(policy: Policy, now: datetime) -> datetime | None:
    """The earliest moment that has to be recoverable; None where the policy names none."""
    return None if policy.keep_days is None else now - timedelta(days=policy.keep_days)


# -- what counts -----------------------------------------------------------------------------------

_CORRUPT_PAGES = "corrupt pages"
_NEWEST = (
    "the newest sound backup",
    "the newest backup that can be restored",
    "the newest backup",
)


def _flaws(
    manifests: Mapping[BackupId, Manifest], damaged: Mapping[BackupId, str]
) -> dict[BackupId, str]:
    """Why backups do not count; those that do are not listed."""
    below: dict[BackupId | None, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        below[manifest.baseline_id].append(manifest)
    flaws: dict[BackupId, str] = {}
    whole: set[BackupId] = set()
    waiting = [(m, "") for m in below[None] if m.type is BackupType.FULL]
    while waiting:
        manifest, inherited = waiting.pop()
        # A page that was corrupt in the baseline may have been mended since, or not read again.
        own = "" if manifest.status == COMPLETED else _CORRUPT_PAGES
        flaw = damaged.get(manifest.backup_id) or inherited or own
        if flaw:
            flaws[manifest.backup_id] = flaw
        whole.add(manifest.backup_id)
        waiting += [(m, flaw) for m in below[manifest.backup_id]]
    for backup in manifests.keys() - whole:
        try:
            chain_of(manifests, backup)
        except BrokenChainError as error:
            flaws[backup] = error.message
    return flaws


def _flaw(flaws: Mapping[BackupId, str], backup: BackupId) -> Iterator[str]:
    if backup in flaws:
        yield f"does not count: {flaws[backup]}"


def _newest(pool: Sequence[Manifest], name: str) -> Kept:
    """What is kept under every policy."""
    latest = newest(pool)
    if latest is not None:
        yield latest.backup_id, name
        last = max(m.backup_id for m in pool)
        if last != latest.backup_id:
            yield last, f"{name}, by when it was taken"


# -- rules -----------------------------------------------------------------------------------------


def _last(
    pool: Sequence[Manifest],
    manifests: Mapping[BackupId, Manifest],
    policy: Policy,
    now: datetime,
) -> Kept:
    for manifest in pool[: policy.keep_last or 0]:
        yield manifest.backup_id, f"keep_last = {policy.keep_last}"


def _chains(
    pool: Sequence[Manifest],
    manifests: Mapping[BackupId, Manifest],
    policy: Policy,
    now: datetime,
) -> Kept:
    fulls = [m for m in pool if m.type is BackupType.FULL]
    for full in fulls[: policy.keep_chains or 0]:
        for backup in (full.backup_id, *dependents_of(manifests, full.backup_id)):
            yield backup, f"keep_chains = {policy.keep_chains}: chain of {full.backup_id}"


def _days(
    pool: Sequence[Manifest],
    manifests: Mapping[BackupId, Manifest],
    policy: Policy,
    now: datetime,
) -> Kept:
    start = recovery_window(policy, now)
    if start is None:
        return
    for manifest in pool:
        if manifest.finished_at <= start:
            yield manifest.backup_id, f"keep_days = {policy.keep_days}: opens the window"
            return
        yield manifest.backup_id, f"keep_days = {policy.keep_days}"


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"


def _week(moment: datetime) -> str:
    year, week, _ = moment.isocalendar()
    return f"{year:04}-W{week:02}"


def _month(moment: datetime) -> str:
    return f"{moment:%Y-%m}"


def _year(moment: datetime) -> str:
    return f"{moment:%Y}"


def _periodic(rule: str, period_of: Callable[[datetime], str]) -> Rule:
    """The newest backup of each of the last periods in which one finished."""

    def keep(
        pool: Sequence[Manifest],
        manifests: Mapping[BackupId, Manifest],
        policy: Policy,
        now: datetime,
    ) -> Kept:
        count: int = getattr(policy, rule) or 0
        newest_of: dict[str, BackupId] = {}
        for manifest in pool:
            newest_of.setdefault(
                period_of(manifest.finished_at.astimezone(policy.zone)), manifest.backup_id
            )
        for period, backup in list(newest_of.items())[:count]:
            yield backup, f"{rule} = {count}: {period}"

    return keep


_RULES: tuple[Rule, ...] = (
    _last,
    _chains,
    _days,
    _periodic("keep_daily", _day),
    _periodic("keep_weekly", _week),
    _periodic("keep_monthly", _month),
    _periodic("keep_yearly", _year),
)


# -- chains stay whole -----------------------------------------------------------------------------


def _keep_baselines(
    manifests: Mapping[BackupId, Manifest], reasons: dict[BackupId, list[str]]
) -> None:
    """Keep what kept backups are built on, also where the chain is broken further up."""
    needed_by: dict[BackupId, list[BackupId]] = defaultdict(list)
    waiting = sorted(backup for backup, why in reasons.items() if why)
    seen = set(waiting)
    while waiting:
        backup = waiting.pop()
        manifest = manifests.get(backup)
        baseline = None if manifest is None else manifest.baseline_id
        if baseline not in manifests or baseline is None:
            continue
        needed_by[baseline].append(backup)
        if baseline not in seen:
            seen.add(baseline)
            waiting.append(baseline)
    for baseline, dependents in needed_by.items():
        others = f" and {len(dependents) - 1} more" if len(dependents) > 1 else ""
        reasons[baseline].append(f"baseline of {min(dependents)}{others}")


def _add(reasons: dict[BackupId, list[str]], backup: BackupId, why: str) -> None:
    if why not in reasons[backup]:
        reasons[backup].append(why)
