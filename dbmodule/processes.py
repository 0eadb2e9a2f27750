"""Processes of this host, as the owners of locks: who we are, and whether another still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dbmodule.pgdata.source import host_boot_id
from dbmodule.ports import ProcessIdentity

_STOPPED = "TtZX"
"""States of ``/proc/PID/stat`` in which nothing is done: stopped, traced, ended but not reaped."""


class LocalProcesses:
    """`ports.Processes` from ``/proc``."""

    def __init__(self) -> None:
        self._boot_id = host_boot_id()
        self._namespace = _namespace()

    def me(self) -> ProcessIdentity:
        pid = os.getpid()
        found = _stat(pid)
        return ProcessIdentity(
            host=socket.gethostname(),
            boot_id=self._boot_id,
            namespace=self._namespace,
            pid=pid,
            started=0 if found is None else found[1],
        )

    def runs(self, other: ProcessIdentity) -> bool | None:
        # Containers of one host share its boot, but each numbers its processes by itself.
        here = self._boot_id, self._namespace
        if "" in here or here != (other.boot_id, other.namespace):
            return None
        try:
            os.kill(other.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's, but there
        found = _stat(other.pid)
        if found is None or not other.started:
            return None  # processes of others may be hidden
        state, started = found
        if started != other.started:
            return False  # the number was given to another
        return None if state in _STOPPED else True


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time in clock ticks since boot; None where they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    # The name in parentheses may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
