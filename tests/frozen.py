"""One state of a running cluster, held still: several online backups read the very same bytes."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import time
from pathlib import Path

from dbmodule import wal, walsummary
from dbmodule.backup.run import take_backup
from dbmodule.backup.steps import Environment
from dbmodule.catalog import SqlCatalog
from dbmodule.datafile import tablespace_version_directory
from dbmodule.ident import BackupId, BackupType, Lsn
from dbmodule.manifest import Manifest
from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.ports import ServerIdentity, StoppedBackup, never_cancelled, no_progress
from dbmodule.postgres.server import PsycopgServer
from dbmodule.processes import LocalProcesses
from dbmodule.reports import BackupOptions
from tests.fix_backup import Site

PATIENCE = 60


@dataclasses.dataclass(frozen=True)
class FrozenServer:
    """`ports.Server` that answers as a server did when its directory was copied."""

    identity: ServerIdentity
    start_lsn: Lsn
    stopped: StoppedBackup

    def identify(self) -> ServerIdentity:
        return self.identity

    def start_backup(self, label: str, *, fast: bool) -> Lsn:
        return self.start_lsn

    def stop_backup(self) -> StoppedBackup:
        return self.stopped

    def missing_grants(self) -> list[str]:
        return []

    def lock(self) -> None: ...

    def reserve_wal(self) -> None: ...

    def ensure_alive(self) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A copy of `site`'s directory at `path`, made within one backup's start and stop."""

    site: Site
    path: Path
    server: FrozenServer

    def back_up(self, kind: BackupType, detect: str, baseline: BackupId) -> Manifest:
        """A backup of the copy, in the repository of the site."""
        identity = self.server.identity
        version = tablespace_version_directory(identity.major, identity.catalog_version)
        repository = self.site.repository()
        environment = Environment(
            repository=repository,
            cluster="main",
            directory=LocalDataDirectory(self.path, version),
            server=self.server,
            catalog=SqlCatalog(self.site.cluster.dsn()),
            names=None,
            boot_id="",
            host="",
            threads=2,
            compression_level=1,
            locks=repository.locks(LocalProcesses()),
        )
        options = BackupOptions(kind, detect=detect, baseline_id=baseline)
        return take_backup(
            environment, options, job_id=None, progress=no_progress, cancelled=never_cancelled
        ).manifest


def freeze(site: Site) -> Frozen:
    """Copy the directory of a running server, with the WAL that makes the copy consistent."""
    path = site.clusters.directory() / "frozen"
    server = PsycopgServer(site.cluster.dsn())
    try:
        server.reserve_wal()
        start_lsn = server.start_backup("frozen", fast=True)
        identity = server.identify()
        if identity.summarize_wal:
            _await_summaries(site.cluster.datadir, identity, start_lsn)
        subprocess.run(["cp", "-a", site.cluster.datadir, path], check=True)
        stopped = server.stop_backup()
        for name in wal.segments_between(
            identity.timeline, start_lsn, stopped.stop_lsn, identity.wal_segment_size
        ):
            shutil.copyfile(site.cluster.datadir / "pg_wal" / name, path / "pg_wal" / name)
    finally:
        server.close()
    return Frozen(site, path, FrozenServer(identity, start_lsn, stopped))


def _await_summaries(datadir: Path, identity: ServerIdentity, lsn: Lsn) -> None:
    deadline = time.monotonic() + PATIENCE
    directory = LocalDataDirectory(datadir)
    while True:
        names = map(walsummary.parse_name, directory.names(walsummary.DIRECTORY))
        if any(s and s.timeline == identity.timeline and s.end >= lsn for s in names):
            return
        assert time.monotonic() < deadline, "the summariser did not come as far as the backup"
        time.sleep(0.02)
