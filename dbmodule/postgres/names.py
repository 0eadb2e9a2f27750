"""What relations are called: each database's own catalog is asked, once for all of its relations.

Names are for people. So a database that cannot be asked costs its names and nothing else, and a
question that would have to wait for somebody's lock is given up.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from dbmodule.ports import RelationId, RelationName

log = logging.getLogger(__name__)

_SETTINGS = """
    SET search_path = pg_catalog;
    SET default_transaction_read_only = on;
    SET lock_timeout = '5s';
    SET statement_timeout = '60s'
"""
_DATABASES = "SELECT oid::bigint, datname::text, datallowconn FROM pg_database"
# pg_relation_filenode() also knows the files of mapped relations, of which pg_class has none.
_RELATIONS = """
SELECT coalesce(nullif(c.reltablespace, 0), d.dattablespace)::bigint, f.filenode, c.relisshared,
       format('%%I.%%I', n.nspname, c.relname), format('%%I.%%I', tn.nspname, t.relname)
  FROM pg_class AS c
  JOIN pg_database AS d ON d.datname = current_database()
 CROSS JOIN LATERAL (SELECT pg_relation_filenode(c.oid)::bigint) AS f (filenode)
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
  LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
  LEFT JOIN pg_class AS o ON o.reltoastrelid = coalesce(i.indrelid, c.oid)
  LEFT JOIN pg_class AS t ON t.oid = coalesce(o.oid, i.indrelid, c.oid)
  LEFT JOIN pg_namespace AS tn ON tn.oid = t.relnamespace
 WHERE f.filenode = ANY (%s::bigint[])
"""


class PsycopgNames:
    """`ports.RelationNames` on connections of its own; `dsn` is a libpq connection string."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def resolve(self, relations: Iterable[RelationId]) -> dict[RelationId, RelationName]:
        wanted: dict[int, set[RelationId]] = defaultdict(set)
        for relation in relations:
            wanted[relation.database].add(relation)
        names: dict[RelationId, RelationName] = {}
        try:
            with self._connect() as connection:
                databases = connection.execute(_DATABASES).fetchall()
                names |= _ask(connection, wanted[0], None)
        except psycopg.Error as error:
            log.warning("names of relations are not known: %s", " ".join(str(error).split()))
            return names
        for oid, name, may_connect in databases:
            names |= dict.fromkeys(wanted[oid], RelationName(name))
            if not wanted[oid] or not may_connect:
                continue
            try:
                with self._connect(dbname=name) as connection:
                    names |= _ask(connection, wanted[oid], name)
            except psycopg.Error as error:
                text = " ".join(str(error).split())
                log.warning("names of relations in database %s are not known: %s", name, text)
        return names

    @contextmanager
    def _connect(self, **changed: str) -> Iterator[psycopg.Connection]:
        settings: dict[str, Any] = {
            "application_name": "dbmodule names",
            "client_encoding": "utf8",
            "connect_timeout": 10,
            **changed,
        }
        with psycopg.connect(self._dsn, autocommit=True, **settings) as connection:
            connection.execute(_SETTINGS)
            yield connection


def _ask(
    connection: psycopg.Connection, wanted: set[RelationId], database: str | None
) -> dict[RelationId, RelationName]:
    """Names of relations of the connection's database; None: of those that all share."""
    if not wanted:
        return {}
    number = next(iter(wanted)).database
    filenodes = [relation.relfilenode for relation in wanted]
    found = {
        RelationId(tablespace, number, filenode): RelationName(database, relation, table)
        for tablespace, filenode, shared, relation, table in connection.execute(
            _RELATIONS, (filenodes,)
        )
        if shared == (database is None)
    }
    return {relation: name for relation, name in found.items() if relation in wanted}
