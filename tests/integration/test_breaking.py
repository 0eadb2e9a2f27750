"""Restores that were silently wrong until somebody tried them."""

from __future__ import annotations

import pytest

from dbmodule.errors import ServerError
from dbmodule.ident import BackupType
from dbmodule.reports import BackupOptions
from tests.fix_backup import Site, SiteFactory


@pytest.fixture(scope="module")
def site(make_module_site: SiteFactory, pg_major: int) -> Site:
    return make_module_site(pg_major)


def test_a_database_that_moves_meanwhile_fails_the_backup(site: Site) -> None:
    """Replay copies the directory that it moved from: the restored one had no PG_VERSION."""
    place = site.clusters.directory()
    site.cluster.execute(f"CREATE TABLESPACE moved_to LOCATION '{place}'")
    site.cluster.execute("CREATE DATABASE moving")
    waiting = ["ALTER DATABASE moving SET TABLESPACE moved_to"]

    def move(phase: str, done: int, total: int) -> None:
        if phase == "copy" and waiting:
            site.cluster.execute(waiting.pop())

    with pytest.raises(ServerError, match="was moved out of tablespace 1663"):
        site.app.backup(BackupOptions(BackupType.FULL), progress=move)
    assert site.app.backups() == []
    site.cluster.execute("DROP DATABASE moving")
    site.cluster.execute("DROP TABLESPACE moved_to")
