"""What changed, by name: in the repository, in `show` and in SQL."""

from __future__ import annotations

import psycopg
import pytest

from tests.fix_backup import Site, SiteFactory
from tests.integration.test_choices import dbmodule

GROWING = """
SELECT database_name, table_name, sum(r.pages_changed)
  FROM dbmodule.backup_relation AS r JOIN dbmodule.backup USING (backup_id)
 WHERE type = 'diff' GROUP BY 1, 2 ORDER BY 3 DESC LIMIT 1
"""


@pytest.fixture
def site(make_site: SiteFactory, pg_major: int) -> Site:
    site = make_site(pg_major, settings={"autovacuum": "off"})
    site.cluster.execute("CREATE DATABASE other")
    for statement in (
        'CREATE SCHEMA "Odd one"',
        'CREATE TABLE "Odd one".big (i int PRIMARY KEY, doc text)',
        'ALTER TABLE "Odd one".big ALTER doc SET STORAGE EXTERNAL',
        'INSERT INTO "Odd one".big SELECT i, repeat(md5(i::text), 200)'
        " FROM generate_series(1, 500) AS i",
    ):
        site.cluster.execute(statement, "other")
    site.cluster.execute("CREATE TABLE small AS SELECT 1 AS i")
    site.full()
    return site


def test_changes_have_the_names_of_their_relations(site: Site) -> None:
    with psycopg.connect(site.cluster.dsn("other"), autocommit=True) as session:
        session.execute("""UPDATE "Odd one".big SET doc = doc || 'x'""")
    site.cluster.execute("ALTER DATABASE other CONNECTION LIMIT 7")  # shared: pg_database
    site.cluster.execute("CREATE TABLE small_too AS SELECT 1 AS i")
    report = site.diff()
    columns = "database_name, relation_name, table_name, fork, pages_changed"
    rows = site.cluster.query(
        f"SELECT {columns} FROM dbmodule.backup_relation WHERE backup_id = '{report.backup_id}'"
    )
    found = {(row[0], row[2], row[3]): row[4] for row in rows if row[1] == row[2]}
    table = '"Odd one".big'
    assert found["other", table, "main"] >= 5
    assert found["postgres", "public.small_too", "main"] == 1
    assert ("postgres", "public.small", "main") not in found
    assert found[None, "pg_catalog.pg_database", "main"] >= 1
    # Indexes, TOAST and the index of TOAST are their table's.
    of_table = {row[1] for row in rows if row[2] == table}
    oid = site.cluster.scalar("SELECT '\"Odd one\".big'::regclass::oid", "other")
    toast = f"pg_toast.pg_toast_{oid}"
    assert {table, '"Odd one".big_pkey', toast, f"{toast}_index"} <= of_table
    assert site.cluster.query(GROWING)[0][:2] == ("other", table)
    # The same in the repository, in the order of size.
    _, shown = dbmodule(site, "show", report.backup_id)
    in_repository = [
        tuple(change[name] for name in columns.split(", ")) for change in shown["relations"]
    ]
    assert sorted(in_repository, key=repr) == sorted(rows, key=repr)
    pages = [change["pages_changed"] for change in shown["relations"]]
    assert pages == sorted(pages, reverse=True)
    assert sum(pages) <= report.pages_changed


def test_names_that_cannot_be_had_cost_the_names_only(site: Site) -> None:
    """A database that takes no connections, and a relation that is gone when names are asked."""
    site.cluster.execute("UPDATE small SET i = 2")
    with psycopg.connect(site.cluster.dsn("other"), autocommit=True) as session:
        session.execute("""UPDATE "Odd one".big SET doc = doc || 'x'""")
    site.cluster.execute("ALTER DATABASE other ALLOW_CONNECTIONS off")
    report = site.diff()
    rows = site.cluster.query(
        "SELECT database_name, relation_name, sum(pages_changed) FROM dbmodule.backup_relation"
        f" WHERE backup_id = '{report.backup_id}' GROUP BY 1, 2"
    )
    found = {row[:2]: row[2] for row in rows}
    assert found["other", None] >= 100
    assert found["postgres", "public.small"] == 1
