"""Files that change between listing, opening and reading, and pages that do not verify."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dbmodule import page
from dbmodule.backup.batch import REREAD_SECONDS
from dbmodule.backup.run import take_backup
from dbmodule.backup.steps import Environment
from dbmodule.catalog import SqlCatalog
from dbmodule.datafile import tablespace_version_directory
from dbmodule.ident import PAGE_SIZE, BackupType, Lsn
from dbmodule.manifest import Manifest
from dbmodule.pgdata.source import LocalDataDirectory, host_boot_id
from dbmodule.ports import never_cancelled, no_progress
from dbmodule.postgres.cluster import LocalCluster
from dbmodule.postgres.server import PsycopgServer
from dbmodule.processes import LocalProcesses
from dbmodule.reports import BackupOptions
from tests.fault.changing import ChangingDirectory, Once, OnOpen, OnRead
from tests.fix_backup import Site, SiteFactory

ROWS = 3000


def nothing(path: str) -> None:
    """The hook that does nothing."""


def as_read(path: str, data: memoryview, offset: int) -> int:
    """The hook that changes nothing."""
    return len(data)


def back_up(
    site: Site,
    kind: BackupType = BackupType.FULL,
    *,
    before: OnOpen = nothing,
    after: OnOpen = nothing,
    on_read: OnRead = as_read,
) -> Manifest:
    """An online backup of a directory with hooks."""
    server = PsycopgServer(site.cluster.dsn())
    try:
        identity = server.identify()
        version = tablespace_version_directory(identity.major, identity.catalog_version)
        directory = LocalDataDirectory(site.cluster.datadir, version)
        repository = site.repository()
        environment = Environment(
            repository=repository,
            cluster="main",
            directory=ChangingDirectory(directory, before=before, after=after, on_read=on_read),
            server=server,
            catalog=SqlCatalog(site.cluster.dsn()),
            names=None,
            boot_id=host_boot_id(),
            host="",
            threads=2,
            compression_level=1,
            locks=repository.locks(LocalProcesses()),
        )
        return take_backup(
            environment,
            BackupOptions(kind),
            job_id=None,
            progress=no_progress,
            cancelled=never_cancelled,
        ).manifest
    finally:
        server.close()


def make_table(site: Site, name: str) -> str:
    """A table of some twenty pages, on disk; gives its file."""
    site.cluster.execute(
        f"CREATE TABLE {name} AS SELECT g, md5(g::text) AS m FROM generate_series(1, {ROWS}) g"
    )
    site.cluster.execute("CHECKPOINT")
    return file_of(site.cluster, name)


def file_of(cluster: LocalCluster, name: str) -> str:
    path: str = cluster.scalar(f"SELECT pg_relation_filepath('{name}')")
    return path


def digest(cluster: LocalCluster, name: str) -> tuple[object, ...]:
    return cluster.query(f"SELECT count(*), sum(hashtext(t::text)) FROM {name} t")[0]


def test_relations_that_change_while_they_are_read(make_site: SiteFactory, pg_major: int) -> None:
    """Truncated, dropped, shrunk, grown, rewritten and made, when a file is about to be opened,
    and once more when one was just opened: the copy recovers to what the source is afterwards."""
    site = make_site(pg_major)
    tables = ("emptied", "dropped", "shrunk", "grown", "rewritten")
    early = {make_table(site, name): name for name in tables}
    late = {make_table(site, f"late_{name}"): name for name in tables}
    site.cluster.execute("CREATE DATABASE gone")

    def change(prefix: str) -> None:
        with site.cluster.connect() as connection:
            for statement in (
                f"TRUNCATE {prefix}emptied",
                f"DROP TABLE {prefix}dropped",
                f"DELETE FROM {prefix}shrunk WHERE g > 10",
                f"VACUUM {prefix}shrunk",
                f"INSERT INTO {prefix}grown SELECT g, 'new' FROM generate_series(1, 9000) g",
                f"UPDATE {prefix}rewritten SET m = 'new'",
                f"CREATE TABLE {prefix}made AS SELECT g FROM generate_series(1, 2000) g",
                "DROP DATABASE IF EXISTS gone",
                "CHECKPOINT",
            ):
                connection.execute(statement.encode())

    before = Once(lambda path: path in early, lambda: change(""))
    after = Once(lambda path: path in late, lambda: change("late_"))
    manifest = back_up(site, before=before, after=after)
    assert before.happened
    assert after.happened
    assert (manifest.status, manifest.corrupt_pages) == ("completed", 0)
    # And a differential that follows knows their true lengths.
    site.cluster.execute("INSERT INTO shrunk SELECT g, 'again' FROM generate_series(1, 5000) g")
    diff = site.diff()
    left = [name for name in tables if name != "dropped"] + ["made"]
    for backup in (manifest.backup_id, diff.backup_id):
        copy = site.start_copy(backup)
        for name in [*left, *(f"late_{name}" for name in left)]:
            if name != "shrunk" or backup == diff.backup_id:
                assert digest(copy, name) == digest(site.cluster, name), name
        assert copy.query("SELECT 1 FROM pg_class WHERE relname LIKE '%dropped'") == []
        assert copy.query("SELECT 1 FROM pg_database WHERE datname = 'gone'") == []


def test_file_truncated_under_the_reader(make_site: SiteFactory) -> None:
    """Not by SQL but on disk, between two reads: what is gone is left out, and nothing crashes."""
    site = make_site(18)
    path = make_table(site, "cut")
    full = site.cluster.datadir / path
    content = full.read_bytes()

    def cut(opened: str) -> None:
        if opened == path:
            with full.open("r+b") as file:
                file.truncate(2 * PAGE_SIZE)

    back_up(site, after=cut)
    restored = site.restore() / path
    full.write_bytes(content)
    assert restored.read_bytes() == content[: 2 * PAGE_SIZE]


def test_partial_page_at_the_end_is_left_out(make_site: SiteFactory) -> None:
    site = make_site(18)
    path = make_table(site, "growing")
    full = site.cluster.datadir / path
    content = full.read_bytes()
    for kind in (BackupType.FULL, BackupType.DIFF):
        with full.open("ab") as file:
            file.write(b"half a page")
        manifest = back_up(site, kind)
        full.write_bytes(content)
        assert manifest.status == "completed"
        assert (site.restore() / path).read_bytes() == content


class Torn:
    """Page `block` of a file is read with its second half spoilt, the first `times` times."""

    def __init__(self, path: str, block: int, times: int) -> None:
        self._path = path
        self._block = block
        self._left = times
        self.reads = 0
        self.lsn = 0

    def __call__(self, path: str, data: memoryview, offset: int) -> int:
        at = self._block * PAGE_SIZE - offset
        if path == self._path and 0 <= at < len(data):
            self.reads += 1
            if self.reads <= self._left:
                spoilt = data[at : at + PAGE_SIZE]
                self.lsn = int(page.lsns(page.headers(spoilt))[0])
                spoilt[PAGE_SIZE // 2 :] = bytes(b ^ 0xFF for b in spoilt[PAGE_SIZE // 2 :])
        return len(data)


NEVER_MENDED = 1000
IN_ONE_COPY = 1 + len(REREAD_SECONDS)


@pytest.mark.parametrize("times", [3, IN_ONE_COPY + 1])
def test_torn_page_is_read_again_until_it_is_whole(make_site: SiteFactory, times: int) -> None:
    """Within one copy of the file, or when the file is copied once more at the end."""
    site = make_site(18)
    path = make_table(site, "torn")
    hook = Torn(path, 3, times)
    manifest = back_up(site, on_read=hook)
    assert hook.reads == times + 1
    assert (manifest.status, manifest.corrupt_pages) == ("completed", 0)
    expected = (site.cluster.datadir / path).read_bytes()
    assert (site.restore() / path).read_bytes() == expected


def test_page_that_never_verifies_is_reported(make_site: SiteFactory) -> None:
    site = make_site(18)
    path = make_table(site, "rotten")
    hook = Torn(path, 3, NEVER_MENDED)
    manifest = back_up(site, on_read=hook)
    # With other small files, and then twice by itself.
    assert hook.reads == 1 + 2 * IN_ONE_COPY
    assert (manifest.status, manifest.corrupt_pages) == ("completed_with_corruption", 1)
    (found,) = manifest.corruption
    assert (found.path, found.block, found.lsn) == (path, 3, hook.lsn)
    assert found.expected != found.actual
    details = site.app.show(manifest.backup_id)
    assert [(c.path, c.block) for c in details.corruption] == [(path, 3)]
    assert details.backup.status == "completed_with_corruption"
    # Its fingerprint is unknown: the next backup reads it again and has the good one.
    diff = back_up(site, BackupType.DIFF)
    assert (diff.status, diff.detector) == ("completed", "scan")
    expected = (site.cluster.datadir / path).read_bytes()
    assert (site.restore(diff.backup_id) / path).read_bytes() == expected


def test_torn_page_that_wal_covers_is_excused(make_site: SiteFactory) -> None:
    """Its LSN lies within the backup, so that recovery writes it anew from its full image."""
    site = make_site(18)
    path = make_table(site, "busy")

    def write() -> None:
        site.cluster.execute("UPDATE busy SET m = 'new' WHERE g % 7 = 0")
        site.cluster.execute("CHECKPOINT")

    hook = Torn(path, 3, NEVER_MENDED)
    manifest = back_up(site, before=Once(lambda opened: opened == path, write), on_read=hook)
    assert manifest.start_lsn <= Lsn(hook.lsn) <= manifest.stop_lsn
    assert (manifest.status, manifest.corrupt_pages) == ("completed", 0)
    stored: Path = site.restore() / path
    spoilt = stored.read_bytes()
    assert page.checksum_failures(spoilt, 0).tolist() == [3]
    copy = site.copy_at(stored.parents[2])
    copy.start({"archive_mode": "off"})
    deadline = time.monotonic() + 60
    while copy.scalar("SELECT pg_is_in_recovery()"):
        assert time.monotonic() < deadline, copy.log_tail()
        time.sleep(0.02)
    assert digest(copy, "busy") == digest(site.cluster, "busy")
    copy.stop()
    assert page.checksum_failures(stored.read_bytes(), 0).tolist() == []
