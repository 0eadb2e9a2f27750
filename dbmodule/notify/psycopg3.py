"""LISTEN through psycopg 3's ``notifies()``."""

from __future__ import annotations

import psycopg

from dbmodule.notify.session import CHANNEL, SETTINGS, connection_lost, listening_conninfo


class PsycopgListener:
    """`dbmodule.ports.Listener` on psycopg 3; listens once it exists. Raises `ServerError`."""

    def __init__(self, dsn: str) -> None:
        try:
            self._connection = psycopg.connect(listening_conninfo(dsn), autocommit=True)
        except psycopg.Error as error:
            raise connection_lost(error) from error
        try:
            self._connection.execute(SETTINGS)
            self._connection.execute(f"LISTEN {CHANNEL}")
        except psycopg.Error as error:
            self.close()
            raise connection_lost(error) from error

    def wait(self, timeout: float) -> bool:
        try:
            # All that has come is taken: many notifications are one hint.
            return bool(list(self._connection.notifies(timeout=timeout, stop_after=1)))
        except psycopg.Error as error:
            raise connection_lost(error) from error

    def close(self) -> None:
        self._connection.close()
