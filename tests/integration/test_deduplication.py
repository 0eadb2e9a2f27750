"""What repeats is stored once: in fulls, differentials, small files, and among clusters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.config import RepositorySection
from dbmodule.errors import CorruptObjectError
from dbmodule.ident import PAGE_SIZE, BackupType
from dbmodule.reports import BackupOptions, RestoreOptions
from dbmodule.repository import index
from dbmodule.repository.pack import Footer, open_whole
from dbmodule.repository.repository import Repository
from dbmodule.storage import open_store
from tests.fix_backup import Site, SiteFactory

QUIET = {"autovacuum": "off", "full_page_writes": "off", "bgwriter_lru_maxpages": "0"}


@pytest.fixture
def big(make_site: SiteFactory) -> Iterator[Site]:
    """A stopped cluster with a table of about 4000 pages that do not compress well."""
    site = make_site(settings=QUIET)
    site.cluster.execute(
        "CREATE TABLE big WITH (fillfactor = 90) AS SELECT i AS id, repeat(md5(i::text), 2) AS v"
        " FROM generate_series(1, 300000) AS i"
    )
    site.cluster.execute("VACUUM FREEZE")
    site.cluster.stop()
    yield site


def change_rows(site: Site, every: int, offset: int) -> int:
    """Change a row in every nth page of `big`, in its page; gives the number of these pages."""
    was_stopped = not site.cluster.is_running()
    if was_stopped:
        site.cluster.start()
    changed = site.cluster.scalar(
        "WITH changed AS (UPDATE big SET id = -id WHERE ctid = ANY (ARRAY(SELECT"
        f" format('(%s,1)', b)::tid FROM generate_series({offset},"
        f" pg_relation_size('big') / {PAGE_SIZE} - 1, {every}) AS b)) RETURNING 1)"
        " SELECT count(*) FROM changed"
    )
    site.cluster.execute("CHECKPOINT")
    if was_stopped:
        site.cluster.stop()
    assert isinstance(changed, int)
    return changed


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of relations."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted((directory / "base").rglob("*"))
        if path.is_file() and not path.name.startswith("pg_internal.init")
    }


def assert_restores(site: Site) -> None:
    """The newest backup of the stopped cluster restores to its very bytes."""
    restored = site.restore()
    assert files_of(restored) == files_of(site.cluster.datadir)
    shutil.rmtree(restored)


def test_a_second_full_of_an_unchanged_database_stores_almost_nothing(big: Site) -> None:
    first = big.full(offline=True)
    second = big.full(offline=True)
    assert second.bytes_stored < first.bytes_stored / 100
    assert_restores(big)


def other_repository(site: Site, name: str) -> App:
    """The library with a repository of its own beside the site's."""
    path = site.base / name
    Repository.create(open_store(str(path)))
    return App.open(site.config.model_copy(update={"repository": RepositorySection(url=str(path))}))


def test_a_full_after_scattered_changes_stores_pages_and_not_frames(big: Site) -> None:
    first = big.full(offline=True)
    changed = change_rows(big, 200, 7)  # 0.5 % of the pages, each in another frame
    assert changed >= 20
    second = big.full(offline=True)
    # Of each frame of 32 with a changed page only that page, and what the server wrote itself.
    assert changed <= second.pages_stored <= changed + 60
    assert second.bytes_stored < first.bytes_stored / 10
    assert_restores(big)
    third = big.full(offline=True)
    assert third.pages_stored == 0
    assert third.bytes_stored < first.bytes_stored / 100
    assert_restores(big)


def test_a_frame_of_which_the_most_has_changed_is_stored_whole(big: Site) -> None:
    big.full(offline=True)
    change_rows(big, 1, 0)
    report = big.full(offline=True)
    assert report.pages_stored > 0.9 * report.pages_total / 2
    assert_restores(big)


