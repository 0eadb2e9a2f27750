"""First steps: repository, extension and configuration, each created only if it is missing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dbmodule import doctor, unlock
from dbmodule.config import Config, load_config, render_toml
from dbmodule.errors import (
    DbmoduleError,
    ObjectExistsError,
    ServerError,
    TargetError,
    UsageError,
)
from dbmodule.postgres import extension
from dbmodule.postgres.server import PsycopgServer
from dbmodule.reports import Finding, InitReport
from dbmodule.repository.repository import Repository
from dbmodule.storage import local_path, open_store
from dbmodule.storage.probe import check_exclusive


def init(config: Config, *, config_path: Path, with_extension: bool) -> InitReport:
    """Set up backups of the server that `config` names; safe to run again."""
    server = PsycopgServer(config.server.dsn)
    try:
        identity = server.identify()
        grants = server.missing_grants()
    finally:
        server.close()
    if config.server.pgdata is None:
        pgdata = Path(identity.data_directory)
        config = config.model_copy(
            update={"server": config.server.model_copy(update={"pgdata": pgdata})}
        )
    keep_apart(config.repository.url, config.server.pgdata or Path(identity.data_directory))
    findings = [
        Finding("privileges", "error", "a privilege is missing", statement) for statement in grants
    ]
    store = open_store(config.repository.url, config.repository.options)
    check_exclusive(store)
    created = not Repository.exists(store)
    if created:
        key_file = config.repository.key_file
        if key_file is not None and config.repository.key is None and not key_file.exists():
            unlock.make_key_file(key_file)
            findings.append(
                Finding(
                    "master key",
                    "warning",
                    f"a new one was written to {key_file}",
                    "Keep a copy where neither the server nor the repository is: without it"
                    " nobody can read the backups.",
                )
            )
        try:
            Repository.create(store, unlock.master_secret(config.repository))
        except ObjectExistsError:
            created = False
    repository = unlock.open_repository(config)
    repository.bind(config.repository.cluster, identity.system_identifier)
    made = "skipped"
    if with_extension:
        try:
            made = extension.create(config.server.dsn)
        except DbmoduleError as error:
            made = f"failed: {error.message}"
            findings.append(Finding("extension", "warning", error.message, error.hint))
    _write_config(config, config_path)
    findings += [f for f in doctor.check(config).findings if f.severity != "ok"]
    return InitReport(
        config=str(config_path),
        repository=store.url,
        repository_id=repository.id,
        repository_created=created,
        encrypted=repository.vault is not None,
        cluster=config.repository.cluster,
        system_identifier=str(identity.system_identifier),
        server_version=identity.version,
        extension=made,
        findings=list({(f.name, f.remedy): f for f in findings}.values()),
        next_command="dbmodule backup full",
    )


def _write_config(config: Config, path: Path) -> None:
    """Write the configuration unless the file already says just that."""
    if path.exists() and load_config(path) == config:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(render_toml(config))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise UsageError(
            f"cannot write the configuration {path}: {error.strerror}",
            hint="Name another file with --config.",
        ) from error


def install_extension(dsn: str, directory: Path | None) -> list[str]:
    """Put the extension on a server: files where they can be written, else plain SQL."""
    done: list[str] = []
    try:
        if directory is None:
            directory = extension.local_sharedir(dsn)
        done += [f"wrote {path}" for path in extension.install(directory)]
    except ServerError as error:
        done.append(f"no files were written: {error.message}")
    made = extension.create(dsn)
    words = {
        "created": "created the extension with CREATE EXTENSION",
        "plain": "created the functions and tables with plain SQL",
        "present": "the functions and tables are there already",
    }
    return [*done, words[made]]


def keep_apart(url: str, directory: Path) -> None:
    """Refuse a repository and a data directory that lie in each other; raises `TargetError`."""
    try:
        repository, other = local_path(url), directory.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise TargetError(
            f"cannot tell where {url} and {directory} are: {error}",
            hint="Name both without links that lead in a circle.",
        ) from error
    if repository is not None and (
        repository.is_relative_to(other) or other.is_relative_to(repository)
    ):
        raise TargetError(
            f"the repository {repository} and the data directory {other} lie in each other",
            hint="Keep them apart, best on different disks.",
        )
