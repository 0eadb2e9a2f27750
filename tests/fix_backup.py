"""A server with a repository beside it: what most tests of backups start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from dbmodule.app import App
from dbmodule.config import BackupSection, Config, RepositorySection, ServerSection
from dbmodule.ident import BackupId, BackupType
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.reports import BackupOptions, BackupReport, RestoreOptions
from dbmodule.repository.repository import Repository
from dbmodule.storage import open_store
from tests.fix_cluster import MAJORS, ClusterFactory, Clusters

COPY_OPTIONS = {"archive_mode": "off", "listen_addresses": ""}
"""With these a restored copy is started beside its source."""


@dataclass(slots=True)
class Site:
    """A cluster, the repository that it is backed up into, and the library set up for both."""

    cluster: LocalCluster
    base: Path
    clusters: Clusters
    app: App
    config: Config
    copies: list[LocalCluster] = field(default_factory=list)

    @property
    def repository_path(self) -> Path:
        return self.base / "repository"

    def app_with(self, **server: object) -> App:
        """The library with other settings of the server: ``dsn``, ``pgdata``."""
        changed = self.config.server.model_copy(update=server)
        return App.open(self.config.model_copy(update={"server": changed}))

    def repository(self) -> Repository:
        return Repository.open(open_store(str(self.repository_path)))

    def full(self, **options: object) -> BackupReport:
        return self.backup(BackupType.FULL, **options)

    def diff(self, **options: object) -> BackupReport:
        return self.backup(BackupType.DIFF, **options)

    def incr(self, **options: object) -> BackupReport:
        return self.backup(BackupType.INCR, **options)

    def backup(self, kind: BackupType, **options: object) -> BackupReport:
        return self.app.backup(BackupOptions(kind, **options))  # type: ignore[arg-type]

    def restore(
        self, backup: str = "latest", tablespace_map: Mapping[str, Path] | None = None
    ) -> Path:
        """Restore into a new directory, and give it."""
        target = self.clusters.directory() / "data"
        self.app.restore(RestoreOptions(target, backup, tablespace_map or {}))
        return target

    def copy_at(self, restored: Path) -> LocalCluster:
        """A server, not started, on a restored directory; it is removed with the site."""
        copy = self.clusters.at(restored, self.cluster.major)
        self.copies.append(copy)
        return copy

    def start_copy(
        self, backup: str = "latest", tablespace_map: Mapping[str, Path] | None = None
    ) -> LocalCluster:
        """Restore, start a server on what was restored, and wait for the end of its recovery."""
        copy = self.copy_at(self.restore(backup, tablespace_map))
        copy.start(COPY_OPTIONS)
        copy.wait_recovered()
        return copy

    def baseline_of(self, report: BackupReport) -> BackupId:
        assert report.baseline_id is not None
        return BackupId(report.baseline_id)


class SiteFactory(Protocol):
    """A running cluster with a repository and, unless told otherwise, the extension.

    `cluster` is used instead of a new one; `dbname` is where the library connects to.
    """

    def __call__(
        self,
        major: int = ...,
        *,
        checksums: bool = ...,
        extension: bool = ...,
        settings: Mapping[str, str] | None = ...,
        cluster: LocalCluster | None = ...,
        dbname: str = ...,
    ) -> Site: ...


@pytest.fixture
def make_site(clusters: Clusters, make_cluster: ClusterFactory) -> Iterator[SiteFactory]:
    yield from _factory(clusters, make_cluster)


@pytest.fixture(scope="module")
def make_module_site(
    clusters: Clusters, make_module_cluster: ClusterFactory
) -> Iterator[SiteFactory]:
    """As `make_site`, for sites that all tests of a module share."""
    yield from _factory(clusters, make_module_cluster)


def _factory(clusters: Clusters, make_cluster: ClusterFactory) -> Iterator[SiteFactory]:
    made: list[Site] = []

    def make(
        major: int = MAJORS[-1],
        *,
        checksums: bool = True,
        extension: bool = True,
        settings: Mapping[str, str] | None = None,
        cluster: LocalCluster | None = None,
        dbname: str = "postgres",
    ) -> Site:
        if cluster is None:
            cluster = make_cluster(major, checksums=checksums, settings=settings)
        base = clusters.directory()
        config = Config(
            server=ServerSection(dsn=cluster.dsn(dbname), pgdata=cluster.datadir),
            repository=RepositorySection(url=str(base / "repository")),
            backup=BackupSection(threads=2),
        )
        site = Site(cluster, base, clusters, App.open(config), config)
        made.append(site)
        site.app.init(config_path=base / "dbmodule.toml", extension=extension)
        return site

    yield make
    for site in made:
        for copy in site.copies:
            clusters.discard(copy)
        shutil.rmtree(site.base)


@pytest.fixture
def site(make_site: SiteFactory, pg_major: int, checksums: bool) -> Site:
    # Without checksums hint bits may change a page in silence, which a byte oracle cannot tell
    # from a missed page: so they are logged there.
    return make_site(
        pg_major, checksums=checksums, settings={} if checksums else {"wal_log_hints": "on"}
    )