def test_damage_to_the_earlier_full_does_not_get_into_the_next(big: Site) -> None:
    big.full(offline=True)
    change_rows(big, 20, 3)
    for path in big.repository_path.glob("packs/*/*"):
        data = bytearray(path.read_bytes())
        data[16 : len(data) // 2] = bytes(len(data) // 2 - 16)
        path.write_bytes(data)
    with pytest.raises(CorruptObjectError):
        big.restore()
    # What the damaged packs' tables of contents still promise is not compared with anything.
    report = big.full(offline=True)
    assert report.pages_stored > 100
    assert big.app.verify(report.backup_id).damage


def test_the_next_differential_stores_what_changed_since_the_one_before(big: Site) -> None:
    aside = other_repository(big, "aside")
    big.cluster.start()
    big.full()
    aside.backup(BackupOptions(BackupType.FULL))
    for step in range(1, 5):
        changed = change_rows(big, 20, step)
        differential = big.diff(detect="scan")
        incremental = aside.backup(BackupOptions(BackupType.INCR, detect="scan"))
        assert incremental.pages_changed >= changed
        assert differential.pages_changed >= step * changed
        assert differential.pages_stored <= 1.2 * incremental.pages_stored
        assert differential.bytes_stored <= 1.2 * incremental.bytes_stored


def test_clusters_that_share_a_repository_store_equal_pages_once(big: Site) -> None:
    first = big.full(offline=True)
    repository = big.config.repository.model_copy(update={"cluster": "other"})
    other = App.open(big.config.model_copy(update={"repository": repository}))
    second = other.backup(BackupOptions(BackupType.FULL, offline=True))
    assert second.cluster == "other"
    assert second.bytes_stored < first.bytes_stored / 100
    target = big.clusters.directory() / "data"
    other.restore(RestoreOptions(target, "latest", {}))
    assert files_of(target) == files_of(big.cluster.datadir)


# -- small files ----------------------------------------------------------------------------------

TABLES = 300


@pytest.fixture
def small(make_site: SiteFactory, checksums: bool) -> Iterator[Site]:
    """A stopped cluster with tables of no to ten pages, and their maps."""
    site = make_site(settings=QUIET, checksums=checksums)
    make_tables(site, 0, TABLES)
    site.cluster.execute("VACUUM")
    site.cluster.execute("CHECKPOINT")
    site.cluster.stop()
    yield site


def make_tables(site: Site, first: int, past: int) -> None:
    site.cluster.execute(
        f"DO $$ BEGIN FOR n IN {first}..{past - 1} LOOP EXECUTE format("
        "'CREATE TABLE s%s AS SELECT i AS id, md5((i * 1000 + %s)::text)::name AS v"
        " FROM generate_series(1, %s) AS i', n, n, n % 11 * 77); END LOOP; END $$"
    )


def objects(site: Site) -> int:
    return sum(1 for path in site.repository_path.rglob("*") if path.is_file())


def test_small_files_share_frames_and_restore_to_their_bytes(small: Site) -> None:
    report = small.full(offline=True)
    assert report.files_total > 2 * TABLES
    assert objects(small) < 10
    packs = small.repository().store.list("packs/")
    frames = sum(len(footer_of(small, name).entries) for name in packs)
    assert frames < report.files_total / 3
    assert_restores(small)
    again = small.full(offline=True)
    assert again.pages_stored == 0
    assert again.bytes_stored < report.bytes_stored / 20
    assert_restores(small)


@pytest.mark.parametrize("detect", ["scan", "content"])
def test_of_small_files_only_changed_pages_are_stored_again(small: Site, detect: str) -> None:
    small.cluster.start()
    small.full()
    small.cluster.stop()
    nothing = small.diff(offline=True, detect=detect)
    assert nothing.pages_changed < 120  # what the backup itself left in the catalog
    small.cluster.start()
    small.cluster.execute("UPDATE s10 SET id = -id WHERE id = 1")
    make_tables(small, TABLES, TABLES + 3)
    small.cluster.execute("DROP TABLE s5")
    small.cluster.execute("CHECKPOINT")
    small.cluster.stop()
    changed = small.diff(offline=True, detect=detect)
    assert 0 < changed.pages_stored < 400
    assert_restores(small)
    full = small.full(offline=True)
    assert full.pages_stored < 100
    assert_restores(small)


def test_a_small_file_with_a_corrupt_page_is_reported_and_its_neighbours_are_not(
    small: Site,
) -> None:
    small.cluster.start()
    path = small.cluster.datadir / str(small.cluster.scalar("SELECT pg_relation_filepath('s8')"))
    small.cluster.stop()
    with path.open("r+b") as file:
        file.seek(PAGE_SIZE + 5000)
        file.write(b"damage")
    report = small.full(offline=True)
    assert report.corrupt_pages == (1 if report.pages_verified else 0)
    assert_restores(small)
    report = small.diff(offline=True, detect="content")
    assert report.corrupt_pages == (1 if report.pages_verified else 0)


def test_zero_pages_and_cut_pages_of_small_files(small: Site) -> None:
    small.cluster.start()
    paths = [
        small.cluster.datadir / str(small.cluster.scalar(f"SELECT pg_relation_filepath('s{n}')"))
        for n in (0, 3, 7)
    ]
    small.cluster.stop()
    os.truncate(paths[0], 5 * PAGE_SIZE)  # only zero pages
    os.truncate(paths[1], os.path.getsize(paths[1]) + 2 * PAGE_SIZE)  # and at the end
    before = paths[2].read_bytes()
    os.truncate(paths[2], len(before) + 100)  # a page that is being added
    small.full(offline=True)
    restored = small.restore()
    for path in paths[:2]:
        assert (
            restored / path.relative_to(small.cluster.datadir)
        ).read_bytes() == path.read_bytes()
    found = (restored / paths[2].relative_to(small.cluster.datadir)).read_bytes()
    assert found == before
    assert small.diff(offline=True, detect="content").pages_changed == 0


def test_odd_pages_make_a_small_file_one_that_is_compared_by_content(small: Site) -> None:
    small.cluster.start()
    path = small.cluster.datadir / str(small.cluster.scalar("SELECT pg_relation_filepath('s2')"))
    small.cluster.stop()
    path.write_bytes(os.urandom(3 * PAGE_SIZE))
    small.full(offline=True)
    assert_restores(small)


def footer_of(site: Site, name: str) -> Footer:
    repository = site.repository()
    data = memoryview(repository.store.get(name))
    return open_whole(name, data, repository.key)


def test_backups_keep_the_index_small(small: Site) -> None:
    for number in range(12):
        small.cluster.start()
        small.cluster.execute(f"UPDATE s10 SET id = id + {number + 1000}")
        small.cluster.execute("CHECKPOINT")
        small.cluster.stop()
        small.full(offline=True) if number % 5 == 0 else small.diff(offline=True)
    repository = small.repository()
    assert len(list(repository.store.list(index.PREFIX))) <= 5
    assert not small.app.verify(None).damage
    assert_restores(small)
