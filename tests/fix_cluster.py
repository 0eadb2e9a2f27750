"""Real PostgreSQL servers for tests, made quickly and never left behind.

Fixtures, from cheap to dear:

- ``database``: a fresh database (`Database`) on a server that all tests of its version share;
- ``cluster``: that shared server itself, for reading only: its settings belong to all tests;
- ``own_cluster``: a started server of the test's own, to stop, kill, configure and look inside;
- ``make_cluster``: makes any number of them, as `ClusterFactory` says;
  ``make_module_cluster`` does so for a whole module;
- ``scratch``: a directory with a short path that belongs to the account servers run as.

All but ``scratch`` and the factories run once per version: ``pg_major`` is 15, 17 and 18 unless
``--pg`` says otherwise; ``large_major``, for tests with much data, is the last of them, and all
with ``--matrix full``. ``checksums`` is true, and false as well with ``--matrix full``; own
clusters follow it. A version that is not installed skips its tests, or fails them in CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest

from dbmodule.postgres.cluster import (
    LocalCluster,
    default_os_user,
    find_binaries,
    reachable_binaries,
)

MAJORS = (15, 17, 18)

SETTINGS = {
    "shared_buffers": "16MB",
    "max_connections": "30",
    "wal_level": "replica",
    # What is committed survives a killed server all the same, only not a failing machine.
    "fsync": "off",
}


SCRATCH_BYTES = 6 << 30


@dataclass(frozen=True, slots=True)
class Database:
    """A database that exists for one test."""

    name: str
    cluster: LocalCluster

    @property
    def dsn(self) -> str:
        return self.cluster.dsn(self.name)

    def connect(self, user: str = "postgres") -> psycopg.Connection:
        return self.cluster.connect(self.name, user)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.cluster.query(sql, self.name)

    def execute(self, sql: str) -> None:
        self.cluster.execute(sql, self.name)

    def scalar(self, sql: str) -> Any:
        return self.cluster.scalar(sql, self.name)


class Clusters:
    """Makes servers under one directory, from a data directory per (version, checksums).

    Copying such a template takes a tenth of the time of ``initdb``. Copies share its system
    identifier, as a server and its restored backup do.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.os_user = default_os_user()
        self._numbers = count(1)
        self._templates: dict[tuple[int, bool], Path] = {}
        self._shared: dict[int, LocalCluster] = {}

    def bindir(self, major: int) -> Path:
        """Programs of that version; skips the test, or fails it in CI, where there are none."""
        found = find_binaries(major)
        if found is None:
            pytest.skip(f"PostgreSQL {major} is not installed (scripts/bootstrap test does it)")
        return reachable_binaries(found, self.os_user, self.root)

    def make(
        self,
        major: int = MAJORS[-1],
        *,
        checksums: bool = True,
        durable: bool = False,
        fresh: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> LocalCluster:
        """A new cluster whose server does not run yet.

        `durable` keeps ``fsync`` on; `fresh` runs ``initdb`` for it, for a system identifier of
        its own; `settings` are added to `SETTINGS` in ``postgresql.conf``.
        """
        cluster = self.at(self.directory() / "data", major)
        if fresh:
            cluster.init(checksums=checksums, extra_args=["--no-sync"])
        else:
            self._copy(self._template(major, checksums), cluster.datadir)
        own = SETTINGS | ({"fsync": "on"} if durable else {}) | dict(settings or {})
        cluster.configure(own)
        return cluster

    def at(self, datadir: Path, major: int) -> LocalCluster:
        """A server, not started, on an existing data directory such as a restored one."""
        return LocalCluster(self.bindir(major), datadir, self.directory(), 5432, self.os_user)

    def shared(self, major: int) -> LocalCluster:
        """The running server of that version that all tests share."""
        if major not in self._shared:
            self._shared[major] = self.make(major)
            self._shared[major].start()
        return self._shared[major]

    def directory(self) -> Path:
        """A new empty directory with a short path, owned by the account servers run as."""
        path = self.root / str(next(self._numbers))
        path.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(path, self.os_user, -1)
        return path

    def discard(self, cluster: LocalCluster) -> None:
        """Stop a cluster that is no longer needed and remove it."""
        cluster.stop("immediate")
        shutil.rmtree(cluster.datadir, ignore_errors=True)
        shutil.rmtree(cluster.socket_dir)

    def close(self) -> None:
        for cluster in self._shared.values():
            cluster.stop("immediate")

    def _template(self, major: int, checksums: bool) -> Path:
        if (major, checksums) not in self._templates:
            cluster = self.at(self.directory() / "data", major)
            cluster.init(checksums=checksums, extra_args=["--no-sync"])
            self._templates[major, checksums] = cluster.datadir
        return self._templates[major, checksums]

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", "--reflink=auto", source, target], check=True)


class ClusterFactory(Protocol):
    """`Clusters.make`, and starts the server if `start` (the default). What it made is stopped
    and removed at the end of the fixture's scope."""

    def __call__(
        self,
        major: int = ...,
        *,
        checksums: bool = ...,
        durable: bool = ...,
        fresh: bool = ...,
        start: bool = ...,
        settings: Mapping[str, str] | None = ...,
    ) -> LocalCluster: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dbmodule")
    group.addoption(
        "--pg",
        default=",".join(map(str, MAJORS)),
        metavar="MAJORS",
        help="PostgreSQL versions to test with, comma-separated (default: %(default)s)",
    )
    group.addoption(
        "--matrix",
        choices=("quick", "full"),
        default="quick",
        help="full: own clusters also without data checksums, and much data on every version"
        " (default: %(default)s)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pg_major" in metafunc.fixturenames:
        majors = _chosen_majors(metafunc.config)
        ids = [f"pg{major}" for major in majors]
        metafunc.parametrize("pg_major", majors, indirect=True, ids=ids, scope="session")
    if "large_major" in metafunc.fixturenames:
        majors = _chosen_majors(metafunc.config)
        majors = majors if metafunc.config.getoption("matrix") == "full" else majors[-1:]
        metafunc.parametrize("large_major", majors, ids=[f"pg{major}" for major in majors])
    if "checksums" in metafunc.fixturenames:
        full = metafunc.config.getoption("matrix") == "full"
        values, ids = ([True, False], ["sums", "nosums"]) if full else ([True], ["sums"])
        metafunc.parametrize("checksums", values, indirect=True, ids=ids, scope="session")


def _chosen_majors(config: pytest.Config) -> list[int]:
    words = str(config.getoption("pg")).split(",")
    unknown = [word for word in words if word not in map(str, MAJORS)]
    if unknown:
        raise pytest.UsageError(f"--pg: {', '.join(unknown)} not among {MAJORS}")
    return [int(word) for word in words]


@pytest.fixture(scope="session")
def pg_major(request: pytest.FixtureRequest) -> int:
    """Major version of the server that the test runs against."""
    major: int = request.param
    return major


@pytest.fixture(scope="session")
def checksums(request: pytest.FixtureRequest) -> bool:
    """Whether the test's own clusters have data checksums."""
    value: bool = request.param
    return value


def _scratch() -> str:
    """Where servers and repositories of tests live: in memory where that is large enough.

    Most of a test's time would otherwise go into the fsync of every restored file and object.
    """
    shm = "/dev/shm"
    if not os.access(shm, os.W_OK | os.X_OK):
        return "/tmp"
    status = os.statvfs(shm)
    usable = status.f_bavail * status.f_frsize >= SCRATCH_BYTES
    return shm if usable and not status.f_flag & os.ST_NOEXEC else "/tmp"


@pytest.fixture(scope="session")
def clusters() -> Iterator[Clusters]:
    # Not pytest's own directory: other accounts cannot enter it, and its path is too long for a
    # socket.
    root = Path(tempfile.mkdtemp(prefix="dbm-", dir=_scratch()))
    root.chmod(0o755)
    made = Clusters(root)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(root)


@pytest.fixture
def cluster(clusters: Clusters, pg_major: int) -> LocalCluster:
    return clusters.shared(pg_major)


@pytest.fixture
def database(cluster: LocalCluster) -> Iterator[Database]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    cluster.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield Database(name, cluster)
    cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def make_cluster(clusters: Clusters) -> Iterator[ClusterFactory]:
    yield from _factory(clusters)


@pytest.fixture(scope="module")
def make_module_cluster(clusters: Clusters) -> Iterator[ClusterFactory]:
    yield from _factory(clusters)


@pytest.fixture
def own_cluster(make_cluster: ClusterFactory, pg_major: int, checksums: bool) -> LocalCluster:
    return make_cluster(pg_major, checksums=checksums)


@pytest.fixture
def scratch(clusters: Clusters) -> Iterator[Path]:
    path = clusters.directory()
    yield path
    shutil.rmtree(path)


def _factory(clusters: Clusters) -> Iterator[ClusterFactory]:
    made: list[LocalCluster] = []

    def make(
        major: int = MAJORS[-1],
        *,
        checksums: bool = True,
        durable: bool = False,
        fresh: bool = False,
        start: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> LocalCluster:
        cluster = clusters.make(
            major, checksums=checksums, durable=durable, fresh=fresh, settings=settings
        )
        made.append(cluster)
        if start:
            cluster.start()
        return cluster

    yield make
    for cluster in made:
        clusters.discard(cluster)
