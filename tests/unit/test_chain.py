"""Chains: which backups a backup needs, and which one a new one builds on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.chain import chain_of, choose_baseline, dependents_of, newest
from dbmodule.errors import BrokenChainError, NoBaselineError
from dbmodule.ident import BackupId, BackupType
from dbmodule.manifest import Manifest
from tests.unit.strategies import backup_id, manifest, quick

FULL, DIFF, INCR = BackupType.FULL, BackupType.DIFF, BackupType.INCR
Backups = dict[BackupId, Manifest]


def collection(*members: Manifest) -> Backups:
    return {member.backup_id: member for member in members}


@pytest.fixture
def backups() -> Backups:
    """Two fulls; a diff and two incrs on the first, an incr on the second."""
    first = manifest(1)
    diff = manifest(2, DIFF, first.backup_id)
    incr = manifest(3, INCR, diff.backup_id)
    last = manifest(4, INCR, incr.backup_id)
    second = manifest(5)
    return collection(first, diff, incr, last, second, manifest(6, INCR, second.backup_id))


def test_a_chain_runs_from_the_full_down(backups: Backups) -> None:
    chain = chain_of(backups, backup_id(4, INCR))
    assert [m.backup_id for m in chain] == [
        backup_id(1, FULL),
        backup_id(2, DIFF),
        backup_id(3, INCR),
        backup_id(4, INCR),
    ]
    assert [m.backup_id for m in chain_of(backups, backup_id(5, FULL))] == [backup_id(5, FULL)]


def test_a_missing_member_is_named_with_who_needs_it(backups: Backups) -> None:
    del backups[backup_id(2, DIFF)]
    message = f"{backup_id(2, DIFF)}, which {backup_id(3, INCR)} depends on"
    with pytest.raises(BrokenChainError, match=message):
        chain_of(backups, backup_id(4, INCR))
    with pytest.raises(BrokenChainError, match="is not in the repository"):
        chain_of(backups, backup_id(2, DIFF))


def test_a_circle_is_refused(backups: Backups) -> None:
    diff = backups[backup_id(2, DIFF)]
    backups[diff.backup_id] = replace(diff, baseline_id=backup_id(4, INCR))
    with pytest.raises(BrokenChainError, match="circle"):
        chain_of(backups, backup_id(3, INCR))
    itself = manifest(9, INCR, backup_id(9, INCR))
    with pytest.raises(BrokenChainError, match="circle"):
        chain_of(collection(itself), itself.backup_id)
    assert dependents_of(backups, backup_id(3, INCR)) == [backup_id(2, DIFF), backup_id(4, INCR)]


def test_a_chain_begins_with_a_full() -> None:
    stray = manifest(1, DIFF, None)
    with pytest.raises(BrokenChainError, match="does not begin with a full"):
        chain_of(collection(stray), stray.backup_id)


def test_dependents_are_found_at_any_depth(backups: Backups) -> None:
    assert dependents_of(backups, backup_id(1, FULL)) == [
        backup_id(2, DIFF),
        backup_id(3, INCR),
        backup_id(4, INCR),
    ]
    assert dependents_of(backups, backup_id(4, INCR)) == []


def test_dependents_are_found_though_the_clock_was_set_back() -> None:
    full = manifest(5)
    diff = manifest(4, DIFF, full.backup_id)
    incr = manifest(3, INCR, diff.backup_id)
    last = manifest(2, INCR, incr.backup_id)
    backups = collection(full, diff, incr, last)
    expected = sorted([diff.backup_id, incr.backup_id, last.backup_id])
    assert dependents_of(backups, full.backup_id) == expected


@quick(100)
@given(st.lists(st.integers(0, 30), max_size=12), st.permutations(range(13)))
def test_dependents_are_those_whose_chain_holds_it(parents: list[int], order: list[int]) -> None:
    members = [manifest(order[0])]
    for number, parent in enumerate(parents, start=1):
        members.append(manifest(order[number], INCR, members[parent % number].backup_id))
    backups = collection(*members)
    for member in members:
        needing = [
            other.backup_id
            for other in members
            if other is not member and member in chain_of(backups, other.backup_id)
        ]
        assert dependents_of(backups, member.backup_id) == sorted(needing)


def test_what_each_type_builds_on(backups: Backups) -> None:
    assert choose_baseline(backups, DIFF, None) is backups[backup_id(5, FULL)]
    assert choose_baseline(backups, INCR, None) is backups[backup_id(6, INCR)]


def test_a_pinned_baseline_wins(backups: Backups) -> None:
    for kind in (DIFF, INCR):
        pinned = choose_baseline(backups, kind, backup_id(3, INCR))
        assert pinned is backups[backup_id(3, INCR)]
        with pytest.raises(NoBaselineError, match="is not in the repository"):
            choose_baseline(backups, kind, backup_id(77, FULL))


@pytest.mark.parametrize("kind", [DIFF, INCR])
def test_without_a_backup_there_is_no_baseline(kind: BackupType) -> None:
    with pytest.raises(NoBaselineError, match=f"that a {kind} backup could build on"):
        choose_baseline({}, kind, None)


def test_a_diff_needs_a_full() -> None:
    stray = manifest(2, INCR, backup_id(1, FULL))
    with pytest.raises(NoBaselineError):
        choose_baseline(collection(stray), DIFF, None)
    assert choose_baseline(collection(stray), INCR, None) is stray


def test_the_newest_is_the_one_that_finished_last() -> None:
    early, late = manifest(1), manifest(2)
    slow = replace(early, finished_at=late.finished_at.replace(year=2027))
    assert newest([slow, late]) is slow
    assert newest([]) is None
