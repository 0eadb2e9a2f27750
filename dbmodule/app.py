"""The library as one object: builds everything from a frozen `Config` and runs the use cases."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dbmodule import doctor, listing, pruning, setup, unlock, verify
from dbmodule.agent import Agent, AgentTiming
from dbmodule.backup.run import take_backup
from dbmodule.backup.steps import Environment, read_control_file
from dbmodule.backup.synthetic import synthesize
from dbmodule.catalog import SqlCatalog, SqlJobQueue
from dbmodule.config import Config
from dbmodule.corruption import last_good
from dbmodule.datafile import CONTROL_FILE, tablespace_version_directory
from dbmodule.errors import DbmoduleError, RefusedError, ServerError, UsageError
from dbmodule.expire import expire
from dbmodule.ident import BackupId, parse_backup_id
from dbmodule.manifest import Manifest
from dbmodule.notify import open_listener
from dbmodule.pgdata.source import LocalDataDirectory, host_boot_id, host_name
from dbmodule.pgdata.target import LocalTargetDirectory, staged_name
from dbmodule.ports import Cancelled, Job, Progress, never_cancelled, no_progress
from dbmodule.postgres import extension
from dbmodule.postgres.dsn import check_dsn
from dbmodule.postgres.names import PsycopgNames
from dbmodule.postgres.server import PsycopgServer
from dbmodule.processes import LocalProcesses
from dbmodule.reports import (
    BackupDetails,
    BackupOptions,
    BackupReport,
    CheckReport,
    DryRunReport,
    HoldReport,
    InitReport,
    KeyInfo,
    KeyRotation,
    NewKey,
    ReleaseReport,
    RestoreOptions,
    RestoreReport,
    RetentionReport,
    VerifyLevel,
    VerifyReport,
)
from dbmodule.repository.holds import place_hold, read_holds, release_holds
from dbmodule.repository.repository import Repository
from dbmodule.restore.run import RestoreRequest, restore
from dbmodule.retention import Hold

if TYPE_CHECKING:
    from dbmodule.repository.keys import Keyring

log = logging.getLogger(__name__)


class App:
    """What the command line, the agent and other programs call. Nothing is connected at first."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @classmethod
    def open(cls, config: Config) -> App:
        """Raises `UsageError` when the configuration cannot be meant."""
        check_dsn(config.server.dsn)
        return cls(config)

    # -- set-up ---------------------------------------------------------------------------------

    def init(self, *, config_path: Path, extension: bool) -> InitReport:
        """Create what is missing; safe to run again. See `dbmodule.setup`."""
        return setup.init(self._config, config_path=config_path, with_extension=extension)

    def check(self) -> CheckReport:
        """Is everything in place for a backup that will restore?"""
        return doctor.check(self._config)

    def install_extension(self, *, directory: Path | None) -> list[str]:
        """Files into the server's extension directory, or plain SQL; what was done."""
        return setup.install_extension(self._config.server.dsn, directory)

    # -- backups --------------------------------------------------------------------------------

    def backup(
        self,
        options: BackupOptions,
        *,
        progress: Progress = no_progress,
        cancelled: Cancelled = never_cancelled,
        job_id: int | None = None,
    ) -> BackupReport:
        """Take one backup; raises a `DbmoduleError`, in which case there is none.

        A dry run answers with a `DryRunReport`.
        """
        with ExitStack() as stack:
            environment = self._environment(options, stack)
            taken = take_backup(
                environment, options, job_id=job_id, progress=progress, cancelled=cancelled
            )
        report = listing.to_report(taken.manifest)
        if not options.dry_run:
            environment.repository.tidy_index(cancelled)
            return report
        return DryRunReport(
            **{f.name: getattr(report, f.name) for f in dataclasses.fields(report)},
            relations=listing.relation_changes(taken.relations),
        )

    def _environment(self, options: BackupOptions, stack: ExitStack) -> Environment:
        repository = self._repository(dry=options.dry_run)
        settings = self._config.server
        server, catalog, names = None, None, None
        if options.offline:
            root = settings.pgdata
            if root is None:
                raise UsageError(
                    "an offline backup needs to know the data directory",
                    hint="Set server.pgdata.",
                )
            version = LocalDataDirectory(root)
            _, control = read_control_file(version)
            major = int((version.read("PG_VERSION") or b"0").strip() or 0)
            directory = tablespace_version_directory(major, control.catalog_version)
        else:
            server = stack.enter_context(closing(PsycopgServer(settings.dsn)))
            names = PsycopgNames(settings.dsn)
            identity = server.identify()
            root = settings.pgdata or Path(identity.data_directory)
            directory = tablespace_version_directory(identity.major, identity.catalog_version)
            if extension.installed_version(settings.dsn) is not None:
                catalog = SqlCatalog(settings.dsn)
        setup.keep_apart(self._config.repository.url, root)
        return Environment(
            repository=repository,
            cluster=self._config.repository.cluster,
            directory=LocalDataDirectory(root, directory),
            server=server,
            catalog=catalog,
            names=names,
            boot_id=host_boot_id(),
            host=host_name(),
            threads=self._config.backup.threads,
            compression_level=self._config.repository.compression_level,
            locks=repository.locks(LocalProcesses()),
        )

    def backups(self) -> list[BackupReport]:
        """All backups of the cluster, oldest first."""
        repository = self._repository()
        holds = self._holds(repository)
        return [
            listing.to_report(manifest, holds.get(backup))
            for backup, manifest in self._manifests(repository).items()
        ]

    def show(self, backup: str) -> BackupDetails:
        """One backup, by id or ``latest``."""
        repository = self._repository()
        manifests, unreadable = repository.readable_manifests(self._config.repository.cluster)
        chosen = listing.resolve(manifests, backup, unreadable)
        manifest, digest = repository.manifest(self._config.repository.cluster, chosen)
        good = last_good(repository, manifests, manifest)
        relations = repository.tables(manifest).relations()
        hold = self._holds(repository).get(chosen)
        return listing.to_details(manifests, manifest, digest, relations, good, hold)

    # -- restore and verification ---------------------------------------------------------------

    def restore(
        self,
        options: RestoreOptions,
        *,
        progress: Progress = no_progress,
        cancelled: Cancelled = never_cancelled,
    ) -> RestoreReport:
        """Write a data directory that starts; raises a `DbmoduleError`."""
        repository = self._repository()
        manifests, unreadable = repository.readable_manifests(self._config.repository.cluster)
        setup.keep_apart(self._config.repository.url, options.target)
        request = RestoreRequest(
            backup=listing.resolve(manifests, options.backup, unreadable),
            target=options.target.absolute(),
            tablespace_map=options.tablespace_map,
            threads=self._config.backup.threads,
        )
        return restore(
            repository,
            manifests,
            request,
            open_target=LocalTargetDirectory,
            path_exists=os.path.lexists,
            staged_control=staged_name(CONTROL_FILE),
            progress=progress,
            cancelled=cancelled,
        )

    def verify(
        self,
        backup: str | None,
        *,
        level: VerifyLevel = VerifyLevel.NORMAL,
        progress: Progress = no_progress,
        cancelled: Cancelled = never_cancelled,
    ) -> VerifyReport:
        """Look at what is stored for one backup, or at the whole repository for None."""
        repository = self._repository()
        cluster = self._config.repository.cluster
        wanted: list[BackupId] | None = None
        if backup is not None:
            wanted = [listing.resolve_loosely(repository.backup_ids(cluster), backup)]
        return verify.verify(
            repository,
            cluster,
            wanted,
            level=level,
            threads=self._config.backup.threads,
            progress=progress,
            cancelled=cancelled,
        )

    def synthesize(
        self,
        backup: str,
        *,
        progress: Progress = no_progress,
        cancelled: Cancelled = never_cancelled,
    ) -> BackupReport:
        """Make a full of a backup and its chain, without the server; raises a `DbmoduleError`."""
        repository = self._repository()
        settings = self._config.repository
        manifests, unreadable = repository.readable_manifests(settings.cluster)
        manifest = synthesize(
            repository,
            self._catalog_if_reachable(),
            settings.cluster,
            listing.resolve(manifests, backup, unreadable),
            locks=repository.locks(LocalProcesses()),
            compression_level=settings.compression_level,
            progress=progress,
            cancelled=cancelled,
        )
        return listing.to_report(manifest)

    # -- retention ------------------------------------------------------------------------------

    def expire(
        self,
        *,
        dry_run: bool = False,
        progress: Progress = no_progress,
        cancelled: Cancelled = never_cancelled,
    ) -> RetentionReport:
        """Remove the backups that the policy does not keep; raises a `DbmoduleError`.

        A dry run only says which. Without a policy only what no backup needs is removed, and the
        report says how to configure one.
        """
        repository = self._repository()
        cluster, policy = self._config.repository.cluster, self._config.retention.policy()
        now = datetime.now(UTC)
        outlook = pruning.look_ahead(repository, cluster, policy, now)
        if dry_run and outlook.unreadable:
            return pruning.to_report(outlook, policy, None, dry_run=dry_run)
        pruning.refuse_unreadable(repository, outlook, cluster)
        removal = expire(
            repository,
            cluster,
            outlook.removed(),
            locks=repository.locks(LocalProcesses()),
            dry_run=dry_run,
            progress=progress,
            cancelled=cancelled,
        )
        if not dry_run:
            self._forget([BackupId(backup) for backup in removal.removed])
        return pruning.to_report(outlook, policy, removal, dry_run=dry_run)

    def hold(self, backup: str, *, keep_until: str | None = None) -> HoldReport:
        """Keep a backup and its chain whatever the policy says, until a moment or for ever.

        Takes the place of an earlier hold. A moment without offset is one of the policy's zone.
        """
        repository = self._repository()
        cluster, now = self._config.repository.cluster, datetime.now(UTC)
        chosen = listing.resolve_loosely(repository.backup_ids(cluster), backup)
        until = None
        if keep_until is not None:
            zone = self._config.retention.policy().zone
            until = pruning.parse_moment(keep_until, zone, now)
        place_hold(repository, cluster, Hold(chosen, until), now)
        condemned = {b for s in repository.condemned.load() for b in s.backups}
        if chosen not in repository.backup_ids(cluster) or (cluster, chosen) in condemned:
            release_holds(repository, cluster, chosen)
            raise RefusedError(
                f"backup {chosen} is being removed", hint="`dbmodule list` shows what is left."
            )
        return HoldReport(chosen, pruning.FOREVER if until is None else until.isoformat())

    def release(self, backup: str) -> ReleaseReport:
        """Let go of a backup that was held; the next `expire` may remove it."""
        repository = self._repository()
        cluster = self._config.repository.cluster
        # By its id alone: the backup itself may be gone, or damaged.
        chosen = (
            listing.resolve_loosely(repository.backup_ids(cluster), backup)
            if backup == listing.LATEST
            else parse_backup_id(backup)
        )
        released = release_holds(repository, cluster, chosen)
        if not released:
            raise UsageError(
                f"backup {chosen} is not held", hint="`dbmodule list` shows which backups are."
            )
        return ReleaseReport(chosen, released)

    def _forget(self, backups: Collection[BackupId]) -> None:
        """Tell the SQL catalog what was removed, if it can be told."""
        catalog = self._catalog_if_reachable() if backups else None
        if catalog is None:
            return
        try:
            left = set(backups) - catalog.forget(backups)
        except DbmoduleError as error:
            log.warning("the SQL catalog still lists backups that were removed: %s", error)
        else:
            if left:
                log.warning(
                    "the SQL catalog still lists %s, since it knows of backups that depend on them",
                    ", ".join(sorted(left)),
                )

    def _holds(self, repository: Repository) -> dict[BackupId, str]:
        holds = read_holds(repository, self._config.repository.cluster)
        return pruning.holds_in_force(holds, datetime.now(UTC))

    # -- master keys ----------------------------------------------------------------------------

    def keys(self) -> list[KeyInfo]:
        """The master keys of an encrypted repository."""
        return self._keyring().listed()

    def add_key(self, source: NewKey, *, label: str = "") -> KeyInfo:
        """Let one more master key open the repository."""
        return self._keyring().add(unlock.new_secret(source), label)

    def rotate_key(self, source: NewKey, *, label: str = "") -> KeyRotation:
        """Put another master key in the place of the configured one, which is revoked."""
        keyring = self._keyring()
        revoked = keyring.key_id
        return KeyRotation(keyring.rotate(unlock.new_secret(source), label), revoked)

    def revoke_key(self, key_id: str) -> None:
        """Keep another master key than the configured one from opening the repository."""
        self._keyring().revoke(key_id)

    def _keyring(self) -> Keyring:
        repository = self._repository()
        if repository.vault is None:
            raise UsageError(
                f"the repository at {repository.store.url} is not encrypted, and has no keys",
                hint="Only a new repository can be encrypted: `dbmodule init --key-file FILE`.",
            )
        return repository.vault.keyring

    # -- agent ----------------------------------------------------------------------------------

    def run_agent(self, *, stop: threading.Event) -> None:
        """Carry out jobs that SQL functions enqueue, until `stop` is set."""
        dsn = self._config.server.dsn
        agent = Agent(
            f"{socket.gethostname()}:{os.getpid()}",
            open_queue=lambda: SqlJobQueue(dsn),
            open_listener=lambda: open_listener(dsn),
            run=self._run_job,
            find_backup=self._find_backup,
            timing=AgentTiming(poll=self._config.agent.poll_seconds),
        )
        agent.run_forever(stop)

    def _run_job(self, job: Job, progress: Progress, cancelled: Cancelled) -> BackupReport:
        options = BackupOptions(
            type=job.type, label=job.label, baseline_id=job.baseline_id, detect=job.detect
        )
        return self.backup(options, progress=progress, cancelled=cancelled, job_id=job.job_id)

    def _find_backup(self, job_id: int) -> BackupReport | None:
        # Job ids start again when the extension is created anew: the newest backup counts.
        found = [m for m in self._manifests(self._repository()).values() if m.job_id == job_id]
        return listing.to_report(found[-1]) if found else None

    # -- parts ----------------------------------------------------------------------------------

    def _repository(self, *, dry: bool = False) -> Repository:
        return unlock.open_repository(self._config, dry=dry)

    def _catalog_if_reachable(self) -> SqlCatalog | None:
        """For work inside the repository, which goes on when the database is lost."""
        dsn = self._config.server.dsn
        try:
            return SqlCatalog(dsn) if extension.is_installed(dsn) else None
        except ServerError as error:
            log.warning("the SQL catalog will not be told: %s", error)
            return None

    def _manifests(self, repository: Repository) -> Mapping[BackupId, Manifest]:
        """Those that can be read; of the others the log says so, and `verify` what is wrong."""
        found, unreadable = repository.readable_manifests(self._config.repository.cluster)
        for backup, error in unreadable.items():
            log.warning("backup %s is left out: %s", backup, error)
        return found
