"""A chain of real backups, and what the library restores from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.compaction import mostly_dead, rewrite
from dbmodule.config import Config, RepositorySection, ServerSection
from dbmodule.ident import BackupType
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.reports import BackupOptions, RestoreOptions
from dbmodule.repository.pack import name_of
from dbmodule.repository.repository import Repository
from dbmodule.repository.usage import Usage
from dbmodule.storage import LocalStore
from tests.fix_cluster import ClusterFactory, Clusters


@pytest.fixture(scope="module")
def workshop(clusters: Clusters) -> Iterator[Path]:
    """A directory for the module, with a short path."""
    path = clusters.directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def cluster(make_module_cluster: ClusterFactory) -> LocalCluster:
    return make_module_cluster()


@pytest.fixture(scope="module")
def chain_app(workshop: Path, cluster: LocalCluster, clusters: Clusters) -> App:
    """Full, differential and incremental backups of one server, and every way of changing files."""
    app = App.open(
        Config(
            server=ServerSection(dsn=cluster.dsn(), pgdata=cluster.datadir),
            repository=RepositorySection(url=str(workshop / "repository")),
        )
    )
    app.init(config_path=workshop / "dbmodule.toml", extension=True)
    location = clusters.directory()
    cluster.execute(f"CREATE TABLESPACE elsewhere LOCATION '{location}'")
    cluster.execute(
        "CREATE TABLE kept AS SELECT n, repeat('k', 200) FROM generate_series(1, 9000) n"
    )
    cluster.execute("CREATE TABLE grown AS SELECT n FROM generate_series(1, 1000) n")
    cluster.execute("CREATE TABLE shrunk AS SELECT n FROM generate_series(1, 50000) n")
    cluster.execute("CREATE TABLE dropped AS SELECT n FROM generate_series(1, 1000) n")
    cluster.execute("CREATE TABLE away (n int) TABLESPACE elsewhere")
    cluster.execute("CREATE UNLOGGED TABLE fleeting (n int)")
    app.backup(BackupOptions(BackupType.FULL, label="“first”"))
    cluster.execute("UPDATE kept SET n = -n WHERE n % 1000 = 0")
    cluster.execute("INSERT INTO grown SELECT n FROM generate_series(1, 100000) n")
    cluster.execute("INSERT INTO away SELECT n FROM generate_series(1, 5000) n")
    cluster.execute("DROP TABLE dropped")
    app.backup(BackupOptions(BackupType.DIFF))
    cluster.execute("DELETE FROM shrunk WHERE n > 1000")
    cluster.execute("VACUUM shrunk")
    cluster.execute("UPDATE kept SET n = n + 1 WHERE n % 777 = 0")
    cluster.execute("CREATE DATABASE copied TEMPLATE postgres STRATEGY FILE_COPY")
    app.backup(BackupOptions(BackupType.INCR))
    return app


@pytest.fixture(scope="module")
def long_chain(workshop: Path, chain_app: App) -> tuple[Path, list[str]]:
    """The repository, and its backups from the full down."""
    return workshop / "repository", chain_app.show("latest").chain


@pytest.fixture(scope="module")
def moved_chain(workshop: Path, long_chain: tuple[Path, list[str]]) -> Path:
    """A copy of the repository in which every frame was moved to another pack."""
    copy = workshop / "moved"
    shutil.copytree(long_chain[0], copy)
    repository = Repository.open(LocalStore(copy))
    usage = Usage(repository)
    for manifest in repository.manifests("main").values():
        usage.add(manifest, every_frame=True)
    packs = mostly_dead(repository, usage, 2.0, ())
    rewrite(repository, usage, packs, before_write=lambda: None, progress=lambda done, total: None)
    for ref in packs:
        repository.store.delete(name_of(ref.pack))
    return copy


@pytest.fixture(scope="module")
def encrypted_app(workshop: Path, cluster: LocalCluster, chain_app: App) -> App:
    """A full and an incremental of the same server in an encrypted repository."""
    url, key_file = str(workshop / "encrypted"), workshop / "master.key"
    app = App.open(
        Config(
            server=ServerSection(dsn=cluster.dsn(), pgdata=cluster.datadir),
            repository=RepositorySection(url=url, key_file=key_file),
        )
    )
    app.init(config_path=workshop / "encrypted.toml", extension=False)
    app.backup(BackupOptions(BackupType.FULL))
    cluster.execute("UPDATE kept SET n = n + 1 WHERE n % 555 = 0")
    app.backup(BackupOptions(BackupType.INCR))
    return app


@pytest.fixture(scope="module")
def encrypted_chain(workshop: Path, encrypted_app: App) -> tuple[Path, list[str], str]:
    """The repository, its backups from the full down, and the master key."""
    key = (workshop / "master.key").read_text().strip()
    return workshop / "encrypted", encrypted_app.show("latest").chain, key


@pytest.fixture(scope="module")
def encrypted_restore(workshop: Path, encrypted_app: App) -> Path:
    return _restored(workshop, encrypted_app, "encrypted")


@pytest.fixture(scope="module")
def library_restore(workshop: Path, chain_app: App) -> Path:
    """The latest backup as the library restores it."""
    return _restored(workshop, chain_app, "plain")


def _restored(workshop: Path, app: App, name: str) -> Path:
    target = workshop / f"restored-{name}"
    tablespaces = app.show("latest").tablespaces
    mapping = {source: workshop / f"{name}-{oid}" for oid, source in tablespaces.items()}
    app.restore(RestoreOptions(target=target, tablespace_map=mapping))
    return target
