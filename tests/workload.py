"""Changes of every kind that moves pages, as small deterministic rounds of SQL."""

from __future__ import annotations

from dbmodule.postgres.cluster import LocalCluster

_SETUP = """
CREATE EXTENSION IF NOT EXISTS amcheck;
CREATE EXTENSION IF NOT EXISTS pg_visibility;
CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL DEFAULT 0, note text);
INSERT INTO account SELECT i, i % 97, repeat('n', i % 50) FROM generate_series(1, 6000) AS i;
CREATE INDEX account_hash ON account USING hash (balance);
CREATE INDEX account_brin ON account USING brin (id);
CREATE TABLE document (id int, words tsvector, area box, body text);
INSERT INTO document
SELECT i, to_tsvector('simple', 'w' || i % 113 || ' v' || i % 7),
       box(point(i % 31, i % 17), point(i % 31 + 2, i % 17 + 3)), repeat(md5(i::text), 40)
  FROM generate_series(1, 1500) AS i;
CREATE INDEX document_gin ON document USING gin (words);
CREATE INDEX document_gist ON document USING gist (area);
CREATE INDEX document_spgist ON document USING spgist (body);
CREATE TABLE toasted (id int PRIMARY KEY, body text);
ALTER TABLE toasted ALTER body SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT i, repeat(md5(i::text), 200) FROM generate_series(1, 60) AS i;
CREATE TABLE shrinking (id int, filler text);
INSERT INTO shrinking SELECT i, repeat('s', 500) FROM generate_series(1, 2000) AS i;
CREATE TABLE vanishing AS SELECT i FROM generate_series(1, 3000) AS i;
CREATE UNLOGGED TABLE forgetful AS SELECT i FROM generate_series(1, 500) AS i;
CREATE SEQUENCE counter;
CREATE MATERIALIZED VIEW summary AS SELECT balance, count(*) FROM account GROUP BY 1;
SELECT lo_from_bytea(0, decode(repeat('ab', 5000), 'hex')) FROM generate_series(1, 3);
VACUUM;
"""

_ROUND = """
UPDATE account SET balance = balance + {n}, note = 'round {n}' WHERE id % 13 = {n} % 13;
DELETE FROM account WHERE id % 41 = {n};
INSERT INTO account SELECT i, {n} FROM generate_series(10000 * {n}, 10000 * {n} + 300) AS i;
UPDATE document SET words = to_tsvector('simple', 'r{n} w' || id % 50) WHERE id % 19 = {n};
INSERT INTO document SELECT i, to_tsvector('simple', 'x' || i), box(point(i, i), point(i, i)), 'b'
  FROM generate_series(1, 80) AS i;
UPDATE toasted SET body = repeat(md5((id + {n})::text), 220) WHERE id % 7 = {n} % 7;
DELETE FROM shrinking WHERE id > 100 * {n};
VACUUM shrinking;
INSERT INTO shrinking SELECT i, repeat('t', 400) FROM generate_series(1, 150 * {n}) AS i;
DROP TABLE IF EXISTS vanishing;
CREATE TABLE appearing_{n} AS SELECT i, md5(i::text) AS m FROM generate_series(1, 2000) AS i;
TRUNCATE forgetful;
INSERT INTO forgetful SELECT generate_series(1, 100 * {n});
SELECT setval('counter', 1000 * {n});
REFRESH MATERIALIZED VIEW summary;
SELECT lo_from_bytea(0, decode(repeat('cd', 3000 * {n}), 'hex'));
VACUUM account;
REINDEX INDEX document_gist;
"""


def _statements(script: str) -> list[str]:
    return [text.strip() for text in script.split(";\n") if text.strip()]


def set_up(cluster: LocalCluster, database: str = "postgres") -> None:
    """Create the tables. Every statement is a transaction of its own."""
    with cluster.connect(database) as session:
        session.autocommit = True
        for statement in _statements(_SETUP):
            session.execute(statement.encode())


def run_round(cluster: LocalCluster, number: int, database: str = "postgres") -> None:
    """Round `number`, from 1: each changes some pages of most tables, and of the catalogs."""
    with cluster.connect(database) as session:
        session.autocommit = True
        for statement in _statements(_ROUND.format(n=number)):
            session.execute(statement.encode())
