"""Is everything in place for a backup that will restore? One finding per question."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from dbmodule import kernel
from dbmodule.backup.steps import read_control_file
from dbmodule.catalog import SqlCatalog
from dbmodule.config import Config
from dbmodule.errors import DbmoduleError
from dbmodule.ident import PAGE_SIZE
from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.ports import ServerIdentity
from dbmodule.postgres import extension
from dbmodule.postgres.server import FREE_A_SLOT, PsycopgServer
from dbmodule.reports import CheckReport, Finding
from dbmodule.storage import open_store
from dbmodule.storage.probe import check_exclusive
from dbmodule.unlock import open_repository

_ORDER = ("ok", "warning", "error")


def check(config: Config) -> CheckReport:
    """Ask every question; an answer that cannot be had is an error of its own."""
    findings: list[Finding] = []
    for name, question in (
        ("server", _server),
        ("repository", _repository),
        ("catalog", _catalog),
        ("checksum kernel", _kernel),
    ):
        findings += _answers(name, question, config)
    worst = max((f.severity for f in findings), key=_ORDER.index, default="ok")
    return CheckReport(worst, findings)


def _answers(
    name: str, question: Callable[[Config], Iterator[Finding]], config: Config
) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(question(config))
    except DbmoduleError as error:
        found.append(Finding(name, "error", error.message, error.hint))
    return found


def _server(config: Config) -> Iterator[Finding]:
    with closing(PsycopgServer(config.server.dsn)) as server:
        missing = server.missing_grants()
        for statement in missing:
            yield Finding("privileges", "error", "a privilege is missing", statement)
        if missing:
            return  # what the server is cannot be asked without them
        if not server.free_slots():
            yield Finding("replication slots", "error", "none is free", FREE_A_SLOT)
        identity = server.identify()
        yield Finding(
            "server",
            "ok",
            f"PostgreSQL {identity.version}, system identifier {identity.system_identifier}",
        )
    yield from _settings(identity)
    yield from _directory(config.server.pgdata or Path(identity.data_directory), identity)


def _settings(identity: ServerIdentity) -> Iterator[Finding]:
    if identity.in_recovery:
        yield Finding(
            "role", "error", "the server is in recovery", "Point server.dsn at the primary."
        )
    if identity.block_size != PAGE_SIZE:
        yield Finding("block size", "error", f"{identity.block_size}; only 8192 is supported")
    if identity.wal_level == "minimal":
        yield Finding(
            "wal_level", "error", "minimal", "Set wal_level = replica and restart the server."
        )
    if not identity.data_checksums:
        yield Finding(
            "data checksums",
            "warning",
            "off: corrupt and torn pages cannot be told from good ones",
            "Stop the server and run pg_checksums --enable.",
        )
    else:
        yield Finding("data checksums", "ok", "on")
    if not identity.full_page_writes:
        yield Finding(
            "full_page_writes",
            "warning",
            "off: a crash of the server can tear pages",
            "Set full_page_writes = on.",
        )


def _directory(root: Path, identity: ServerIdentity) -> Iterator[Finding]:
    if not os.access(root, os.R_OK | os.X_OK):
        yield Finding(
            "data directory",
            "error",
            f"{root} cannot be read",
            "Run dbmodule as the operating system user that runs the server.",
        )
        return
    _, control = read_control_file(LocalDataDirectory(root))
    if control.system_identifier != identity.system_identifier:
        yield Finding(
            "data directory",
            "error",
            f"{root} belongs to system identifier {control.system_identifier}",
            f"Set server.pgdata to {identity.data_directory}.",
        )
    else:
        yield Finding("data directory", "ok", str(root))


def _repository(config: Config) -> Iterator[Finding]:
    store = open_store(config.repository.url, config.repository.options)
    repository = open_repository(config)
    backups = repository.backup_ids(config.repository.cluster)
    check_exclusive(store)
    yield Finding("repository", "ok", f"{store.url}, {len(backups)} backups of this cluster")
    if repository.vault is not None:
        keys = len(repository.vault.keyring.key_ids())
        yield Finding("encryption", "ok", f"on, {keys} master key{'s' if keys > 1 else ''}")


def _catalog(config: Config) -> Iterator[Finding]:
    if not extension.is_installed(config.server.dsn):
        yield Finding(
            "extension",
            "warning",
            "not installed: no lineage marks, so differentials have to compare all content",
            "Run dbmodule extension install.",
        )
        return
    missing = SqlCatalog(config.server.dsn).missing_grants()
    for statement in missing:
        yield Finding("catalog privileges", "error", "a privilege is missing", statement)
    if not missing:
        version = extension.installed_version(config.server.dsn)
        yield Finding("extension", "ok", f"version {version}")


def _kernel(config: Config) -> Iterator[Finding]:
    yield Finding("checksum kernel", "ok", kernel.name)
