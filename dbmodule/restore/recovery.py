"""The text files that make a restored directory recover: settings, and minimal configuration."""

from __future__ import annotations

from dbmodule.ident import BackupId

AUTO_CONF = "postgresql.auto.conf"
SIGNAL = "recovery.signal"
LABEL = "backup_label"
_TARGETS = ("", "_lsn", "_name", "_time", "_xid")

MINIMAL_CONFIGURATION = {
    "postgresql.conf": "# The configuration was not in the data directory that was backed up.\n",
    "pg_hba.conf": "# The configuration was not in the data directory that was backed up.\n"
    "local all all peer\n",
    "pg_ident.conf": "",
}


def recovery_settings(backup: BackupId, *, in_place_tablespaces: bool) -> str:
    """What is appended to ``postgresql.auto.conf``; later settings win over earlier ones.

    All WAL that is needed lies in ``pg_wal``, so the restore command finds nothing. Recovery is
    an archive recovery all the same: it ends on a new timeline, so that the copy's WAL can never
    be taken for its source's.
    """
    lines = [f"# Added by dbmodule for the recovery of {backup}.", "restore_command = 'false'"]
    lines += [f"recovery_target{name} = ''" for name in _TARGETS]
    lines.append("recovery_target_timeline = 'current'")
    if in_place_tablespaces:
        lines.append("allow_in_place_tablespaces = on")
    return "\n".join(lines) + "\n"
