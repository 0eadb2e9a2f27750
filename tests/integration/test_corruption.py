"""A page that fails its checksum for good is not a changed page: stored as found, told, traced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dbmodule import page
from dbmodule.backup.batch import Batch
from dbmodule.ident import PAGE_SIZE, BackupId
from dbmodule.reports import BackupReport
from tests import ddl
from tests.fix_backup import Site, SiteFactory
from tests.integration.test_choices import dbmodule

BLOCK = 5
CHECKSUM = 8
"""Offset of the checksum in a page; a change there is seen in the header."""
BODY = 4000
LONG_AGO = 1_700_000_000


@pytest.fixture
def site(make_site: SiteFactory, pg_major: int) -> Iterator[Site]:
    made = make_site(pg_major, settings={"autovacuum": "off"})
    ddl.table(made.cluster, "t")
    made.cluster.execute("CREATE UNIQUE INDEX t_key ON t (i)")
    made.cluster.execute("CHECKPOINT")
    yield made


def file_of(site: Site, relation: str = "t") -> Path:
    path: str = site.cluster.scalar(f"SELECT pg_relation_filepath('{relation}')")
    return site.cluster.datadir / path


def harm(path: Path, at: int = CHECKSUM, block: int = BLOCK) -> bytes:
    """Flip a bit of a page behind the server's back, long ago; what the page was."""
    with path.open("r+b") as file:
        file.seek(block * PAGE_SIZE)
        was = file.read(PAGE_SIZE)
        file.seek(block * PAGE_SIZE + at)
        file.write(bytes([was[at] ^ 4]))
    # Old enough for the file to be recognised by its identity, had it no corrupt page.
    os.utime(path, (LONG_AGO, LONG_AGO))
    return was


def mend(path: Path, was: bytes, block: int = BLOCK) -> None:
    with path.open("r+b") as file:
        file.seek(block * PAGE_SIZE)
        file.write(was)


def page_in(root: Path, site: Site, relation: str = "t") -> bytes:
    path = root / file_of(site, relation).relative_to(site.cluster.datadir)
    return path.read_bytes()[BLOCK * PAGE_SIZE :][:PAGE_SIZE]


def test_a_corrupt_page_is_told_everywhere_and_its_good_copy_named(site: Site) -> None:
    full = site.full()
    was = harm(file_of(site))
    found = page_in(site.cluster.datadir, site)
    code, report = dbmodule(site, "backup", "diff", "--detect", "scan")
    assert code == 3
    assert report["status"] == "completed_with_corruption"
    assert report["corrupt_pages"] == 1
    (told,) = report["corruption"]
    expected = int(page.compute_checksums(was, np.array([BLOCK]))[0])
    file = file_of(site)
    identity = {
        "path": str(file.relative_to(site.cluster.datadir)),
        "block": BLOCK,
        "tablespace": 1663,
        "database": int(file.parent.name),
        "relfilenode": int(file.name),
        "fork": "main",
        "database_name": "postgres",
        "relation_name": "public.t",
        "table_name": "public.t",
        "expected": expected,
        "actual": expected ^ 4,
    }
    assert identity.items() <= told.items()
    assert told["last_good"] == full.backup_id
    rows = site.cluster.query(
        "SELECT path, block, fork, relation_name, expected, actual, last_good_backup_id"
        f" FROM dbmodule.corrupt_page WHERE backup_id = '{report['backup_id']}'"
    )
    names = ("path", "block", "fork", "relation_name", "expected", "actual", "last_good")
    assert rows == [tuple(told[name] for name in names)]
    # An exit code of 0: showing a backup is no backup.
    code, shown = dbmodule(site, "show", report["backup_id"])
    assert (code, shown["corruption"]) == (0, [told])
    # As it was found, and as it was.
    assert page_in(site.restore(report["backup_id"]), site) == found
    assert page_in(site.restore(full.backup_id), site) == was


@pytest.mark.parametrize("detect", ["scan", "wal", "content"])
def test_a_corrupt_page_is_never_taken_for_an_unchanged_one(
    make_site: SiteFactory, pg_major: int, detect: str
) -> None:
    """Each later backup looks again: it is told while it is there, and mended once it is not.

    Seen to fail when the identity of such a file was recorded.
    """
    if detect == "wal" and pg_major < 17:
        settings, used = {}, "scan"
    else:
        settings, used = ({"summarize_wal": "on"} if detect == "wal" else {}), detect
    site = make_site(pg_major, settings={"autovacuum": "off", **settings})
    ddl.table(site.cluster, "t")
    site.cluster.execute("CHECKPOINT")
    was = harm(file_of(site))
    full = site.full()
    assert (full.corrupt_pages, full.corruption[0].last_good) == (1, None)
    still = site.incr(detect=used)
    assert still.detector == used
    assert (still.status, still.corrupt_pages) == ("completed_with_corruption", 1)
    mend(file_of(site), was)
    mended = site.incr(detect=used)
    assert (mended.status, mended.corrupt_pages) == ("completed", 0)
    assert page_in(site.restore(mended.backup_id), site) == was
    quiet = site.incr(detect=used)
    assert page_in(site.restore(quiet.backup_id), site) == was


def test_a_mark_from_the_header_of_a_corrupt_page_would_hide_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule taken out: the next backup takes the page for what the baseline has."""
    harm(file_of(site), at=BODY)
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "trusted_marks", lambda self, *_: self.marks())
        assert site.full().corrupt_pages == 1
    assert site.incr(detect="scan").corrupt_pages == 0


def test_only_what_is_read_in_full_is_verified(site: Site) -> None:
    """A body that rots under an equal header: seen by the content detector, and by it alone."""
    full = site.full()
    was = harm(file_of(site), at=BODY)
    by_header = site.diff(detect="scan")
    assert by_header.corrupt_pages == 0
    assert by_header.pages_verified < full.pages_verified / 4
    # Not stored, so the good copy is what a restore brings.
    assert page_in(site.restore(by_header.backup_id), site) == was
    by_content = site.diff(detect="content")
    assert by_content.corrupt_pages == 1
    assert by_content.pages_verified >= full.pages_verified
    assert by_content.corruption[0].last_good == full.backup_id


def test_the_good_copy_may_be_in_another_chain(site: Site) -> None:
    first = site.full()
    good = site.diff()
    was = harm(file_of(site, "t_key"), block=1)
    # Its own chain comes first, although it is older than the others.
    in_chain = site.incr(detect="scan", baseline_id=first.backup_id)
    assert last_good(in_chain) == first.backup_id
    (told,) = in_chain.corruption
    assert (told.relation_name, told.table_name) == ("public.t_key", "public.t")
    # A chain that begins with the corrupt page.
    assert last_good(site.full()) == good.backup_id
    assert last_good(site.incr(detect="scan")) == good.backup_id
    mend(file_of(site, "t_key"), was, block=1)


def last_good(report: BackupReport) -> BackupId:
    assert report.status == "completed_with_corruption"
    (told,) = report.corruption
    assert told.last_good is not None
    return BackupId(told.last_good)


def test_without_checksums_nothing_is_claimed(make_site: SiteFactory, pg_major: int) -> None:
    site = make_site(pg_major, checksums=False, settings={"autovacuum": "off"})
    ddl.table(site.cluster, "t")
    site.cluster.execute("CHECKPOINT")
    site.full()
    harm(file_of(site), at=BODY)
    report = site.diff(detect="content")
    assert (report.status, report.pages_verified) == ("completed", 0)
    found = page_in(site.cluster.datadir, site)
    assert page_in(site.restore(report.backup_id), site) == found
