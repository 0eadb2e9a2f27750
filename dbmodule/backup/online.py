"""The protocol for a running server.

The order is what makes it correct: lineage mark, WAL reserved, start, files, ``pg_control`` last,
stop, second mark, WAL stored and checked, everything durable, and the manifest at the very end.
Until then the backup does not exist, and whatever an error leaves behind is unreferenced.
"""

from __future__ import annotations

import re
import time

from dbmodule.backup import baseline as ancestry
from dbmodule.backup.steps import Begun, Ended, Run, Taken, position_of, read_control_file
from dbmodule.errors import RefusedError, ServerError, WrongClusterError
from dbmodule.ident import PAGE_SIZE, Lsn, format_lsn
from dbmodule.manifest import Mark
from dbmodule.ports import LineageMark, Server, ServerIdentity

LONGEST_START = 60
"""Seconds between the begin of a postmaster and its start time."""
_LABEL_TIMELINE = re.compile(r"^START TIMELINE: (\d+)$", re.MULTILINE)


def _which_server(identity: ServerIdentity) -> tuple[object, ...]:
    """What must stay the same throughout; settings may be reloaded meanwhile."""
    return (
        identity.system_identifier,
        identity.timeline,
        identity.in_recovery,
        identity.started_at,
        identity.data_directory,
        identity.port,
    )


class Online(Run):
    """The protocol for a running server."""

    def take(self) -> Taken:
        server = self.env.server
        if server is None:
            raise ServerError(
                "no running server to back up",
                hint="Start it, or back the stopped directory up with --offline.",
            )
        with self.phases("prepare"):
            identity = server.identify()
            self._check_server(identity)
            self._check_directory(identity)
            self.env.repository.bind(self.env.cluster, identity.system_identifier)
            history = self.history(identity.timeline)
            server.lock()
        with self.alone():
            return self._take(server, identity, history)

    def _take(self, server: Server, identity: ServerIdentity, history: str) -> Taken:
        with self.phases("prepare"):
            chosen = self.choose(
                position_of(identity, identity.lsn, history),
                lambda m: ancestry.proven_by_catalog(m.marks, self.env.catalog),
            )
            first_mark = self._mark("start")
            server.reserve_wal()
        with self.phases("checkpoint"):
            called_ns = time.time_ns()
            start_lsn = server.start_backup(
                self.options.label or str(self.backup_id),
                fast=not self.options.spread_checkpoint,
            )
        self._check_started(start_lsn)

        def end() -> Ended:
            with self.phases("stop"):
                stopped = server.stop_backup()
                marks = first_mark, self._mark("stop")
                self._check_still_the_same(identity, server.identify(), stopped.backup_label)
            return Ended(
                stopped.stop_lsn,
                stopped.backup_label,
                stopped.tablespace_map,
                tuple(m for m in marks if m is not None),
            )

        begun = Begun(identity, chosen, start_lsn, called_ns, history)
        return self.back_up(begun, server.ensure_alive, end)

    def _mark(self, position: str) -> Mark | None:
        if self.env.catalog is None or self.options.dry_run:
            return None
        m: LineageMark = self.env.catalog.leave_mark(self.backup_id, position)
        return Mark(m.mark, m.xmin, m.path, m.block, m.item)

    def _check_server(self, identity: ServerIdentity) -> None:
        """Refuse what this version cannot back up."""
        if identity.in_recovery:
            raise ServerError(
                "the server is in recovery, and backups are taken from a primary",
                hint="Point server.dsn and server.pgdata at the primary.",
            )
        if identity.block_size != PAGE_SIZE:
            raise RefusedError(
                f"the server's block size is {identity.block_size}, only 8192 is supported",
                hint="Use pg_basebackup for this server.",
            )
        if identity.wal_level == "minimal":
            raise ServerError(
                "wal_level is minimal: an online backup could not be recovered",
                hint="Set wal_level = replica and restart the server.",
            )

    def _check_directory(self, identity: ServerIdentity) -> None:
        """The directory that we read must be this very server's: copies share the identifier."""
        _, control = read_control_file(self.env.directory)
        if control.system_identifier != identity.system_identifier:
            raise WrongClusterError(
                f"{self.env.directory.path} belongs to the cluster with system identifier"
                f" {control.system_identifier}, the server has {identity.system_identifier}",
                hint="Let server.pgdata and server.dsn name the same server.",
            )
        data = self.env.directory.read("postmaster.pid")
        lines = (data or b"").decode("utf-8", "replace").splitlines()
        if not _describes(lines, identity):
            raise WrongClusterError(
                f"{self.env.directory.path} is not the directory of the server that answers on"
                f" port {identity.port}: its postmaster.pid says otherwise",
                hint=f"The server's data directory is {identity.data_directory}: set"
                " server.pgdata to it.",
            )

    def _check_started(self, start_lsn: Lsn) -> None:
        """The checkpoint that the backup began with must be on this very disk.

        That is what a copy made with ``cp -a`` of a running server's directory lacks, down to whose
        postmaster.pid everything else agrees.
        """
        _, control = read_control_file(self.env.directory)
        if control.redo < start_lsn:
            raise WrongClusterError(
                f"{self.env.directory.path} is a copy of the server's directory: the checkpoint"
                f" that began this backup, at {format_lsn(start_lsn)}, is not in it",
                hint="Set server.pgdata to the directory that the server runs on.",
            )

    def _check_still_the_same(
        self, before: ServerIdentity, after: ServerIdentity, backup_label: str
    ) -> None:
        """Nothing may have been promoted, restarted or swapped meanwhile."""
        match = _LABEL_TIMELINE.search(backup_label)
        if match is None or int(match[1]) != before.timeline:
            raise ServerError("the backup label names another timeline than the backup began on")
        if _which_server(after) != _which_server(before):
            raise ServerError(
                "the server was changed or restarted during the backup",
                hint="Run the backup again.",
            )
        self._check_directory(after)


def _describes(pid_file: list[str], identity: ServerIdentity) -> bool:
    """Is this ``postmaster.pid`` the one that the server wrote when it started?

    Its line 3 is when the process began, ``pg_postmaster_start_time()`` when it had read its
    configuration and made its shared memory: a while later, so often in another second.
    """
    if len(pid_file) < 4 or not pid_file[2].isdigit():
        return False
    waited = int(identity.started_at) - int(pid_file[2])
    return (
        pid_file[1] == identity.data_directory
        and pid_file[3] == str(identity.port)
        and 0 <= waited <= LONGEST_START
    )
