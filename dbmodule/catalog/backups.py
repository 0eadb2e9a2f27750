"""The catalog of backups: lineage marks and the projection of committed backups.

Each call is one short transaction on a connection of its own, so nothing here holds back vacuum
while a backup runs, and a lost connection costs one call.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, delete, insert, literal_column, select
from sqlalchemy.dialects.postgresql import insert as upsert

from dbmodule import datafile
from dbmodule.catalog.engine import connect, make_engine, server_errors
from dbmodule.catalog.grants import missing_grants
from dbmodule.catalog.tables import (
    backup,
    backup_dependency,
    backup_relation,
    corrupt_page,
    lineage,
)
from dbmodule.ident import BackupId
from dbmodule.manifest import Corruption
from dbmodule.ports import BackupRecord, LineageMark
from dbmodule.registry import RelationRow

# A cast to bigint, since the client's driver has no type for xid. The raw value stays readable in
# a frozen row, and VACUUM FULL keeps it.
_XMIN = literal_column("xmin::text::bigint", BigInteger)
_CTID: ColumnElement[str] = literal_column("ctid::text")
_FILE: ColumnElement[str] = literal_column("pg_catalog.pg_relation_filepath('dbmodule.lineage')")
_ROWS = 5000
"""Rows of relations that are sent at once."""


class SqlCatalog:
    """`dbmodule.ports.Catalog` on the extension's tables; `dsn` is a libpq connection string."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._engine = make_engine(dsn)

    def leave_mark(self, backup_id: BackupId, position: str) -> LineageMark:
        mark = secrets.token_hex(16)
        statement = (
            insert(lineage)
            .values(mark=mark, backup_id=backup_id, position=position)
            .returning(lineage.c.xid, _CTID, _FILE)
        )
        with server_errors("leave a lineage mark"), self._engine.begin() as connection:
            xid, ctid, path = connection.execute(statement).one()
        block, item = ctid.strip("()").split(",")
        return LineageMark(mark, xid, path, int(block), int(item))

    def sees_marks(self, marks: Sequence[LineageMark]) -> bool:
        statement = select(lineage.c.mark, lineage.c.xid, _XMIN).where(
            lineage.c.mark.in_([mark.mark for mark in marks])
        )
        with server_errors("look for lineage marks"), self._engine.begin() as connection:
            seen = {mark: (xid, xmin) for mark, xid, xmin in connection.execute(statement)}
        # The column alone would be carried along by a dump, xmin alone repeats after 2^32.
        return bool(marks) and all(
            seen.get(mark.mark) == (mark.xmin, mark.xmin & 0xFFFFFFFF) for mark in marks
        )

    def unknown(self, backups: Sequence[BackupId]) -> set[BackupId]:
        statement = select(backup.c.backup_id).where(backup.c.backup_id.in_(backups))
        with server_errors("look for recorded backups"), self._engine.begin() as connection:
            return set(backups).difference(connection.execute(statement).scalars())

    def record(self, record: BackupRecord) -> None:
        row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        relations, corruption = row.pop("relations"), row.pop("corruption")
        added = upsert(backup).values(row).on_conflict_do_nothing().returning(backup.c.backup_id)
        with server_errors(f"record backup {record.backup_id}"), self._engine.begin() as connection:
            if connection.execute(added).first() is None:
                return
            if record.baseline_id is not None:
                link = {"backup_id": record.backup_id, "baseline_id": record.baseline_id}
                connection.execute(insert(backup_dependency), link)
            key = {"backup_id": record.backup_id}
            names = [f.name for f in dataclasses.fields(RelationRow)]
            for start in range(0, len(relations), _ROWS):
                part = relations[start : start + _ROWS]
                rows = [key | {name: getattr(row, name) for name in names} for row in part]
                connection.execute(insert(backup_relation), rows)
            if corruption:
                connection.execute(insert(corrupt_page), [key | _page(page) for page in corruption])

    def forget(self, backups: Collection[BackupId]) -> set[BackupId]:
        depended_on = select(backup_dependency.c.baseline_id)
        unneeded = (
            delete(backup)
            .where(backup.c.backup_id.in_(backups), backup.c.backup_id.not_in(depended_on))
            .returning(backup.c.backup_id)
        )
        with server_errors("leave out removed backups"), self._engine.begin() as connection:
            # One layer of dependents at a time: the foreign key refuses what is still depended on.
            while connection.execute(unneeded).first() is not None:
                pass
        return self.unknown(list(backups))

    def missing_grants(self) -> list[str]:
        """SQL that an administrator must run so that this role can keep the catalog."""
        with server_errors("look at grants"), connect(self._dsn) as connection:
            return missing_grants(connection)


def _page(page: Corruption) -> dict[str, Any]:
    relation = datafile.relation(page.path)
    return {
        "path": page.path,
        "tablespace": relation and relation.tablespace,
        "database": relation and relation.database,
        "relfilenode": relation and relation.relfilenode,
        "fork": relation and relation.fork,
        "block": page.block,
        "lsn": page.lsn,
        "expected": page.expected,
        "actual": page.actual,
        "database_name": page.database_name,
        "relation_name": page.relation_name,
        "table_name": page.table_name,
        "last_good_backup_id": page.last_good,
    }
