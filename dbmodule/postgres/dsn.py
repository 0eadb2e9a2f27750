"""Connection strings: checked before any driver sees them, since drivers quote what they refuse."""

from __future__ import annotations

import psycopg
from psycopg.conninfo import conninfo_to_dict

from dbmodule.errors import UsageError


def check_dsn(dsn: str) -> None:
    """Raises `UsageError`, without the text of `dsn`: it may hold a password."""
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # The cause would be shown with it, and names the part that it could not read.
        raise UsageError(
            "server.dsn is not a valid libpq connection string",
            hint="Write it as key=value pairs or as a postgresql:// URI, with special characters"
            " percent-encoded; passwords belong into a passfile.",
        ) from None
