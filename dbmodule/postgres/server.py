"""One session on a running server: identity, WAL reservation, backup mode.

Start and stop of a backup need the same session, so everything here runs on a single psycopg
connection that stays open throughout, with its timeouts switched off. When it dies, the server
leaves backup mode, drops the temporary slot and releases the lock by itself.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import sql

from dbmodule.errors import LockedError, ServerError
from dbmodule.ident import Lsn, SystemId, Timeline, parse_lsn
from dbmodule.ports import ServerIdentity, StoppedBackup

LOWEST_VERSION = 150000
BACKUP_LOCK = (0x64626D6F, 2)
"""Advisory lock of a running backup: "dbmo", 2. The agent's own is "dbmo", 1."""
LOCK_SECONDS = 5.0
"""A client that has gone keeps its lock until its backend has noticed, which may take a moment."""
FREE_A_SLOT = (
    "A backup keeps WAL with a replication slot of its own: raise max_replication_slots and restart"
    " the server, or drop slots that nobody uses any more (pg_replication_slots)."
)

_TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
)
_IDENTITY = """
SELECT s.system_identifier, s.catalog_version_no, c.timeline_id,
       pg_is_in_recovery(), extract(epoch FROM pg_postmaster_start_time()),
       current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('block_size')::int,
       current_setting('data_checksums'), current_setting('wal_log_hints'),
       current_setting('wal_level'), current_setting('full_page_writes'),
       current_setting('data_directory'), current_setting('port')::int,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'segment_size'),
       (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
       coalesce(current_setting('summarize_wal', true), 'off')
  FROM pg_control_system() AS s, pg_control_checkpoint() AS c
"""
_NOW = """
SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int,
       pg_current_wal_insert_lsn()::text
"""
_NOW_IN_RECOVERY = "SELECT NULL, pg_last_wal_replay_lsn()::text"
_FUNCTIONS = ("pg_backup_start(text, boolean)", "pg_backup_stop(boolean)")


def _server_error(action: str, error: psycopg.Error, hint: str = "") -> ServerError:
    text = " ".join(str(error).split())
    return ServerError(f"{action}: {text}", hint=hint)


