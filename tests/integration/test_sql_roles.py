"""Who may do what: each role tries what it is for and what it is not."""

from __future__ import annotations

import psycopg
import pytest

from dbmodule.postgres.extension import install_plain
from tests.fix_cluster import Database

STATUS = "SELECT * FROM backup_status(1)"
CHAIN = "SELECT * FROM backup_chain('x')"
ENQUEUE = "SELECT backup_full('mine')"
WAIT = "CALL backup_wait(1, '0 s')"
READ = "SELECT FROM dbmodule.{}"
TABLES = (
    "backup",
    "backup_dependency",
    "backup_relation",
    "corrupt_page",
    "job",
    "lineage",
    "event",
    "chain",
)
WRITES = (
    "INSERT INTO dbmodule.job (type) VALUES ('full')",
    "UPDATE dbmodule.job SET state = 'queued'",
    "DELETE FROM dbmodule.job",
    "DELETE FROM dbmodule.backup",
    "DELETE FROM dbmodule.event",
    "TRUNCATE dbmodule.lineage",
    "INSERT INTO dbmodule.lineage (mark, backup_id, position) "
    "VALUES (repeat('a', 32), 'x', 'stop')",
    "SELECT dbmodule.enqueue('full', NULL, '', 'auto')",
    "DROP TABLE dbmodule.job",
    "CREATE TABLE dbmodule.mine ()",
)


@pytest.fixture
def db(database: Database) -> Database:
    install_plain(database.dsn)
    database.execute("SELECT backup_full()")
    return database


def allowed(session: psycopg.Connection, sql: str) -> bool:
    """Whether the session may run it; any other error than a refusal counts as allowed."""
    try:
        session.execute(sql.encode())
    except psycopg.errors.InsufficientPrivilege:
        return False
    except psycopg.Error:
        return True
    return True


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("nobody", ()),
        ("dbmodule_reader", (STATUS, CHAIN, READ)),
        ("dbmodule_operator", (STATUS, CHAIN, READ, ENQUEUE, WAIT)),
        ("dbmodule_admin", (STATUS, CHAIN, READ, ENQUEUE, WAIT)),
        ("dbmodule_agent", (STATUS, CHAIN, READ, *WRITES[:5], WRITES[6])),
    ],
)
def test_a_role_may_do_what_it_is_for_and_no_more(
    db: Database, role: str, may: tuple[str, ...]
) -> None:
    login = f"login_{role}"
    db.execute(f"DROP ROLE IF EXISTS {login}; CREATE ROLE {login} LOGIN")
    if role != "nobody":
        db.execute(f"GRANT {role} TO {login}")
    try:
        with db.connect(login) as session:
            for sql in (STATUS, CHAIN, ENQUEUE, WAIT, *WRITES):
                assert allowed(session, sql) == (sql in may), sql
            for table in TABLES:
                assert allowed(session, READ.format(table)) == (READ in may), table
    finally:
        db.execute(f"DROP ROLE {login}")


def test_a_job_names_the_login_that_asked_whatever_role_it_has_set(db: Database) -> None:
    db.execute(
        "DROP ROLE IF EXISTS asker; CREATE ROLE asker LOGIN; GRANT dbmodule_operator TO asker"
    )
    try:
        with db.connect("asker") as session:
            session.execute("SET ROLE dbmodule_operator")
            session.execute(ENQUEUE)
        query = "SELECT requested_by FROM dbmodule.job WHERE label = 'mine'"
        assert db.query(query) == [("asker",)]
    finally:
        db.execute("DROP ROLE asker")


def test_functions_of_the_definer_do_not_look_into_the_callers_schemas(db: Database) -> None:
    db.execute(
        "DROP ROLE IF EXISTS asker; CREATE ROLE asker LOGIN; GRANT dbmodule_operator TO asker"
    )
    db.execute("CREATE SCHEMA evil AUTHORIZATION asker")
    try:
        with db.connect("asker") as session:
            session.execute(
                "CREATE FUNCTION evil.length(text) RETURNS integer LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'as %', current_user; END $$; "
                "CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'as %', current_user; END $$; "
                "CREATE TEMP TABLE pg_class (x int); "
                "SET search_path = evil, pg_temp, pg_catalog, public"
            )
            session.execute(ENQUEUE)
    finally:
        db.execute("DROP OWNED BY asker; DROP ROLE asker")


def test_nothing_is_granted_to_public_and_everything_has_a_comment(db: Database) -> None:
    public = db.query(
        "SELECT p.oid::regprocedure::text FROM pg_proc AS p "
        "WHERE (p.pronamespace = 'dbmodule'::regnamespace OR p.proname LIKE 'backup\\_%') "
        "AND p.pronamespace <> 'pg_catalog'::regnamespace "
        "AND has_function_privilege(0::oid, p.oid, 'EXECUTE')"
    )
    assert public == []
    uncommented = db.query(
        "SELECT c.relname, a.attname FROM pg_class AS c "
        "JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 "
        "WHERE c.relnamespace = 'dbmodule'::regnamespace AND c.relkind IN ('r', 'v') "
        "AND (col_description(c.oid, a.attnum) IS NULL OR obj_description(c.oid) IS NULL)"
    )
    assert uncommented == []
    silent = db.query(
        "SELECT p.oid::regprocedure::text FROM pg_proc AS p "
        "WHERE (p.pronamespace = 'dbmodule'::regnamespace OR p.proname LIKE 'backup\\_%') "
        "AND p.pronamespace <> 'pg_catalog'::regnamespace AND obj_description(p.oid) IS NULL"
    )
    assert silent == []


def test_definers_functions_pin_their_search_path(db: Database) -> None:
    assert (
        db.query(
            "SELECT p.oid::regprocedure::text FROM pg_proc AS p WHERE p.prosecdef "
            "AND NOT coalesce(p.proconfig @> ARRAY['search_path=pg_catalog, pg_temp'], false) "
            "AND p.pronamespace IN ('dbmodule'::regnamespace, 'public'::regnamespace)"
        )
        == []
    )
