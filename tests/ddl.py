"""Random DDL and DML: everything that creates, moves, cuts, rewrites or drops files."""

from __future__ import annotations

import random

import psycopg

from dbmodule.postgres.cluster import LocalCluster

SETTINGS = {"max_prepared_transactions": "20", "allow_in_place_tablespaces": "on"}
"""What the statements need of the server; its copies need it, too."""

STATEMENTS = [
    "UPDATE {t} SET filler = md5(filler) WHERE i % {n} = 0",
    "DELETE FROM {t} WHERE i % {n} = 1",
    "INSERT INTO {t} SELECT i, repeat('n', {n}) FROM generate_series(1, 700) AS i",
    "VACUUM {t}",
    "VACUUM (FREEZE) {t}",
    "VACUUM FULL {t}",
    "TRUNCATE {t}",
    "DELETE FROM {t} WHERE i > {n} * 60",
    "CREATE INDEX ON {t} (i)",
    "CREATE INDEX ON {t} USING hash (i)",
    "CREATE INDEX ON {t} USING brin (i)",
    "REINDEX TABLE {t}",
    "CLUSTER {t} USING {t}_key",
    "ALTER TABLE {t} SET UNLOGGED",
    "ALTER TABLE {t} SET LOGGED",
    "DROP TABLE {t}",
    "ALTER TABLE {t} ADD COLUMN c{n} int DEFAULT 3",
    "CREATE DATABASE d{n} TEMPLATE template1 STRATEGY file_copy",
    "CREATE DATABASE w{n} TEMPLATE template1 STRATEGY wal_log",
    "DROP DATABASE IF EXISTS d{n}",
    "ALTER DATABASE moving SET TABLESPACE inside",
    "ALTER DATABASE moving SET TABLESPACE pg_default",
    "SELECT lo_from_bytea(0, decode(repeat('ab', 400 * {n}), 'hex'))",
    "BEGIN; UPDATE {t} SET i = i + 1 WHERE i % 50 = 0; PREPARE TRANSACTION 'p{n}'",
    "COMMIT PREPARED 'p{n}'",
    "ROLLBACK PREPARED 'p{n}'",
    "CHECKPOINT",
]
# What a statement left behind so that the others find their table again.
_AGAIN = (
    "CREATE TABLE IF NOT EXISTS {t} (i int, filler text)",
    "CREATE UNIQUE INDEX IF NOT EXISTS {t}_key ON {t} (i, filler)",
)


def run_at_random(cluster: LocalCluster, rng: random.Random, count: int) -> int:
    """Run `count` statements and give how many were carried out: one that does not fit the state
    that it meets, or waits for a lock, changes nothing, and that is fine."""
    done = 0
    with psycopg.connect(cluster.dsn(), autocommit=True) as session:
        session.execute("SET lock_timeout = '100ms'")
        session.execute("SET allow_in_place_tablespaces = on")
        for _ in range(count):
            name, number = rng.choice(["a", "b", "c"]), rng.randint(2, 9)
            texts = [*rng.choice(STATEMENTS).format(t=name, n=number).split("; ")]
            for text in [*texts, *(again.format(t=name) for again in _AGAIN)]:
                try:
                    session.execute(text.encode())
                    done += 1
                except psycopg.Error:
                    session.execute("ROLLBACK")
    return done


def table(cluster: LocalCluster, name: str, rows: int = 4000) -> None:
    """A table of about eleven rows to the page."""
    cluster.execute(
        f"CREATE TABLE {name} AS SELECT i, repeat(md5(i::text), 20) AS filler"
        f" FROM generate_series(1, {rows}) AS i"
    )


def prepare(cluster: LocalCluster) -> None:
    """The tables, the database and the tablespace that the statements work on."""
    cluster.execute("CREATE DATABASE moving")
    with psycopg.connect(cluster.dsn(), autocommit=True) as session:
        session.execute("SET allow_in_place_tablespaces = on")
        session.execute("CREATE TABLESPACE inside LOCATION ''")
    for name in ("a", "b", "c"):
        table(cluster, name)
        cluster.execute(f"CREATE UNIQUE INDEX {name}_key ON {name} (i, filler)")
