"""The extension's tables in SQLAlchemy's words; a test holds them equal to what is installed.

Only what statements need is said here: names, types and nullability. Constraints, defaults and
comments are the extension script's alone.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Identity,
    Integer,
    MetaData,
    Numeric,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import JSONB, OID
from sqlalchemy.engine import Dialect
from sqlalchemy.types import UserDefinedType

from dbmodule.ident import format_lsn, parse_lsn


class PgLsn(UserDefinedType[int]):
    """``pg_lsn`` as the 64-bit number that it is."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "pg_lsn"

    def bind_processor(self, dialect: Dialect) -> Any:
        return lambda value: None if value is None else format_lsn(value)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return lambda value: None if value is None else parse_lsn(value)


class Xid8(UserDefinedType[int]):
    """``xid8``: a transaction id with its epoch, which never repeats."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return lambda value: None if value is None else int(value)


class Name(UserDefinedType[str]):
    """``name``: an identifier of PostgreSQL's own."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "name"


_TIME = DateTime(timezone=True)

metadata = MetaData(schema="dbmodule")

backup = Table(
    "backup",
    metadata,
    Column("backup_id", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("baseline_id", Text),
    Column("status", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("cluster", Text, nullable=False),
    Column("system_identifier", Numeric(20, 0), nullable=False),
    Column("timeline", BigInteger, nullable=False),
    Column("start_lsn", PgLsn, nullable=False),
    Column("stop_lsn", PgLsn, nullable=False),
    Column("started_at", _TIME, nullable=False),
    Column("finished_at", _TIME, nullable=False),
    Column("detector", Text, nullable=False),
    Column("files_total", BigInteger, nullable=False),
    Column("pages_total", BigInteger, nullable=False),
    Column("pages_changed", BigInteger, nullable=False),
    Column("bytes_read", BigInteger, nullable=False),
    Column("bytes_changed", BigInteger, nullable=False),
    Column("bytes_stored", BigInteger, nullable=False),
    Column("wal_bytes", BigInteger, nullable=False),
    Column("corrupt_pages", BigInteger, nullable=False),
    Column("manifest_hash", Text, nullable=False),
)

backup_dependency = Table(
    "backup_dependency",
    metadata,
    Column("backup_id", Text, primary_key=True),
    Column("baseline_id", Text, nullable=False),
)

backup_relation = Table(
    "backup_relation",
    metadata,
    Column("backup_id", Text, primary_key=True),
    Column("tablespace", OID, primary_key=True),
    Column("database", OID, primary_key=True),
    Column("relfilenode", OID, primary_key=True),
    Column("fork", Text, primary_key=True),
    Column("pages_changed", BigInteger, nullable=False),
    Column("database_name", Text),
    Column("relation_name", Text),
    Column("table_name", Text),
)

corrupt_page = Table(
    "corrupt_page",
    metadata,
    Column("backup_id", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("tablespace", OID),
    Column("database", OID),
    Column("relfilenode", OID),
    Column("fork", Text),
    Column("block", BigInteger, primary_key=True),
    Column("lsn", PgLsn, nullable=False),
    Column("expected", Integer, nullable=False),
    Column("actual", Integer, nullable=False),
    Column("database_name", Text),
    Column("relation_name", Text),
    Column("table_name", Text),
    Column("last_good_backup_id", Text),
)

job = Table(
    "job",
    metadata,
    Column("job_id", BigInteger, Identity(always=True), primary_key=True),
    Column("type", Text, nullable=False),
    Column("baseline_id", Text),
    Column("label", Text, nullable=False),
    Column("detect", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("requested_by", Name, nullable=False),
    Column("requested_at", _TIME, nullable=False),
    Column("requesting", Xid8, nullable=False),
    Column("claimed_by", Text),
    Column("claimed_at", _TIME),
    Column("heartbeat_at", _TIME),
    Column("phase", Text, nullable=False),
    Column("bytes_done", BigInteger, nullable=False),
    Column("bytes_total", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("finished_at", _TIME),
    Column("backup_id", Text),
    Column("error", JSONB),
    Column("report", JSONB),
)

lineage = Table(
    "lineage",
    metadata,
    Column("mark", Text, primary_key=True),
    Column("backup_id", Text, nullable=False),
    Column("position", Text, nullable=False),
    Column("xid", Xid8, nullable=False),
    Column("created_at", _TIME, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("event_id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", _TIME, nullable=False),
    Column("kind", Text, nullable=False),
    Column("job_id", BigInteger),
    Column("backup_id", Text),
    Column("message", Text, nullable=False),
)
