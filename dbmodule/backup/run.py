"""Taking one backup, online or offline: where this package is entered."""

from __future__ import annotations

from dbmodule.backup.offline import Offline
from dbmodule.backup.online import Online
from dbmodule.backup.steps import Environment, Taken
from dbmodule.errors import UsageError
from dbmodule.ports import Cancelled, Progress
from dbmodule.reports import BackupOptions

MAX_LABEL = 200


def take_backup(
    environment: Environment,
    options: BackupOptions,
    *,
    job_id: int | None,
    progress: Progress,
    cancelled: Cancelled,
) -> Taken:
    """Take one backup and commit it.

    Raises a `DbmoduleError`, in which case no backup exists.
    """
    check_label(options.label)
    run = Offline if options.offline else Online
    return run(environment, options, job_id, progress, cancelled).take()


def check_label(label: str) -> None:
    """Labels are shown on terminals and stored in the backup_label file; raises `UsageError`."""
    if len(label) > MAX_LABEL or not label.isprintable():
        raise UsageError(
            "a label has at most 200 characters, and none that cannot be printed",
            hint="Choose a shorter, plain label.",
        )
