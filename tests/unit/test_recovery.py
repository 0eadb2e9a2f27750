"""Which settings a restored directory must be given so that its recovery begins."""

from __future__ import annotations

import pytest

from dbmodule.controlfile import parse
from dbmodule.ident import BackupId
from dbmodule.restore.recovery import recovery_settings, too_small, without_data_directory
from tests.control import control_file

# Offsets of MaxConnections and max_prepared_xacts in ControlFileData.
CONTROL = parse(control_file(1800, at_180=300, at_192=5))


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ("", {"max_connections": 300, "max_prepared_transactions": 5}),
        ("max_connections = 300\nmax_prepared_transactions = 9 # more", {}),
        ("  MAX_CONNECTIONS '300'\nmax_prepared_transactions=5", {}),
        ("#max_connections = 300", {"max_connections": 300, "max_prepared_transactions": 5}),
        (
            "max_connections = 300\nmax_connections = 200\nmax_prepared_transactions = 5",
            {"max_connections": 300},
        ),
    ],
)
def test_only_what_the_configuration_makes_smaller_is_set(
    configuration: str, expected: dict[str, int]
) -> None:
    assert too_small(CONTROL, configuration) == expected


def test_the_source_s_data_directory_is_commented_out() -> None:
    found = b"port = 1\r\n Data_Directory '/x'\ndata_directory_mode = 1\n#data_directory = 'y'\n"
    expected = (
        b"port = 1\r\n# Data_Directory '/x'\ndata_directory_mode = 1\n#data_directory = 'y'\n"
    )
    assert without_data_directory(found) == expected


def test_settings_end_on_a_new_timeline_and_target_nothing() -> None:
    text = recovery_settings(
        BackupId("20260131-235959-full-1a2b3c"),
        in_place_tablespaces=True,
        minimums={"max_connections": 300},
    )
    assert "restore_command = 'false'\n" in text
    assert "recovery_target_time = ''\n" in text
    assert "recovery_target_timeline = 'current'\n" in text
    assert text.endswith("allow_in_place_tablespaces = on\nmax_connections = 300\n")
