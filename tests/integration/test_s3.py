"""S3 as networks and administrators make it: answers lost, servers busy, keys and clocks wrong."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dbmodule.app import App
from dbmodule.config import RepositorySection
from dbmodule.errors import ObjectExistsError, ObjectMissingError, RepositoryError, UsageError
from dbmodule.ports import Buffer
from dbmodule.storage import MemoryStore, RemoteStore, open_store
from dbmodule.storage.probe import check_exclusive
from tests import ddl, oracles
from tests.fault import proxy as faults
from tests.fault.proxy import Exchange, Proxy
from tests.fix_azure import INSTALLED
from tests.fix_backup import SiteFactory
from tests.fix_s3 import BUCKET, S3

SERVERS = ["s3", "azure"] if INSTALLED else ["s3"]


@pytest.fixture
def store(s3: S3, proxy: Proxy) -> RemoteStore:
    return s3.store(endpoint=proxy.endpoint)


def test_a_creation_whose_answer_was_lost_is_known_again(store: RemoteStore, proxy: Proxy) -> None:
    """Seen to fail without the token: the writer of the object was told that another had won."""
    lost = proxy.plan("^PUT", faults.lose_the_answer)
    assert store.put_new("manifest", [b"mine"]) == 4
    assert lost.met == 1
    assert len([line for line in proxy.requests if line.startswith("PUT")]) == 2
    assert store.get("manifest") == b"mine"
    proxy.plan("^PUT", faults.lose_the_answer)
    with pytest.raises(ObjectExistsError):
        store.put_new("manifest", [b"mine"])


@pytest.mark.parametrize(
    ("act", "times"),
    [
        (faults.refuse, 2),
        (faults.reply("503 Slow Down", "SlowDown"), 3),
        (faults.reply("500 Internal Server Error"), 2),
        (faults.reply("429 Too Many Requests", "TooManyRequests"), 2),
    ],
)
def test_what_passes_is_waited_for(
    store: RemoteStore, proxy: Proxy, act: Callable[[Exchange], None], times: int
) -> None:
    content = os.urandom(300_000)
    for method in ("PUT", "GET", "HEAD", "(DELETE|POST)"):
        proxy.plan(f"^{method}", act, times)
    listed = proxy.plan(r"^GET .*\?.*list-type", act, times)
    store.put_new("packs/a", [content])
    assert store.get("packs/a", 100, 50) == content[100:150]
    assert store.size("packs/a") == len(content)
    assert list(store.list("packs/")) == ["packs/a"]
    store.delete("packs/a")
    with pytest.raises(ObjectMissingError):
        store.get("packs/a")
    assert listed.met == times
    assert [fault.met for fault in proxy.faults] == [times] * 5


def test_a_read_that_is_cut_goes_on(store: RemoteStore, proxy: Proxy) -> None:
    content = os.urandom(3_000_000)
    store.put_new("pack", [content])
    for offset, length in ((0, None), (1000, 2_000_000)):
        cut = proxy.plan("^GET", faults.cut_the_answer)
        end = None if length is None else offset + length
        assert store.get("pack", offset, length) == content[offset:end]
        assert cut.met == 1


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        ("403 Forbidden", "RequestTimeTooSkewed", "clock"),
        ("403 Forbidden", "AccessDenied", "right"),
        ("400 Bad Request", "ExpiredToken", "credentials"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    store: RemoteStore, proxy: Proxy, status: str, code: str, says: str
) -> None:
    proxy.plan("^", faults.reply(status, code, "so it is"), 100)
    before = time.monotonic()
    for use in (
        lambda: store.put_new("a", [b"x"]),
        lambda: store.get("a"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ):
        with pytest.raises(RepositoryError, match="so it is") as failure:
            use()
        assert says in failure.value.hint
        assert failure.value.exit_code == 5
        assert not isinstance(failure.value, ObjectMissingError)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("server", SERVERS)
def test_a_wrong_key_is_said_and_not_shown(request: pytest.FixtureRequest, server: str) -> None:
    wrong = "bm90IHRoZSBrZXk="
    key = {"s3": "secret_access_key", "azure": "account_key"}[server]
    with pytest.raises(RepositoryError) as failure:
        request.getfixturevalue(server).store(**{key: wrong}).put_new("a", [b"x"])
    assert "credentials" in failure.value.hint
    assert wrong not in f"{failure.value.message}{failure.value.hint}"


def test_wrong_keys_and_missing_buckets_are_told_apart(s3: S3) -> None:
    wrong = s3.store(secret_access_key="not-the-secret")
    missing = open_store("s3://no-such-bucket/x", s3.options())
    for store, says in ((wrong, "AWS_ACCESS_KEY_ID"), (missing, "Create the bucket")):
        for use in (
            lambda store=store: store.put_new("a", [b"x"]),
            lambda store=store: store.get("a"),
            lambda store=store: list(store.list("")),
        ):
            with pytest.raises(RepositoryError) as failure:
                use()
            assert not isinstance(failure.value, ObjectMissingError)
            assert says in failure.value.hint
            told = f"{failure.value.message} {failure.value.hint}"
            assert "not-the-secret" not in told
            assert s3.secret_access_key not in told


def test_an_unreachable_store_is_given_up(s3: S3) -> None:
    store = s3.store(endpoint="http://127.0.0.1:9")
    with pytest.raises(RepositoryError, match="cannot write") as failure:
        store.put_new("a", [b"x"])
    assert "reached" in failure.value.hint


def test_backups_and_restores_bear_a_bad_network(
    make_site: SiteFactory, s3: S3, proxy: Proxy
) -> None:
    """One request in eight is refused, done without an answer, put off or cut in its answer."""
    rng = random.Random(8)
    acts = [
        faults.refuse,
        faults.lose_the_answer,
        faults.cut_the_answer,
        faults.reply("503 Slow Down", "SlowDown"),
    ]

    def now_and_then(exchange: Exchange) -> None:
        (rng.choice(acts) if rng.random() < 1 / 8 else faults.pass_on)(exchange)

    made = make_site()
    repository = RepositorySection(url=s3.url(), options=s3.options(endpoint=proxy.endpoint))
    config = made.config.model_copy(update={"repository": repository})
    site = replace(made, app=App.open(config), config=config, copies=[])
    fault = proxy.plan("^", now_and_then, 10**9)
    site.app.init(config_path=site.base / "s3.toml", extension=False)
    ddl.table(site.cluster, "t", rows=30_000)
    for take in (site.full, site.diff, site.incr):
        site.cluster.execute("UPDATE t SET filler = md5(filler) WHERE i % 200 = 0")
        report = take()
    expected = oracles.digests(site.cluster)
    assert oracles.digests(site.start_copy(report.backup_id)) == expected
    assert site.app.verify(None).status == "sound"
    assert [found.backup_id for found in site.app.backups()][-1] == report.backup_id
    assert fault.met > 100
    for copy in site.copies:
        site.clusters.discard(copy)


# --- objects of many parts -----------------------------------------------------------------------


@pytest.fixture(params=SERVERS)
def in_parts(request: pytest.FixtureRequest) -> RemoteStore:
    """A store that sends in parts what is longer than 1 MB."""
    store = request.getfixturevalue(request.param).store()
    return RemoteStore(store._backend, store.url, single_put=1 << 20)


def mebibytes(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield bytes([number]) * (1 << 20)


def leftovers(store: RemoteStore) -> list[str]:
    return [found["path"] for page in store._backend.list("tmp") for found in page]


def test_a_long_object_is_sent_in_parts(in_parts: RemoteStore) -> None:
    assert in_parts.put_new("long", mebibytes(40)) == 40 << 20
    assert in_parts.size("long") == 40 << 20
    assert in_parts.get("long", (7 << 20) - 1, 2) == b"\x06\x07"
    with pytest.raises(ObjectExistsError):
        in_parts.put_new("long", mebibytes(30))
    assert in_parts.size("long") == 40 << 20
    assert leftovers(in_parts) == []


def test_racing_writers_of_one_long_object_leave_a_whole_one(in_parts: RemoteStore) -> None:
    """Not always one winner: that depends on the server, and `storage.remote` says what follows."""
    start = threading.Barrier(6)

    def put(number: int) -> bool:
        start.wait()
        try:
            in_parts.put_new("long", [bytes([number]) * (1 << 20)] * 3)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = [number for number, winner in enumerate(pool.map(put, range(6))) if winner]
    assert won
    content = in_parts.get("long")
    assert content in [bytes([number]) * (3 << 20) for number in won]
    with pytest.raises(ObjectExistsError):
        in_parts.put_new("long", [b"late" * (1 << 20)])
    assert in_parts.get("long") == content
    assert leftovers(in_parts) == []


@pytest.mark.parametrize("error", [RuntimeError, FileNotFoundError])
def test_a_long_source_that_fails_leaves_nothing(
    in_parts: RemoteStore, error: type[Exception]
) -> None:
    def chunks() -> Iterator[Buffer]:
        yield from mebibytes(20)
        raise error("the source failed")

    with pytest.raises(error, match="the source failed"):
        in_parts.put_new("long", chunks())
    assert list(in_parts.list("")) == leftovers(in_parts) == []


# --- what names a store --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///x",
        "s3://b/../x",
        "s3://user:secret@b/x",
        "s3://bucket/x?region=y",
        "gs://a b",
    ],
)
def test_urls_that_make_no_sense_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as refusal:
        open_store(url)
    assert "secret" not in f"{refusal.value.message}{refusal.value.hint}"


def test_an_unknown_option_is_refused_without_its_value() -> None:
    with pytest.raises(UsageError, match="configured") as refusal:
        open_store(f"s3://{BUCKET}/x", {"secret_acess_key": "hush"})
    assert "secret_acess_key" in refusal.value.message
    assert "hush" not in refusal.value.message


@pytest.mark.parametrize("url", ["gs://bucket/a/b", "az://container/a/b"])
def test_the_stores_of_other_providers_are_made(url: str) -> None:
    options = {
        "g": {"skip_signature": "true"},
        "a": {"account_name": "me", "skip_signature": "true"},
    }
    assert open_store(url, options[url[0]]).url == url


# --- the race that `init` and `check` run --------------------------------------------------------


class Forgetful(MemoryStore):
    """Ignores the condition, as some servers do."""

    def put_new(self, name: str, chunks: object) -> int:
        self.delete(name)
        return super().put_new(name, chunks)  # type: ignore[arg-type]


def test_a_store_with_two_winners_is_refused(s3: S3) -> None:
    check_exclusive(MemoryStore())
    real = s3.store()
    check_exclusive(real)
    assert list(real.list("")) == []
    with pytest.raises(RepositoryError, match="writers create the same object") as refusal:
        check_exclusive(Forgetful())
    assert refusal.value.exit_code == 5
