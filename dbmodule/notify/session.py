"""What both listeners agree on: the channel, the connection string, how a loss is told."""

from __future__ import annotations

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dbmodule.errors import ServerError

CHANNEL = "dbmodule_job"

SETTINGS = "SET idle_session_timeout = 0"
"""Run before LISTEN: a listener is idle by nature."""

_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "application_name": "dbmodule listener",
}


def listening_conninfo(dsn: str) -> str:
    """`dsn` with keepalives, unless it says otherwise itself."""
    return make_conninfo("", **{**_DEFAULTS, **conninfo_to_dict(dsn)})


def connection_lost(error: Exception) -> ServerError:
    """The one error of a listener, for a connection that cannot be made or has ended."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ServerError(
        f"cannot listen on channel {CHANNEL}: {text}",
        hint="Check that the server runs and that the connection settings lead to it.",
    )
