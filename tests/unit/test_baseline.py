"""What a backup may build on: the same cluster, further on along its own history."""

from __future__ import annotations

import dataclasses

import pytest

from dbmodule.backup.baseline import Position, check_cluster, check_history
from dbmodule.errors import NotAnAncestorError, WrongClusterError
from dbmodule.ident import BackupType, Lsn, Timeline
from tests.unit.strategies import manifest

BASELINE = manifest(
    1, BackupType.FULL, None, timeline=Timeline(2), start_lsn=Lsn(0x500), stop_lsn=Lsn(0x700)
)
HERE = Position(
    system_identifier=int(BASELINE.system_identifier),
    major=BASELINE.version_num // 10000,
    catalog_version=BASELINE.catalog_version,
    block_size=BASELINE.block_size,
    data_checksums=True,
    timeline=Timeline(2),
    start_lsn=Lsn(0x900),
    history="1\t0/300\tno recovery target specified\n",
)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("system_identifier", "system identifier"),
        ("major", "major version"),
        ("catalog_version", "catalog version"),
        ("block_size", "block size"),
    ],
)
def test_a_baseline_of_another_cluster_is_refused(field: str, name: str) -> None:
    check_cluster(BASELINE, HERE)
    other = dataclasses.replace(HERE, **{field: getattr(HERE, field) + 1})
    with pytest.raises(WrongClusterError, match=f"has {name}") as refusal:
        check_cluster(BASELINE, other)
    assert refusal.value.exit_code == 4
    assert "backup full" in refusal.value.hint


@pytest.mark.parametrize("start", [0x700, 0x701, 0x10000])
def test_what_starts_where_the_baseline_stopped_or_later_may_build_on_it(start: int) -> None:
    check_history(BASELINE, dataclasses.replace(HERE, start_lsn=Lsn(start)))


def test_a_stopped_cluster_that_was_not_started_since_starts_where_the_baseline_did() -> None:
    check_history(BASELINE, dataclasses.replace(HERE, start_lsn=BASELINE.start_lsn))


@pytest.mark.parametrize("start", [0x4FF, 0x501, 0x6FF])
def test_a_start_before_the_baseline_stopped_is_refused(start: int) -> None:
    with pytest.raises(NotAnAncestorError, match="before the baseline") as refusal:
        check_history(BASELINE, dataclasses.replace(HERE, start_lsn=Lsn(start)))
    assert refusal.value.exit_code == 4


@pytest.mark.parametrize(
    ("timeline", "history"),
    [
        (1, ""),
        (3, "1\t0/300\tx\n2\t0/6FF\tx\n"),  # left before the baseline stopped
        (3, "1\t0/300\tx\n"),
        (2**31, "1\t0/300\tx\n7\t0/900\tx\n"),
    ],
)
def test_a_timeline_that_does_not_come_from_the_baseline_is_refused(
    timeline: int, history: str
) -> None:
    now = dataclasses.replace(HERE, timeline=Timeline(timeline), history=history)
    with pytest.raises(NotAnAncestorError, match="not in the history") as refusal:
        check_history(BASELINE, now)
    assert refusal.value.exit_code == 4


def test_a_timeline_that_left_behind_the_baseline_may_build_on_it() -> None:
    history = "1\t0/300\tx\n2\t0/700\tx\n"
    check_history(BASELINE, dataclasses.replace(HERE, timeline=Timeline(3), history=history))
