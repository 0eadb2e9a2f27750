"""Identifiers: LSNs as PostgreSQL writes them, backup ids that sort in the order of backups."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import UsageError
from dbmodule.ident import (
    BackupId,
    BackupType,
    format_lsn,
    new_backup_id,
    parse_backup_id,
    parse_lsn,
)

NOW = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)


@given(st.integers(0, 2**64 - 1))
def test_lsns_are_written_as_they_are_read(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/123456789", "G/0", "0/0 ", "-1/0"])
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an LSN"):
        parse_lsn(text)


@given(st.lists(st.tuples(st.sampled_from(BackupType), st.integers(-90_000, 90_000)), max_size=20))
def test_ids_sort_in_the_order_of_backups_whatever_the_clock(
    steps: list[tuple[BackupType, int]],
) -> None:
    ids: list[BackupId] = []
    for kind, seconds in steps:
        ids.append(new_backup_id(kind, NOW + timedelta(seconds=seconds), ids))
    assert ids == sorted(ids)
    assert [parse_backup_id(backup) for backup in ids] == ids


def test_an_id_tells_the_time_and_passes_over_what_is_none() -> None:
    backup = new_backup_id(
        BackupType.FULL, NOW, [BackupId("99999999-999999-full-zz"), BackupId("")]
    )
    assert backup.startswith("20260131-235959-full-")
