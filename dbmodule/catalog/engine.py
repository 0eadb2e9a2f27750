"""Sessions on the catalog's database, and what a driver's error means to a person.

The connection string is libpq's, so environment, service and password files work. Sessions speak
UTF-8 whatever the database's encoding, notice a dead network by keepalives, never wait long for a
lock, and commit to local disk without waiting for a standby: a standby that is away must stop
neither backups nor the queue. Nor do a server's defaults for others: read-only transactions, or
statements cut short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from dbmodule.errors import ServerError

_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "dbmodule",
}
_SETTINGS = """
    SET synchronous_commit = local;
    SET idle_session_timeout = 0;
    SET lock_timeout = '10s';
    SET statement_timeout = 0;
    SET default_transaction_read_only = off
"""
_NOT_INSTALLED = "Run CREATE EXTENSION dbmodule or `dbmodule extension install`."
_HINTS = {
    "42P01": _NOT_INSTALLED,
    "3F000": _NOT_INSTALLED,
    "42883": _NOT_INSTALLED,
    "42703": "The installed extension is of another version; update it.",
    "42501": "Run `dbmodule check`: it prints the grant that is missing.",
    "25006": "The catalog is written on the primary only: connect there.",
    "23503": "Run `dbmodule catalog rebuild`: the catalog lacks a backup that this one needs.",
}
_UNREACHABLE = "Check that the server runs and that the connection settings lead to it."


def connect(dsn: str) -> psycopg.Connection:
    """A session set up as this module's first lines say; raises `psycopg.Error`."""
    conninfo = make_conninfo(
        "", **{**_DEFAULTS, **conninfo_to_dict(dsn), "client_encoding": "utf8"}
    )
    connection = psycopg.connect(conninfo, autocommit=True, prepare_threshold=None)
    try:
        connection.execute(_SETTINGS)
        connection.autocommit = False
    except psycopg.Error:
        connection.close()
        raise
    return connection


def make_engine(dsn: str) -> Engine:
    """An engine that opens a session per checkout and keeps none."""
    return create_engine(
        "postgresql+psycopg://",
        creator=lambda: connect(dsn),
        poolclass=NullPool,
        use_native_hstore=False,
    )


@contextmanager
def server_errors(action: str) -> Iterator[None]:
    """Turn the driver's and SQLAlchemy's errors into `ServerError`: ``cannot <action>: …``."""
    try:
        yield
    except DBAPIError as error:
        raise _explain(action, error.orig or error) from error
    except (psycopg.Error, SQLAlchemyError) as error:
        raise _explain(action, error) from error


def _explain(action: str, error: BaseException) -> ServerError:
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    text = " ".join(str(error).split())
    return ServerError(f"cannot {action}: {text}", hint=_HINTS.get(state or "", _UNREACHABLE))
