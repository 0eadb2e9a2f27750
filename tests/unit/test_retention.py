"""The retention plan: its invariants over histories of every shape, and its rules by example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.chain import chain_of
from dbmodule.errors import BrokenChainError
from dbmodule.ident import BackupId, BackupType
from dbmodule.manifest import Manifest
from dbmodule.retention import NO_POLICY, NOT_KEPT, Decision, Hold, Policy, plan, recovery_window
from tests.unit.strategies import backup_id, manifest, quick

FULL, DIFF, INCR = BackupType.FULL, BackupType.DIFF, BackupType.INCR
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULES = [f.name for f in dataclasses.fields(Policy) if f.name != "zone"]
Backups = dict[BackupId, Manifest]


def kept(decisions: list[Decision]) -> set[BackupId]:
    return {d.backup_id for d in decisions if d.keep}


def reasons(decisions: list[Decision]) -> dict[BackupId, tuple[str, ...]]:
    return {d.backup_id: d.reasons for d in decisions}


def collection(*members: Manifest) -> Backups:
    return {member.backup_id: member for member in members}


def whole(backups: Mapping[BackupId, Manifest], backup: BackupId) -> list[Manifest] | None:
    try:
        return chain_of(backups, backup)
    except BrokenChainError:
        return None


def sound_ones(backups: Backups, damaged: Mapping[BackupId, str]) -> list[Manifest]:
    """Those whose chain is whole, undamaged and without corrupt pages; newest first."""
    found = []
    for backup, member in backups.items():
        chain = whole(backups, backup)
        if chain and all(m.status == "completed" and m.backup_id not in damaged for m in chain):
            found.append(member)
    return sorted(found, key=lambda m: (m.finished_at, m.backup_id), reverse=True)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Backups, dict[BackupId, str]]:
    """Backups on random baselines at random moments; some corrupt, damaged, or gone."""
    made: list[Manifest] = []
    for number in range(1, draw(st.integers(1, 14)) + 1):
        kind = draw(st.sampled_from([FULL, DIFF, INCR, INCR])) if made else FULL
        finished = NOW - timedelta(hours=draw(st.integers(-10, 24 * 500)))
        made.append(
            manifest(
                number,
                kind,
                None if kind is FULL else draw(st.sampled_from(made)).backup_id,
                finished_at=finished,
                status=draw(st.sampled_from(["completed"] * 4 + ["completed_with_corruption"])),
            )
        )
    gone = draw(st.sets(st.sampled_from([m.backup_id for m in made]), max_size=2))
    backups = collection(*(m for m in made if m.backup_id not in gone))
    if not backups:
        backups = collection(made[0])
    damaged = draw(st.sets(st.sampled_from(sorted(backups)), max_size=2))
    return backups, dict.fromkeys(damaged, "its baseline was replaced")


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """At least one rule, in any zone."""
    rules = draw(st.dictionaries(st.sampled_from(RULES), st.integers(1, 6), min_size=1))
    zone = draw(st.sampled_from([UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("Pacific/Kiritimati")]))
    return Policy(**rules, zone=zone)


@st.composite
def holds_on(draw: st.DrawFn, backups: Backups) -> list[Hold]:
    until = st.none() | st.integers(-50, 50).map(lambda days: NOW + timedelta(days=days))
    return draw(st.lists(st.builds(Hold, st.sampled_from(sorted(backups)), until), max_size=3))


Case = tuple[Backups, dict[BackupId, str], list[Hold], Policy]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    backups, damaged = draw(histories())
    return backups, damaged, draw(holds_on(backups)), draw(policies())


@quick(100)
@given(cases())
def test_every_backup_gets_one_decision_with_reasons(case: Case) -> None:
    backups, damaged, holds, policy = case
    decisions = plan(backups, holds, policy, NOW, damaged)
    assert [d.backup_id for d in decisions] == sorted(backups)
    for decision in decisions:
        assert decision.reasons
        assert (NOT_KEPT in decision.reasons) != decision.keep


@quick(100)
@given(cases())
def test_what_a_kept_backup_is_built_on_is_kept(case: Case) -> None:
    backups, damaged, holds, policy = case
    decisions = plan(backups, holds, policy, NOW, damaged)
    chosen, why = kept(decisions), reasons(decisions)
    for backup in chosen:
        baseline = backups[backup].baseline_id
        if baseline in backups and baseline is not None:
            assert baseline in chosen
            assert any(reason.startswith("baseline of ") for reason in why[baseline])
        # Whatever could be restored before and is kept can be restored after.
        if (chain := whole(backups, backup)) is not None:
            assert {m.backup_id for m in chain} <= chosen


@quick(100)
@given(cases())
def test_a_held_backup_stays_with_its_chain_until_its_moment(case: Case) -> None:
    backups, damaged, holds, policy = case
    chosen = kept(plan(backups, holds, policy, NOW, damaged))
    without = kept(plan(backups, [], policy, NOW, damaged))
    in_force = [h.backup_id for h in holds if h.keep_until is None or h.keep_until > NOW]
    assert set(in_force) <= chosen
    extra = set(in_force)
    for backup in in_force:
        baseline = backups[backup].baseline_id
        while baseline is not None and baseline in backups:
            extra.add(baseline)
            baseline = backups[baseline].baseline_id
    assert chosen == without | extra, "a hold that is over keeps nothing, one in force no more"


@quick(100)
@given(cases())
def test_the_newest_sound_chain_stays(case: Case) -> None:
    backups, damaged, holds, policy = case
    chosen = kept(plan(backups, holds, policy, NOW, damaged))
    sound = sound_ones(backups, damaged)
    if sound:
        assert {m.backup_id for m in chain_of(backups, sound[0].backup_id)} <= chosen
        assert max(m.backup_id for m in sound) in chosen
    restorable = [b for b in backups if (c := whole(backups, b)) and not damaged.keys() & {
        m.backup_id for m in c}]  # fmt: skip
    if restorable:
        newest = max(restorable, key=lambda b: (backups[b].finished_at, b))
        assert newest in chosen, "with corrupt pages, but nothing newer is there"


@quick(100)
@given(cases())
def test_as_many_sound_backups_are_kept_as_were_asked_for(case: Case) -> None:
    """Each rule looked at from outside, over the sound backups alone."""
    backups, damaged, holds, policy = case
    chosen = kept(plan(backups, holds, policy, NOW, damaged))
    sound = sound_ones(backups, damaged)
    ids = [m.backup_id for m in sound]
    assert set(ids[: policy.keep_last or 0]) <= chosen
    fulls = [m.backup_id for m in sound if m.type is FULL][: policy.keep_chains or 0]
    for backup in backups:
        chain = whole(backups, backup)
        if chain and chain[0].backup_id in fulls:
            assert backup in chosen
    if (start := recovery_window(policy, NOW)) is not None:
        assert {b for b, m in backups.items() if m.finished_at > start} <= chosen
        before = [m.backup_id for m in sound if m.finished_at <= start]
        assert set(before[:1]) <= chosen
    for name, shape in PERIODS.items():
        seen: dict[str, BackupId] = {}
        for member in sound:
            seen.setdefault(shape(member.finished_at.astimezone(policy.zone)), member.backup_id)
        assert set(list(seen.values())[: getattr(policy, name) or 0]) <= chosen


PERIODS: dict[str, Callable[[datetime], str]] = {
    "keep_daily": lambda at: at.strftime("%Y %j"),
    "keep_weekly": lambda at: at.strftime("%G %V"),
    "keep_monthly": lambda at: at.strftime("%Y %m"),
    "keep_yearly": lambda at: at.strftime("%Y"),
}


@quick(100)
@given(st.lists(st.integers(0, 24 * 900), min_size=1, max_size=40), policies())
def test_of_sound_fulls_exactly_those_are_kept_that_were_asked_for(
    ages: list[int], policy: Policy
) -> None:
    backups = collection(
        *(
            manifest(number, finished_at=NOW - timedelta(hours=age))
            for number, age in enumerate(sorted(ages, reverse=True), 1)
        )
    )
    ordered = sorted(backups.values(), key=lambda m: (m.finished_at, m.backup_id), reverse=True)
    expected = {ordered[0].backup_id}
    for count in (policy.keep_last, policy.keep_chains):
        expected |= {m.backup_id for m in ordered[: count or 0]}
    if policy.keep_days is not None:
        start = NOW - timedelta(days=policy.keep_days)
        expected |= {m.backup_id for m in ordered if m.finished_at > start}
        expected |= {m.backup_id for m in [m for m in ordered if m.finished_at <= start][:1]}
    for name, shape in PERIODS.items():
        seen: dict[str, BackupId] = {}
        for member in ordered:
            seen.setdefault(shape(member.finished_at.astimezone(policy.zone)), member.backup_id)
        expected |= set(list(seen.values())[: getattr(policy, name) or 0])
    assert kept(plan(backups, [], policy, NOW)) == expected


@quick(100)
@given(cases(), st.integers(0, 24 * 600))
def test_a_later_moment_never_keeps_more(case: Case, hours: int) -> None:
    backups, damaged, holds, policy = case
    later = kept(plan(backups, holds, policy, NOW + timedelta(hours=hours), damaged))
    assert later <= kept(plan(backups, holds, policy, NOW, damaged))


@quick(100)
@given(cases(), st.data())
def test_a_smaller_policy_never_keeps_more(case: Case, data: st.DataObject) -> None:
    backups, damaged, holds, policy = case
    smaller = {
        name: data.draw(st.integers(1, number) | st.none())
        for name, number in policy.rules().items()
    }
    if not any(smaller.values()):
        name = min(smaller)
        smaller[name] = policy.rules()[name]
    less = Policy(**smaller, zone=policy.zone)
    assert kept(plan(backups, holds, less, NOW, damaged)) <= kept(
        plan(backups, holds, policy, NOW, damaged)
    )


@quick(100)
@given(cases())
def test_what_is_left_is_what_the_same_plan_keeps(case: Case) -> None:
    backups, damaged, holds, policy = case
    left = kept(plan(backups, holds, policy, NOW, damaged))
    again = plan(
        {b: m for b, m in backups.items() if b in left},
        [h for h in holds if h.backup_id in left],
        policy,
        NOW,
        {b: why for b, why in damaged.items() if b in left},
    )
    assert kept(again) == left


@quick(100)
@given(cases())
def test_without_a_policy_or_with_an_unreadable_manifest_nothing_goes(case: Case) -> None:
    backups, damaged, holds, policy = case
    decisions = plan(backups, holds, Policy(), NOW, damaged)
    assert kept(decisions) == set(backups)
    assert all(NO_POLICY in d.reasons for d in decisions)
    lost = BackupId("20260131-999999-incr-ffffff")
    decisions = plan(backups, holds, policy, NOW, {**damaged, lost: "its bytes are off"})
    assert kept(decisions) == {*backups, lost}
    assert reasons(decisions)[lost] == ("its manifest cannot be read: its bytes are off",)
    assert all(
        f"{lost} cannot be read, and may be built on it" in d.reasons
        for d in decisions
        if d.backup_id != lost
    )


def days_ago(number: int, days: float, kind: BackupType = FULL, **more: object) -> Manifest:
    return manifest(number, kind, finished_at=NOW - timedelta(days=days), **more)  # type: ignore[arg-type]


def test_chains_are_counted_by_their_fulls_and_kept_whole() -> None:
    old = days_ago(1, 30)
    branch = days_ago(2, 29, DIFF, baseline=old.backup_id)
    tip = days_ago(3, 28, INCR, baseline=branch.backup_id)
    new = days_ago(4, 20)
    late = days_ago(5, 1, INCR, baseline=tip.backup_id)
    last = days_ago(6, 0.5, DIFF, baseline=new.backup_id)
    backups = collection(old, branch, tip, new, late, last)
    decisions = plan(backups, [], Policy(keep_chains=1), NOW)
    assert kept(decisions) == {new.backup_id, last.backup_id}
    assert reasons(decisions)[new.backup_id] == (
        f"keep_chains = 1: chain of {new.backup_id}",
        f"baseline of {last.backup_id}",
    )
    assert reasons(decisions)[late.backup_id] == (NOT_KEPT,)
    assert kept(plan(backups, [], Policy(keep_chains=2), NOW)) == set(backups)
    # By backups: the two newest, each with all that it is built on.
    decisions = plan(backups, [], Policy(keep_last=2), NOW)
    assert kept(decisions) == set(backups)
    assert reasons(decisions)[old.backup_id] == (f"baseline of {branch.backup_id}",)


def test_corrupt_and_broken_backups_take_no_place_and_go_with_their_time() -> None:
    good = [days_ago(number, 20 - number) for number in (1, 2, 3)]
    corrupt = [
        days_ago(number, 20 - number, status="completed_with_corruption") for number in (4, 5, 6)
    ]
    gone = backup_id(7, FULL)
    broken = [days_ago(number, 20 - number, INCR, baseline=gone) for number in (8, 9, 10)]
    backups = collection(*good, *corrupt, *broken)
    decisions = plan(backups, [], Policy(keep_last=2), NOW)
    wanted = [*good[1:], *corrupt[1:], *broken[1:]]
    assert kept(decisions) == {m.backup_id for m in wanted}
    why = reasons(decisions)
    assert why[corrupt[2].backup_id] == (
        "the newest backup that can be restored",
        "keep_last = 2",
        "does not count: corrupt pages",
    )
    assert why[broken[1].backup_id][-1].startswith(f"does not count: backup {gone}, which ")
    assert why[corrupt[0].backup_id] == (NOT_KEPT, "does not count: corrupt pages")


def test_a_backup_on_a_corrupt_one_does_not_count() -> None:
    good = days_ago(1, 3)
    corrupt = days_ago(2, 2, status="completed_with_corruption")
    on_it = days_ago(3, 1, INCR, baseline=corrupt.backup_id)
    decisions = plan(collection(good, corrupt, on_it), [], Policy(keep_last=1), NOW)
    assert good.backup_id in kept(decisions)


def test_a_clock_that_was_ahead_does_not_cost_the_newest_backup() -> None:
    ahead = days_ago(1, -4000)
    backups = collection(ahead, days_ago(2, 2), days_ago(3, 1))
    decisions = plan(backups, [], Policy(keep_last=1), NOW)
    assert kept(decisions) == {ahead.backup_id, backup_id(3, FULL)}
    assert reasons(decisions)[backup_id(3, FULL)] == (
        "the newest sound backup, by when it was taken",
        "the newest backup that can be restored, by when it was taken",
        "the newest backup, by when it was taken",
    )


def test_the_window_is_opened_by_the_newest_backup_before_it() -> None:
    policy = Policy(keep_days=7)
    assert recovery_window(policy, NOW) == NOW - timedelta(days=7)
    assert recovery_window(Policy(keep_last=1), NOW) is None
    backups = collection(*(days_ago(n, age) for n, age in enumerate((30, 20, 10, 3), 1)))
    decisions = plan(backups, [], policy, NOW)
    assert kept(decisions) == {backup_id(3, FULL), backup_id(4, FULL)}
    assert reasons(decisions)[backup_id(3, FULL)] == ("keep_days = 7: opens the window",)
    # On the very edge it opens the window itself.
    backups = collection(*(days_ago(n, age) for n, age in enumerate((10, 7, 3), 1)))
    assert kept(plan(backups, [], policy, NOW)) == {backup_id(2, FULL), backup_id(3, FULL)}


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("rule", "moments", "zone", "expected"),
    [
        # Midnight is the zone's: 22:30 and 23:30 UTC are two days in Berlin's summer.
        ("keep_daily", ["2026-07-01T21:30", "2026-07-01T22:30"], BERLIN, ["07-01", "07-02"]),
        ("keep_daily", ["2026-07-01T21:30", "2026-07-01T22:30"], UTC, ["07-01"]),
        # In winter an hour later.
        ("keep_daily", ["2026-01-10T22:30", "2026-01-10T23:30"], BERLIN, ["01-10", "01-11"]),
        # The day of 25 hours is one day, with two times 02:30 in it, and ends at 23:00 UTC …
        (
            "keep_daily",
            ["2026-10-24T22:00", "2026-10-25T00:30", "2026-10-25T01:30", "2026-10-25T22:59"],
            BERLIN,
            ["10-25"],
        ),
        ("keep_daily", ["2026-10-25T22:59", "2026-10-25T23:00"], BERLIN, ["10-25", "10-26"]),
        # … and that of 23 hours began at 23:00 UTC and ends at 22:00.
        (
            "keep_daily",
            ["2026-03-28T22:59", "2026-03-28T23:00", "2026-03-29T21:59", "2026-03-29T22:00"],
            BERLIN,
            ["03-28", "03-29", "03-30"],
        ),
        # Weeks are ISO's: from Monday, and the one of New Year's Day belongs to the old year.
        ("keep_weekly", ["2026-12-27T12:00", "2026-12-28T12:00"], UTC, ["W52", "W53"]),
        ("keep_weekly", ["2026-12-28T12:00", "2027-01-03T12:00"], UTC, ["2026-W53"]),
        ("keep_weekly", ["2027-01-03T12:00", "2027-01-03T23:30"], BERLIN, ["2026-W53", "2027-W01"]),
        ("keep_monthly", ["2026-01-31T22:59", "2026-01-31T23:00"], BERLIN, ["01", "02"]),
        ("keep_yearly", ["2026-12-31T22:59", "2026-12-31T23:00"], BERLIN, ["2026", "2027"]),
        ("keep_yearly", ["2026-12-31T22:59", "2026-12-31T23:00"], UTC, ["2026"]),
    ],
)
def test_days_weeks_months_and_years_are_those_of_the_zone(
    rule: str, moments: list[str], zone: ZoneInfo, expected: list[str]
) -> None:
    backups = collection(
        *(
            manifest(number, finished_at=datetime.fromisoformat(moment).replace(tzinfo=UTC))
            for number, moment in enumerate(moments, 1)
        )
    )
    decisions = plan(backups, [], Policy(**{rule: 9}, zone=zone), NOW)
    periods = [
        reason.removeprefix(f"{rule} = 9: ")
        for decision in decisions
        for reason in decision.reasons
        if reason.startswith(rule)
    ]
    assert len(periods) == len(expected)
    for period, ending in zip(periods, expected, strict=True):
        assert period.endswith(ending)


def test_a_long_chain_is_planned_at_once() -> None:
    members = [manifest(1)]
    for number in range(2, 4000):
        members.append(manifest(number, INCR, members[-1].backup_id))
    assert len(kept(plan(collection(*members), [], Policy(keep_last=1), NOW))) == len(members)
