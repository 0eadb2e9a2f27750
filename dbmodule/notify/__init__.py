"""Listeners on the channel that SQL functions notify when a job is queued.

A listener executes nothing after LISTEN, so that whatever its connection says is a notification or
the end of the connection. TCP keepalives tell of a network that went away without a word.
"""

from __future__ import annotations

import importlib.util

from dbmodule.notify.psycopg3 import PsycopgListener
from dbmodule.notify.pubsub import PgPubSubListener
from dbmodule.ports import Listener

__all__ = ["PgPubSubListener", "PsycopgListener", "open_listener"]


def open_listener(dsn: str) -> Listener:
    """Listen through pgpubsub where it is installed, else through psycopg; `ServerError`."""
    if importlib.util.find_spec("pgpubsub") and importlib.util.find_spec("psycopg2"):
        return PgPubSubListener(dsn)
    return PsycopgListener(dsn)
