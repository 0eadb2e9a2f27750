"""The protocol for a cleanly stopped server: its directory, as it lies there.

The shutdown checkpoint takes the place of start and stop: nothing changes while files are read,
which ``pg_control`` must say before and after.
"""

from __future__ import annotations

import time

from dbmodule import wal
from dbmodule.backup import baseline as ancestry
from dbmodule.backup import walfiles
from dbmodule.backup.steps import Begun, Ended, Run, Taken, position_of, read_control_file
from dbmodule.controlfile import ControlFile, DBState
from dbmodule.errors import RefusedError, ServerError, SourceError
from dbmodule.ident import PAGE_SIZE, Lsn, SystemId, format_lsn
from dbmodule.ports import ServerIdentity


class Offline(Run):
    """A cleanly stopped server's directory, as it lies there."""

    def take(self) -> Taken:
        with self.phases("prepare"):
            _, control = read_control_file(self.env.directory)
            self._check_stopped(control)
            identity = self._identity(control)
            self.env.repository.bind(self.env.cluster, identity.system_identifier)
            history = self.history(control.timeline)
            stop_lsn = self._end_of_checkpoint(control)
        with self.alone():
            return self._take(identity, control, history, stop_lsn)

    def _take(
        self, identity: ServerIdentity, control: ControlFile, history: str, stop_lsn: Lsn
    ) -> Taken:
        with self.phases("prepare"):
            chosen = self.choose(
                position_of(identity, control.redo, history),
                lambda m: ancestry.proven_by_files(m.marks, self.env.directory),
            )

        def end() -> Ended:
            _, after = read_control_file(self.env.directory)
            if after != control:
                raise ServerError(
                    "the server was started during the offline backup",
                    hint="Stop it, or take an online backup.",
                )
            self._check_stopped(after)
            return Ended(stop_lsn)

        begun = Begun(identity, chosen, control.redo, time.time_ns(), history)
        return self.back_up(begun, lambda: None, end)

    def _check_stopped(self, control: ControlFile) -> None:
        if self.env.directory.read("postmaster.pid") is not None:
            raise ServerError(
                f"a server may be running on {self.env.directory.path}: it has a postmaster.pid",
                hint="Stop the server cleanly, or take an online backup.",
            )
        if control.state is not DBState.SHUT_DOWN:
            raise ServerError(
                f"the cluster was not shut down cleanly: its state is {control.state.name}",
                hint="Start the server and stop it again with pg_ctl stop -m fast.",
            )
        if control.block_size != PAGE_SIZE:
            raise RefusedError(
                f"the block size is {control.block_size}, only 8192 is supported",
                hint="Use pg_basebackup for this server.",
            )

    def _identity(self, control: ControlFile) -> ServerIdentity:
        text = (self.env.directory.read("PG_VERSION") or b"").decode("ascii", "replace").strip()
        if not text.isdigit():
            raise SourceError(f"{self.env.directory.path} has no usable PG_VERSION")
        return ServerIdentity(
            system_identifier=SystemId(control.system_identifier),
            catalog_version=control.catalog_version,
            version_num=int(text) * 10000,
            version=text,
            timeline=control.timeline,
            block_size=control.block_size,
            blocks_per_segment=control.blocks_per_segment,
            wal_segment_size=control.wal_segment_size,
            data_checksums=control.data_checksum_version == 1,
            wal_log_hints=control.wal_log_hints,
            wal_level=control.wal_level.name.lower(),
            summarize_wal=False,
            full_page_writes=control.full_page_writes,
            in_recovery=False,
            data_directory=self.env.directory.path,
            port=0,
            started_at=0.0,
            lsn=control.redo,
        )

    def _end_of_checkpoint(self, control: ControlFile) -> Lsn:
        """Where the shutdown checkpoint's record ends: all that a restore has to read."""
        size = control.wal_segment_size
        name = wal.segment_name(control.timeline, wal.segment_of(control.redo, size), size)
        data = self.env.directory.read(f"pg_wal/{name}")
        if data is None or control.redo != control.checkpoint:
            raise SourceError(
                f"the shutdown checkpoint at {format_lsn(control.checkpoint)} cannot be read",
                hint="Start the server and stop it again with pg_ctl stop -m fast.",
            )
        return walfiles.end_of_record(data, control.redo, size)
