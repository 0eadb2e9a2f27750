"""The functions, the procedure and the tables of the extension, as a session in psql sees them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from dbmodule.postgres.extension import install_plain
from tests.fix_cluster import Database

FULL = "20260131-235900-full-1a2b3c"
INCR_1 = "20260201-000000-incr-1a2b3d"
INCR_2 = "20260201-010000-incr-1a2b3e"
OTHER = "20260202-000000-full-1a2b3f"


@pytest.fixture
def db(database: Database) -> Database:
    install_plain(database.dsn)
    return database


@pytest.fixture
def session(db: Database) -> Iterator[psycopg.Connection]:
    with db.connect() as connection:
        yield connection


def add_backup(db: Database, backup_id: str, baseline: str | None = None) -> None:
    kind = backup_id.split("-")[2]
    baseline_id = "NULL" if baseline is None else f"'{baseline}'"
    db.execute(
        "INSERT INTO dbmodule.backup VALUES "
        f"('{backup_id}', '{kind}', {baseline_id}, 'completed', '', 'main', 1, 1, '0/1', '0/2', "
        f"now(), now(), 'content', 0, 0, 0, 0, 0, 0, 0, 0, repeat('ab', 32))"
    )
    if baseline is not None:
        db.execute(f"INSERT INTO dbmodule.backup_dependency VALUES ('{backup_id}', '{baseline}')")


@pytest.fixture
def chains(db: Database) -> Database:
    add_backup(db, FULL)
    add_backup(db, INCR_1, FULL)
    add_backup(db, INCR_2, INCR_1)
    add_backup(db, OTHER)
    return db


def error_of(session: psycopg.Connection, sql: str, *values: object) -> tuple[str, str, str]:
    """SQLSTATE, message and hint of the error that a statement must raise."""
    with pytest.raises(psycopg.Error) as caught:
        session.execute(sql.encode(), values or None)
    diag = caught.value.diag
    return diag.sqlstate or "", diag.message_primary or "", diag.message_hint or ""


def test_a_function_queues_a_job_and_notifies_at_commit(
    chains: Database, session: psycopg.Connection
) -> None:
    session.execute("LISTEN dbmodule_job")
    assert chains.scalar("SELECT backup_full()") == 1
    assert chains.scalar("SELECT backup_differential('nightly')") == 2
    assert chains.scalar(
        f"SELECT backup_incremental(baseline => '{INCR_1}', label => 'a', detect => 'content')"
    ) == 3  # fmt: skip
    heard = [notify.payload for notify in session.notifies(timeout=5.0, stop_after=3)]
    assert heard == ["1", "2", "3"]
    assert chains.query(
        "SELECT type, baseline_id, label, detect, state, requested_by FROM dbmodule.job"
    ) == [
        ("full", None, "", "auto", "queued", "postgres"),
        ("diff", None, "nightly", "auto", "queued", "postgres"),
        ("incr", INCR_1, "a", "content", "queued", "postgres"),
    ]


@pytest.mark.parametrize(
    ("call", "state", "says"),
    [
        ("backup_full(repeat('x', 201))", "22023", "201 characters"),
        (r"backup_full(E'two\nlines')", "22023", "control characters"),
        (r"backup_full(E'\u009b31m')", "22023", "control characters"),
        ("backup_full(detect => 'ptrack')", "22023", "unknown detector 'ptrack'"),
        ("backup_full(detect => NULL)", "22023", "unknown detector NULL"),
        ("backup_differential(baseline => '../../etc/passwd')", "22023", "not a backup id"),
        (f"backup_differential(baseline => E'{FULL}\\n')", "22023", "not a backup id"),
        ("backup_incremental(baseline => repeat('x', 1000000))", "22023", "not a backup id"),
        (f"backup_incremental(baseline => '{INCR_1}')", "42704", "there is no backup"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_hint(
    db: Database, session: psycopg.Connection, call: str, state: str, says: str
) -> None:
    found, message, hint = error_of(session, f"SELECT {call}")
    assert found == state
    assert says in message
    assert len(message) < 200
    assert hint
    assert db.scalar("SELECT count(*) FROM dbmodule.job") == 0


@pytest.mark.parametrize(
    "label", ["", "x" * 200, "'); DROP TABLE dbmodule.job; --", "%s %I {0} $1", "héllo ✓ 日本語"]
)
def test_a_label_is_only_text(db: Database, session: psycopg.Connection, label: str) -> None:
    session.execute("SELECT backup_full(%s)", [label])
    assert db.query("SELECT label FROM dbmodule.job") == [(label,)]


def test_the_session_setting_for_strings_changes_nothing(
    db: Database, session: psycopg.Connection
) -> None:
    session.execute("SET standard_conforming_strings = off")
    session.execute("SELECT backup_full('plain')")
    assert error_of(session, "SELECT backup_full(chr(27))")[0] == "22023"


def test_status_says_when_no_agent_is_there(db: Database) -> None:
    db.execute("SELECT backup_full()")
    ((state, percent, hint),) = db.query("SELECT state, percent, hint FROM backup_status(1)")
    assert (state, percent) == ("queued", None)
    assert "dbmodule agent" in hint


def test_status_of_an_unknown_job_is_an_error(db: Database, session: psycopg.Connection) -> None:
    assert error_of(session, "SELECT * FROM backup_status(9)")[1] == "there is no job 9"
    assert error_of(session, "SELECT * FROM backup_status(NULL)")[1] == "there is no job NULL"


def test_the_chain_goes_from_the_full_down(chains: Database, session: psycopg.Connection) -> None:
    assert chains.query(
        f"SELECT ordinal, backup_id, type, baseline_id FROM backup_chain('{INCR_2}')"
    ) == [(1, FULL, "full", None), (2, INCR_1, "incr", FULL), (3, INCR_2, "incr", INCR_1)]
    assert chains.query("SELECT backup_id, depth, member_id FROM dbmodule.chain ORDER BY 1, 2") == [
        (FULL, 0, FULL),
        (INCR_1, 0, FULL),
        (INCR_1, 1, INCR_1),
        (INCR_2, 0, FULL),
        (INCR_2, 1, INCR_1),
        (INCR_2, 2, INCR_2),
        (OTHER, 0, OTHER),
    ]
    assert error_of(session, "SELECT * FROM backup_chain('x')")[0] == "42704"
    # Nonsense in the table does not hang a query.
    chains.execute(
        f"UPDATE dbmodule.backup SET type = 'incr', baseline_id = '{INCR_2}' "
        f"WHERE backup_id = '{FULL}'; "
        f"INSERT INTO dbmodule.backup_dependency VALUES ('{FULL}', '{INCR_2}')"
    )
    assert len(chains.query(f"SELECT * FROM backup_chain('{INCR_2}')")) == 3
    assert len(chains.query("SELECT * FROM dbmodule.chain")) == 10


def test_a_backup_that_others_depend_on_cannot_be_deleted(
    chains: Database, session: psycopg.Connection
) -> None:
    for needed in (FULL, INCR_1):
        with pytest.raises(psycopg.errors.IntegrityError):
            session.execute("DELETE FROM dbmodule.backup WHERE backup_id = %s", [needed])
    for free in (INCR_2, INCR_1, FULL):
        session.execute("DELETE FROM dbmodule.backup WHERE backup_id = %s", [free])
    assert chains.query("SELECT backup_id FROM dbmodule.backup") == [(OTHER,)]
    assert chains.query("SELECT * FROM dbmodule.backup_dependency") == []


def test_events_tell_of_jobs_and_are_bounded(db: Database) -> None:
    db.execute("SELECT backup_full()")
    db.execute(
        "UPDATE dbmodule.job SET state = 'failed', finished_at = now(), error = "
        '\'{"message": "no space"}\''
    )
    assert db.query("SELECT kind, job_id, message FROM dbmodule.event") == [
        ("job_queued", 1, "asked for by postgres"),
        ("job_failed", 1, "no space"),
    ]
    db.execute(
        "INSERT INTO dbmodule.event (kind) SELECT 'x' FROM generate_series(1, 20000); "
        "SELECT backup_full()"
    )
    assert db.scalar("SELECT count(*) FROM dbmodule.event") == 10000


class TestWait:
    def test_it_returns_when_the_job_completes_and_holds_no_snapshot(
        self, db: Database, session: psycopg.Connection
    ) -> None:
        db.execute("SELECT backup_full()")
        done = threading.Event()

        def wait() -> None:
            with db.connect() as waiter:
                waiter.execute("SET default_transaction_isolation = 'repeatable read'")
                waiter.execute("CALL backup_wait(1, '20 s')")
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        oldest = (
            "SELECT clock_timestamp() - xact_start FROM pg_stat_activity "
            "WHERE query LIKE 'CALL backup_wait%%' AND xact_start IS NOT NULL"
        )
        until = time.monotonic() + 2.0
        ages = []
        while time.monotonic() < until:
            ages += [row[0].total_seconds() for row in session.execute(oldest.encode())]
            done.wait(0.05)
        assert ages and max(ages) < 1.0
        assert not done.is_set()
        db.execute(
            "UPDATE dbmodule.job SET state = 'completed', finished_at = now(), "
            f"backup_id = '{FULL}'"
        )
        assert done.wait(5.0)
        thread.join()

    def test_a_failed_job_raises_its_error(self, db: Database, session: psycopg.Connection) -> None:
        db.execute("SELECT backup_full()")
        db.execute(
            "UPDATE dbmodule.job SET state = 'failed', finished_at = now(), error = "
            '\'{"code": "source", "message": "100% of %s is gone", "hint": "Look."}\''
        )
        assert error_of(session, "CALL backup_wait(1)") == (
            "38000",
            "job 1 failed: 100% of %s is gone",
            "Look.",
        )

    def test_a_cancelled_or_deleted_job_raises(
        self, db: Database, session: psycopg.Connection
    ) -> None:
        db.execute("SELECT backup_full()")
        db.execute("UPDATE dbmodule.job SET state = 'cancelled', finished_at = now()")
        assert "was cancelled" in error_of(session, "CALL backup_wait(1)")[1]
        db.execute("DELETE FROM dbmodule.job")
        assert error_of(session, "CALL backup_wait(1)")[0] == "42704"

    def test_the_timeout_raises_and_the_job_goes_on(
        self, db: Database, session: psycopg.Connection
    ) -> None:
        db.execute("SELECT backup_full()")
        state, message, hint = error_of(session, "CALL backup_wait(%s, '0.3 s')", 1)
        assert state == "55000"
        assert "did not end within" in message
        assert "backup_status" in hint
        assert error_of(session, "CALL backup_wait(1, NULL)")[0] == "22004"

    @pytest.mark.parametrize(
        "statement",
        [
            "BEGIN; DO $$ BEGIN CALL backup_wait(backup_full()); END $$",
            "DO $$ BEGIN CALL backup_wait(backup_full()); END $$",
            "BEGIN; SAVEPOINT s; SELECT backup_full(); CALL backup_wait(2)",
        ],
    )
    def test_a_job_of_the_same_transaction_is_refused(
        self, db: Database, session: psycopg.Connection, statement: str
    ) -> None:
        db.execute("SELECT backup_full()")
        state, message, hint = error_of(session, statement)
        assert state == "55000"
        assert "in this same transaction" in message
        assert "commit first" in hint

    @pytest.mark.parametrize(
        "statement",
        [
            "BEGIN; CALL backup_wait(1)",
            "SELECT 1; CALL backup_wait(1)",
            "BEGIN; SAVEPOINT s; CALL backup_wait(1)",
            "BEGIN; DO $$ BEGIN CALL backup_wait(1); END $$",
        ],
    )
    def test_a_transaction_block_is_refused(
        self, db: Database, session: psycopg.Connection, statement: str
    ) -> None:
        db.execute("SELECT backup_full()")
        state, message, hint = error_of(session, statement)
        assert state == "25001"
        assert "transaction block" in message
        assert "autocommit" in hint

    def test_a_job_that_is_not_visible_is_refused(
        self, db: Database, session: psycopg.Connection
    ) -> None:
        with db.connect() as other, other.transaction():
            other.execute("SELECT backup_full()")
            assert error_of(session, "CALL backup_wait(1)")[0] == "42704"

    def test_a_hostile_search_path_changes_nothing(
        self, db: Database, session: psycopg.Connection
    ) -> None:
        session.execute(
            "CREATE SCHEMA evil; "
            "CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql "
            "AS 'SELECT NULL::timestamptz'; "
            'CREATE FUNCTION evil.format(text, VARIADIC "any") RETURNS text LANGUAGE internal '
            "AS 'text_format'; "
            "CREATE FUNCTION evil.boom(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql "
            "AS 'BEGIN RAISE division_by_zero; END'; "
            "CREATE FUNCTION evil.add(timestamptz, interval) RETURNS timestamptz LANGUAGE plpgsql "
            "AS 'BEGIN RAISE division_by_zero; END'; "
            "CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE plpgsql "
            "AS 'BEGIN RAISE division_by_zero; END'; "
            "CREATE OPERATOR evil.>= (FUNCTION = evil.boom, LEFTARG = timestamptz, "
            "RIGHTARG = timestamptz); "
            "CREATE OPERATOR evil.+ (FUNCTION = evil.add, LEFTARG = timestamptz, "
            "RIGHTARG = interval); "
            "CREATE OPERATOR evil.= (FUNCTION = evil.same, LEFTARG = text, RIGHTARG = text); "
            "CREATE DOMAIN evil.timestamptz AS integer; "
            "SET search_path = evil, pg_catalog, public"
        )
        session.execute("SELECT backup_full()")
        assert error_of(session, "CALL backup_wait(1, '0.1 s')")[0] == "55000"
        assert len(session.execute("SELECT * FROM backup_status(1)").fetchall()) == 1
        assert error_of(session, "SELECT * FROM backup_chain('x')")[0] == "42704"
