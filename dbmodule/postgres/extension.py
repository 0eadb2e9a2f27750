"""Put the SQL extension onto a server: its files, or its script where files cannot be placed.

Both ways end with the same objects, and `installed_version` reads both; only the first makes an
extension that ``ALTER EXTENSION`` and ``pg_dump`` know as one. The script runs in one transaction:
it is there whole or not at all.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql

from dbmodule.errors import ServerError, UsageError

Created = Literal["created", "plain", "present"]
"""As an extension, as plain objects, or nothing needed doing."""

_NAME = "dbmodule"
_FILES = "dbmodule._sql"
_UNSAFE = re.compile(r"[\"$'\\\x00]")
"""What PostgreSQL itself refuses in the schema of such a script, which quotes it in many ways."""


def packaged_version() -> str:
    """The version that this package carries, as its control file says."""
    control = resources.files(_FILES).joinpath(f"{_NAME}.control").read_text("utf-8")
    match = re.search(r"^default_version = '([^']+)'$", control, re.MULTILINE)
    if match is None:
        raise ServerError(
            f"{_NAME}.control names no default_version", hint="Install this package again."
        )
    return match[1]


def server_sharedir(pg_config: Path) -> Path:
    """``pg_config --sharedir``: where a server looks for extensions. Raises `ServerError`."""
    try:
        answer = subprocess.run(
            [pg_config, "--sharedir"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerError(
            f"cannot ask {pg_config} for the server's share directory: {error}",
            hint="Name the pg_config of the server that is to get the extension.",
        ) from error
    return Path(answer.stdout.strip())


def local_sharedir(dsn: str) -> Path:
    """The share directory of the server that answers there; raises `ServerError`.

    The server tells only superusers, and the answer is a path on its own host.
    """
    with _session(dsn, "ask for the server's share directory") as connection:
        row = connection.execute(
            "SELECT setting FROM pg_catalog.pg_config WHERE name = 'SHAREDIR'"
        ).fetchone()
    if row is None:
        raise ServerError("the server does not say where its share directory is")
    return Path(row[0])


def install(sharedir: Path) -> list[Path]:
    """Copy the control file and all scripts into ``<sharedir>/extension``; their paths.

    The control file goes last: a server that sees it sees the scripts it names. Each file appears
    whole or not at all, readable by the account of the server. Raises `ServerError`.
    """
    target = sharedir / "extension"
    sources = sorted(
        (
            file
            for file in resources.files(_FILES).iterdir()
            if file.name == f"{_NAME}.control" or re.fullmatch(rf"{_NAME}--.+\.sql", file.name)
        ),
        key=lambda file: (file.name.endswith(".control"), file.name),
    )
    try:
        for source in sources:
            _replace(target / source.name, source.read_bytes())
    except OSError as error:
        raise ServerError(
            f"cannot write to {target}: {error.strerror}",
            hint="Run this as the owner of that directory, or use the plain-SQL form, which "
            "needs no files.",
        ) from error
    return [target / source.name for source in sources]


def installed_version(dsn: str) -> str | None:
    """Version of the catalog in that database, or None without one. Raises `ServerError`."""
    with _session(dsn, "look for the extension") as connection:
        return _installed(connection)


def is_installed(dsn: str) -> bool:
    """Is the catalog in that database, whether or not this role may use it? `ServerError`."""
    with _session(dsn, "look for the extension") as connection:
        return _exists(connection)


def create(dsn: str) -> Created:
    """Make the catalog unless it is there: as an extension if the server has the files.

    Raises `ServerError`, also when the role may not do it.
    """
    with _session(dsn, "create the extension") as connection:
        if _installed(connection) is not None:
            return "present"
        available = connection.execute(
            "SELECT 1 FROM pg_catalog.pg_available_extension_versions "
            "WHERE name = %s AND version = %s",
            (_NAME, packaged_version()),
        ).fetchone()
        if available is None:
            _run_script(connection, "public")
            return "plain"
        connection.execute(
            sql.SQL("CREATE EXTENSION IF NOT EXISTS dbmodule WITH SCHEMA public VERSION {}").format(
                packaged_version()
            )
        )
        return "created"


def install_plain(dsn: str, schema: str = "public") -> None:
    """Run the extension's script as plain SQL, its functions in `schema`; `ServerError`."""
    with _session(dsn, "install the catalog") as connection:
        _run_script(connection, schema)


def _run_script(connection: psycopg.Connection[Any], schema: str) -> None:
    if not schema or _UNSAFE.search(schema):
        raise UsageError(
            f"not usable as the schema of the functions: {schema!r}",
            hint="Choose a schema whose name has no quotes, backslash or dollar sign.",
        )
    name = f"{_NAME}--{packaged_version()}.sql"
    script = resources.files(_FILES).joinpath(name).read_text("utf-8")
    body = re.sub(r"^\\echo .*$", "", script, flags=re.MULTILINE)
    quoted = sql.Identifier(schema).as_string(connection)
    # The settings under which the server runs an extension's script, too.
    connection.execute("SET LOCAL standard_conforming_strings = on")
    connection.execute("SET LOCAL check_function_bodies = on")
    connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    connection.execute(body.replace("@extschema@", quoted).encode())


def _installed(connection: psycopg.Connection[Any]) -> str | None:
    if not _exists(connection):
        return None
    row = connection.execute("SELECT dbmodule.version()").fetchone()
    return None if row is None else str(row[0])


def _exists(connection: psycopg.Connection[Any]) -> bool:
    # Not to_regprocedure: it fails where the role may not use the schema.
    found = connection.execute(
        "SELECT FROM pg_catalog.pg_proc WHERE proname = 'version' "
        "AND pronamespace = to_regnamespace('dbmodule')"
    ).fetchone()
    return found is not None


@contextmanager
def _session(dsn: str, action: str) -> Iterator[psycopg.Connection[Any]]:
    """One transaction on a session of its own; driver errors become `ServerError`."""
    try:
        with psycopg.connect(dsn, client_encoding="utf8", prepare_threshold=None) as connection:
            yield connection
    except psycopg.errors.InsufficientPrivilege as error:
        raise ServerError(
            f"cannot {action}: {error.diag.message_primary}",
            hint="Do it as a superuser; what a role lacks to take backups, `dbmodule check` lists.",
        ) from error
    except psycopg.errors.DuplicateSchema as error:
        raise ServerError(
            f"cannot {action}: {error.diag.message_primary}",
            hint="Schema dbmodule is taken by something else; look at it, then rename or drop it.",
        ) from error
    except psycopg.Error as error:
        raise ServerError(
            f"cannot {action}: {' '.join(str(error).split())}",
            hint="Check that the server runs and that the connection settings lead to it.",
        ) from error


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
