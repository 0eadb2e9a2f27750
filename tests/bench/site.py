"""A server with a pgbench database and an empty repository beside it, for benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dbmodule.app import App
from dbmodule.config import BackupSection, Config, RepositorySection, ServerSection
from dbmodule.postgres.cluster import LocalCluster
from tests.fix_cluster import Clusters


@dataclass(frozen=True)
class BenchSite:
    cluster: LocalCluster
    base: Path
    """A directory for what the benchmark makes."""
    app: App

    @property
    def repository(self) -> Path:
        return self.base / "repository"


@contextmanager
def bench_site(
    scratch: str, major: int, scale: int, settings: Mapping[str, str]
) -> Iterator[BenchSite]:
    """Removed, with the server, at the end."""
    with tempfile.TemporaryDirectory(prefix="dbm-bench-", dir=scratch) as directory:
        root = Path(directory)
        root.chmod(0o755)
        clusters = Clusters(root)
        cluster = clusters.make(major, settings=settings)
        cluster.start()
        try:
            cluster.run("pgbench", "--initialize", "--quiet", f"--scale={scale}", "postgres")
            base = clusters.directory()
            config = Config(
                server=ServerSection(dsn=cluster.dsn("postgres"), pgdata=cluster.datadir),
                repository=RepositorySection(url=str(base / "repository")),
                backup=BackupSection(threads=2),
            )
            app = App.open(config)
            app.init(config_path=base / "dbmodule.toml", extension=True)
            yield BenchSite(cluster, base, app)
        finally:
            cluster.stop("immediate")
