"""The text files that make a restored directory recover: settings, and minimal configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dbmodule.controlfile import ControlFile
from dbmodule.ident import BackupId

CONF = "postgresql.conf"
AUTO_CONF = "postgresql.auto.conf"
SIGNAL = "recovery.signal"
LABEL = "backup_label"
_TARGETS = ("", "_lsn", "_name", "_time", "_xid")

MINIMAL_CONFIGURATION = {
    CONF: "# The configuration was not in the data directory that was backed up.\n",
    "pg_hba.conf": "# The configuration was not in the data directory that was backed up.\n"
    "local all all peer\n",
    "pg_ident.conf": "",
}


DEFAULTS = {
    "max_connections": 100,
    "max_worker_processes": 8,
    "max_wal_senders": 10,
    "max_prepared_transactions": 0,
    "max_locks_per_transaction": 64,
}
"""Settings that recovery needs to be as large as at the source, and what they are if not set."""


_DATA_DIRECTORY = re.compile(rb"(?mi)^[ \t]*data_directory\b")


def without_data_directory(configuration: bytes) -> bytes:
    """``postgresql.conf`` with ``data_directory`` as a comment.

    A server that is started on the copy would go to its source's directory, and run there. The
    setting is none that later files could take back.
    """
    return _DATA_DIRECTORY.sub(rb"#\g<0>", configuration)


def too_small(control: ControlFile, configuration: str) -> dict[str, int]:
    """Settings of `DEFAULTS` that `configuration` makes smaller than they were at the source.

    They may have been set outside the data directory or on the server's command line. Files that
    the configuration includes are not looked into: a value from there is then repeated.
    """
    missing: dict[str, int] = {}
    for name, default in DEFAULTS.items():
        set_to = re.findall(rf"(?mi)^\s*{name}\s*=?\s*'?(\d+)", configuration)
        needed: int = getattr(control, name)
        if needed > (int(set_to[-1]) if set_to else default):
            missing[name] = needed
    return missing


def recovery_settings(
    backup: BackupId, *, in_place_tablespaces: bool, minimums: Mapping[str, int]
) -> str:
    """What is appended to ``postgresql.auto.conf``; later settings win over earlier ones.

    All WAL that is needed lies in ``pg_wal``, so the restore command finds nothing. Recovery is
    an archive recovery all the same: it ends on a new timeline, so that the copy's WAL can never
    be taken for its source's. Nor may it run what its source, perhaps once a standby, did
    during recovery: a clean-up of the archive would remove WAL that the source still needs.
    """
    lines = [f"# Added by dbmodule for the recovery of {backup}.", "restore_command = 'false'"]
    lines += ["archive_cleanup_command = ''", "recovery_end_command = ''"]
    lines += ["recovery_min_apply_delay = 0"]
    lines += [f"recovery_target{name} = ''" for name in _TARGETS]
    lines.append("recovery_target_timeline = 'current'")
    if in_place_tablespaces:
        lines.append("allow_in_place_tablespaces = on")
    lines += [f"{name} = {value}" for name, value in minimums.items()]
    return "\n".join(lines) + "\n"
