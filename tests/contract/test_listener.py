"""Each listener behind the port, on real servers: hints arrive, and a lost connection is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from dbmodule.errors import ServerError
from dbmodule.notify import PgPubSubListener, PsycopgListener, open_listener
from dbmodule.ports import Listener
from tests.fix_cluster import Database

LISTENING = "application_name = 'dbmodule listener' AND datname = current_database()"

OpenListener = Callable[[str], Listener]


@pytest.fixture(params=[PgPubSubListener, PsycopgListener])
def open_one(request: pytest.FixtureRequest) -> OpenListener:
    chosen: OpenListener = request.param
    return chosen


@pytest.fixture
def listener(open_one: OpenListener, database: Database) -> Iterator[Listener]:
    with closing(open_one(database.dsn)) as listening:
        yield listening


def test_a_notification_from_before_the_wait_is_not_missed(
    listener: Listener, database: Database
) -> None:
    database.execute("SELECT pg_notify('dbmodule_job', '1')")
    assert listener.wait(5.0)
    assert not listener.wait(0.0)


def test_a_notification_ends_a_wait_that_has_begun(listener: Listener, database: Database) -> None:
    notify = threading.Timer(0.2, database.execute, ["SELECT pg_notify('dbmodule_job', '1')"])
    notify.start()
    began = time.monotonic()
    assert listener.wait(30.0)
    assert time.monotonic() - began < 10.0
    notify.join()


def test_many_notifications_are_one_hint(listener: Listener, database: Database) -> None:
    database.execute("SELECT pg_notify('dbmodule_job', n::text) FROM generate_series(1, 50) AS n")
    assert listener.wait(5.0)
    assert not listener.wait(0.1)


def test_other_channels_and_rolled_back_notifications_are_not_heard(
    listener: Listener, database: Database
) -> None:
    database.execute("SELECT pg_notify('other', '1')")
    database.execute("BEGIN; SELECT pg_notify('dbmodule_job', '1'); ROLLBACK")
    assert not listener.wait(0.2)


def test_nothing_is_executed_after_listen(listener: Listener, database: Database) -> None:
    database.execute("SELECT pg_notify('dbmodule_job', '1')")
    listener.wait(5.0)
    listener.wait(0.0)
    query = f"SELECT query FROM pg_stat_activity WHERE {LISTENING}"
    assert database.scalar(query).rstrip(";") == "LISTEN dbmodule_job"


def test_a_terminated_connection_is_told_within_the_wait(
    listener: Listener, database: Database
) -> None:
    database.query(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {LISTENING}")
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        listener.wait(30.0)
    assert time.monotonic() - began < 10.0
    assert caught.value.hint
    with pytest.raises(ServerError):
        listener.wait(0.0)


def test_a_server_that_is_not_there_is_a_server_error(open_one: OpenListener) -> None:
    with pytest.raises(ServerError):
        open_one("host=/nonexistent port=1 dbname=x")


def test_pgpubsub_is_preferred(database: Database) -> None:
    with closing(open_listener(database.dsn)) as chosen:
        assert isinstance(chosen, PgPubSubListener)
