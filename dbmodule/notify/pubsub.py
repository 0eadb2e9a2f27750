"""LISTEN through pgpubsub, which runs on psycopg2.

Both are an optional extra, without type information, and imported only when a listener is made; the
Protocols below are what is used of them.
"""

from __future__ import annotations

import importlib
import time
from typing import Any, Protocol, cast

from dbmodule.errors import ServerError
from dbmodule.notify.session import CHANNEL, SETTINGS, connection_lost, listening_conninfo


class _Connection(Protocol):
    def cursor(self) -> Any: ...


class _PubSub(Protocol):
    conn: _Connection

    def listen(self, channel: str) -> None: ...

    def get_events(self, select_timeout: float) -> list[Any] | None: ...

    def close(self) -> None: ...


class _PubSubModule(Protocol):
    def connect(self, dsn: str) -> _PubSub: ...


class _DriverModule(Protocol):
    Error: type[Exception]


class PgPubSubListener:
    """`dbmodule.ports.Listener` on pgpubsub; listens once it exists. Raises `ServerError`."""

    def __init__(self, dsn: str) -> None:
        try:
            pgpubsub = cast(_PubSubModule, importlib.import_module("pgpubsub"))
            self._driver = cast(_DriverModule, importlib.import_module("psycopg2"))
        except ImportError as error:
            raise ServerError(
                f"pgpubsub cannot be used: {error}",
                hint="Install psycopg2-binary, then pgpubsub with --no-deps.",
            ) from error
        try:
            self._pubsub = pgpubsub.connect(listening_conninfo(dsn))
        except self._driver.Error as error:
            raise connection_lost(error) from error
        try:
            with self._pubsub.conn.cursor() as cursor:
                cursor.execute(SETTINGS)
            self._pubsub.listen(CHANNEL)
        except self._driver.Error as error:
            self.close()
            raise connection_lost(error) from error

    def wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        left = timeout
        try:
            # It also returns early on the server's last words, and only the next call tells that
            # the connection has ended.
            while not self._pubsub.get_events(select_timeout=max(left, 0.0)):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
            return True
        except self._driver.Error as error:
            raise connection_lost(error) from error

    def close(self) -> None:
        self._pubsub.close()
