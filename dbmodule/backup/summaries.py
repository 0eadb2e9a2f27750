"""Asking WAL summaries what changed since the baseline, if they can tell without a gap."""

from __future__ import annotations

import time

from dbmodule import wal, walsummary
from dbmodule.backup.baseline import Position
from dbmodule.errors import CancelledError, SourceError
from dbmodule.manifest import Manifest
from dbmodule.ports import Cancelled, DataDirectory
from dbmodule.walsummary import ChangedBlocks, Stretch, Summary

PATIENCE_SECONDS = 60.0
"""How long the server's summariser may make no progress before it is not waited for any more."""
_POLL_SECONDS = 0.05


class NoSummariesError(Exception):
    """They leave a gap, or are damaged; the message says which."""


def changed_since(
    baseline: Manifest,
    now: Position,
    directory: DataDirectory,
    *,
    wait: bool,
    cancelled: Cancelled,
) -> ChangedBlocks:
    """The blocks that WAL names from the baseline's start to this backup's.

    With `wait` a running summariser is given the time that it needs. Raises `NoSummariesError`.
    """
    history = wal.parse_history(now.history)
    changed = ChangedBlocks()
    for stretch in walsummary.stretches(
        baseline.timeline, baseline.start_lsn, now.timeline, now.start_lsn, history
    ):
        # Only the current timeline's WAL is still being summarised.
        patient = wait and stretch.timeline == now.timeline
        for summary in _covering(stretch, directory, patient, cancelled):
            data = directory.read(f"{walsummary.DIRECTORY}/{summary.name}")
            if data is None:
                raise NoSummariesError(f"the WAL summary {summary.name} was removed")
            try:
                changed.add(summary.name, data)
            except SourceError as error:
                raise NoSummariesError(str(error)) from error
    return changed


def _covering(
    stretch: Stretch, directory: DataDirectory, wait: bool, cancelled: Cancelled
) -> list[Summary]:
    last, deadline = stretch.start, time.monotonic() + PATIENCE_SECONDS
    while True:
        names = directory.names(walsummary.DIRECTORY)
        found = [s for name in names if (s := walsummary.parse_name(name)) is not None]
        chosen, reached = walsummary.cover(stretch, found)
        if reached >= stretch.end:
            return chosen
        if reached > last:
            last, deadline = reached, time.monotonic() + PATIENCE_SECONDS
        if not wait or time.monotonic() > deadline:
            raise NoSummariesError(walsummary.describe_gap(stretch, reached))
        if cancelled():
            raise CancelledError("the backup was cancelled")
        time.sleep(_POLL_SECONDS)