class PsycopgServer:
    """`ports.Server` on psycopg; `dsn` is a libpq connection string."""

    def __init__(self, dsn: str) -> None:
        self._slot = ""
        try:
            self._connection = psycopg.connect(
                dsn,
                autocommit=True,
                application_name="dbmodule backup",
                client_encoding="utf8",
                connect_timeout=10,
            )
        except psycopg.Error as error:
            raise _server_error(
                "cannot connect to the server",
                error,
                "Check server.dsn, PGHOST, PGPORT and PGUSER, and that the server is running.",
            ) from error
        version = self._connection.info.server_version
        if version < LOWEST_VERSION:
            self.close()
            raise ServerError(
                f"server version {version // 10000} is not supported",
                hint="PostgreSQL 15 and later are.",
            )
        for name in _TIMEOUTS:
            # set_config with missing settings would fail: older versions do not know them all.
            self._row(
                "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = %s", (name,)
            )
        self._refuse_pooler()

    def _row(self, query: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        try:
            return self._connection.execute(query, parameters).fetchone()
        except psycopg.errors.InsufficientPrivilege as error:
            raise _server_error(
                "the server refused",
                error,
                "`dbmodule check` lists the grants that this role is missing.",
            ) from error
        except psycopg.errors.AdminShutdown as error:
            # What the server does to a session, too, whose slot keeps more WAL than is allowed.
            raise _server_error(
                "the server ended the session of this backup",
                error,
                "It was stopped, or more WAL was written than max_slot_wal_keep_size lets a backup"
                " keep: look into its log.",
            ) from error
        except psycopg.Error as error:
            raise _server_error("the server failed", error) from error

    def _one(self, query: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        row = self._row(query, parameters)
        if row is None:
            raise ServerError("the server answered with nothing")
        return row

    def _refuse_pooler(self) -> None:
        """Two statements that reach two backends are a transaction pooler's doing."""
        first = self._one("SELECT pg_backend_pid()")[0]
        if first != self._one("SELECT pg_backend_pid()")[0] or (
            first != self._connection.info.backend_pid
        ):
            self.close()
            raise ServerError(
                "the connection goes through a transaction pooler, which cannot hold a session",
                hint="Let server.dsn name the server itself.",
            )

    # -- ports.Server ---------------------------------------------------------------------------

    def identify(self) -> ServerIdentity:
        row = self._one(_IDENTITY)
        timeline, lsn = self._one(_NOW_IN_RECOVERY if row[3] else _NOW)
        return ServerIdentity(
            # pg_control_system() shows the 64-bit identifier as a signed number.
            system_identifier=SystemId(int(row[0]) & 0xFFFFFFFFFFFFFFFF),
            catalog_version=row[1],
            timeline=Timeline(timeline or row[2]),
            lsn=parse_lsn(lsn or "0/0"),
            in_recovery=row[3],
            started_at=float(row[4]),
            version_num=row[5],
            version=row[6],
            block_size=row[7],
            data_checksums=row[8] == "on",
            wal_log_hints=row[9] == "on",
            wal_level=row[10],
            full_page_writes=row[11] == "on",
            data_directory=row[12],
            port=row[13],
            blocks_per_segment=row[14],
            wal_segment_size=row[15],
            summarize_wal=row[16] == "on",
        )

    def lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._one("SELECT pg_try_advisory_lock(%s, %s)", BACKUP_LOCK)[0]:
            if time.monotonic() > deadline:
                raise LockedError(
                    "another backup of this cluster is running",
                    hint="Wait until it has ended, then run this one again.",
                )
            time.sleep(0.1)

    def reserve_wal(self) -> None:
        name = f"dbmodule_{secrets.token_hex(8)}"
        if not self.free_slots():
            raise ServerError("the server has no replication slot free", hint=FREE_A_SLOT)
        self._one("SELECT pg_create_physical_replication_slot(%s, true, true)", (name,))
        self._slot = name

    def start_backup(self, label: str, *, fast: bool) -> Lsn:
        return parse_lsn(self._one("SELECT pg_backup_start(%s, %s)::text", (label, fast))[0])

    def stop_backup(self) -> StoppedBackup:
        lsn, label, spaces = self._one(
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(false)"
        )
        return StoppedBackup(parse_lsn(lsn), label, spaces or "")

    def ensure_alive(self) -> None:
        self._one("SELECT 1")

    def free_slots(self) -> int:
        """How many replication slots can still be made."""
        limit, used = self._one(
            "SELECT current_setting('max_replication_slots')::int,"
            " (SELECT count(*) FROM pg_replication_slots)"
        )
        return int(limit) - int(used)

    def missing_grants(self) -> list[str]:
        user = self._one("SELECT current_user::text")[0]
        role = sql.Identifier(user).as_string(self._connection)
        missing = []
        if not self._one("SELECT pg_has_role('pg_monitor', 'usage')")[0]:
            missing.append(f"GRANT pg_monitor TO {role};")
        if not self._one(
            "SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user"
        )[0]:
            missing.append(f"ALTER ROLE {role} REPLICATION;")
        missing += [
            f"GRANT EXECUTE ON FUNCTION {function} TO {role};"
            for function in _FUNCTIONS
            if not self._one("SELECT has_function_privilege(%s, 'execute')", (function,))[0]
        ]
        return missing

    def close(self) -> None:
        """End the session; slot and lock would outlive it until its backend has noticed."""
        if not self._connection.closed:
            with suppress(psycopg.Error):
                if self._slot:
                    self._connection.execute("SELECT pg_drop_replication_slot(%s)", (self._slot,))
                self._connection.execute("SELECT pg_advisory_unlock_all()")
        self._connection.close()
