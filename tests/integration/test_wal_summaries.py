"""The WAL-summary detector: what it may be used for, what it costs, and that it agrees with others.

The planted defects that were seen to fail here are parameters of the tests: each takes one rule
out of the library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from dbmodule.backup import relation as relation_module
from dbmodule.backup import summaries
from dbmodule.errors import CorruptObjectError
from dbmodule.ident import PAGE_SIZE, BackupId, BackupType
from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.reports import BackupReport
from dbmodule.walsummary import ChangedBlocks
from tests import ddl, oracles
from tests.fix_backup import Site, SiteFactory
from tests.frozen import Frozen, freeze

SUMMARIZING = {"summarize_wal": "on", "autovacuum": "off"}
with_summaries = pytest.mark.parametrize("major", [17, 18])


def restored_as_source(site: Site, report: BackupReport) -> None:
    expected = oracles.digests(site.cluster)
    copy = site.start_copy(report.backup_id)
    assert oracles.digests(copy) == expected
    assert oracles.server_oracle(copy) == []


@pytest.fixture
def summarizing(make_site: SiteFactory, pg_major: int) -> Site:
    if pg_major < 17:
        return make_site(pg_major, settings={"autovacuum": "off"})
    return make_site(pg_major, settings=SUMMARIZING)


def test_it_is_chosen_where_it_can_be_and_reads_what_changed(
    summarizing: Site, pg_major: int
) -> None:
    site = summarizing
    ddl.table(site.cluster, "big", 40_000)
    site.cluster.execute("VACUUM (FREEZE) big")  # else all its pages change with their hint bits
    site.full()
    site.cluster.execute("UPDATE big SET filler = 'x' WHERE i % 9000 = 1")
    report = site.diff()
    if pg_major < 17:
        assert (report.detector, report.detector_reason) == (
            "scan",
            f"PostgreSQL {pg_major} has no WAL summaries",
        )
    else:
        assert report.detector == "wal"
        table_bytes = int(site.cluster.scalar("SELECT pg_relation_size('big')"))
        assert report.bytes_read - report.wal_bytes < table_bytes / 2
    restored_as_source(site, report)


def test_asked_for_and_not_there_the_scan_takes_over_and_says_why(make_site: SiteFactory) -> None:
    site = make_site(settings={"autovacuum": "off"})
    ddl.table(site.cluster, "t")
    site.full()
    site.cluster.execute("UPDATE t SET filler = 'x' WHERE i = 7")
    for detect in ("auto", "wal"):
        report = site.diff(detect=detect)
        assert report.detector == "scan"
        assert report.detector_reason == "summarize_wal is off"
    restored_as_source(site, report)


def _removed(directory: Path, names: list[str]) -> None:
    (directory / names[-3]).unlink()


def _damaged(directory: Path, names: list[str]) -> None:
    content = bytearray((directory / names[-1]).read_bytes())
    content[20] ^= 1
    (directory / names[-1]).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"), [(_removed, "reach"), (_damaged, "does not match its CRC")]
)
def test_a_gap_or_a_damaged_summary_is_seen(
    make_site: SiteFactory,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path, list[str]], None],
    reason: str,
) -> None:
    monkeypatch.setattr(summaries, "PATIENCE_SECONDS", 0.5)
    site = make_site(settings=SUMMARIZING)
    ddl.table(site.cluster, "t")
    full = site.full()
    for number in range(4):
        site.cluster.execute(f"UPDATE t SET filler = 'x' WHERE i = 900 * {number}")
        site.cluster.execute("CHECKPOINT")
    frozen = freeze(site)
    directory = frozen.path / "pg_wal" / "summaries"
    harm(directory, sorted(path.name for path in directory.iterdir()))
    manifest = frozen.back_up(BackupType.DIFF, "auto", BackupId(full.backup_id))
    assert manifest.detector == "scan"
    assert reason in manifest.detector_reason


def test_a_slow_summariser_is_waited_for(
    make_site: SiteFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last file is hidden until it was asked for three times."""
    asked = []
    listed = LocalDataDirectory.names

    def late(self: LocalDataDirectory, path: str) -> list[str]:
        names = sorted(listed(self, path))
        asked.append(path)
        return names if len(asked) > 3 else names[:-1]

    site = make_site(settings=SUMMARIZING)
    ddl.table(site.cluster, "t")
    site.full()
    monkeypatch.setattr(LocalDataDirectory, "names", late)
    assert site.diff().detector == "wal"
    assert len(asked) > 3


# -- agreement with the other detectors -----------------------------------------------------------


def restored_by(frozen: Frozen, baseline: BackupId) -> Iterator[tuple[str, Path]]:
    """The same bytes, backed up and restored with each detector."""
    for detect in ("content", "scan", "wal"):
        if detect == "wal" and frozen.site.cluster.major < 17:
            continue
        manifest = frozen.back_up(BackupType.INCR, detect, baseline)
        assert manifest.detector == detect, manifest.detector_reason
        yield detect, frozen.site.restore(manifest.backup_id)


@pytest.mark.parametrize(("seed", "sums"), [(1, True), (2, True), (3, False)])
def test_all_detectors_restore_the_same_bytes(
    make_site: SiteFactory, pg_major: int, seed: int, sums: bool
) -> None:
    """Without checksums the server changes hint bits and tells nobody: there, all but those."""
    settings = SUMMARIZING if pg_major >= 17 else {}
    site = make_site(
        pg_major, checksums=sums, settings=settings | ddl.SETTINGS | {"wal_log_hints": "off"}
    )
    rng = random.Random(seed)
    ddl.prepare(site.cluster)
    baseline = BackupId(site.full().backup_id)
    for _ in range(2):
        ddl.run_at_random(site.cluster, rng, 25)
        frozen = freeze(site)
        for detect, restored in restored_by(frozen, baseline):
            # What is compared by content is equal to the last bit.
            hints = sums or detect == "content"
            assert oracles.byte_oracle(restored, frozen.path, hints=hints) == [], detect
        baseline = BackupId(site.incr().backup_id)


def _stop_at_the_baselines_length(patch: pytest.MonkeyPatch) -> None:
    kept = relation_module.RelationCopy._to_read

    def to_read(self: relation_module.RelationCopy, pages: int) -> NDArray[np.int64]:
        wanted = kept(self, pages)
        before = self._before
        if self._detector != "wal" or before is None:
            return wanted
        return wanted[wanted < max(before.size // PAGE_SIZE, 1)]

    patch.setattr(relation_module.RelationCopy, "_to_read", to_read)


def _forget(what: str, patch: pytest.MonkeyPatch) -> None:
    """Take one kind of entries out of the summaries."""
    kept = ChangedBlocks.within

    def within(
        self: ChangedBlocks, key: tuple[int, int, int], first: int, count: int
    ) -> NDArray[np.int64]:
        getattr(self, what).clear()
        return kept(self, key, first, count)

    patch.setattr(ChangedBlocks, "within", within)


def cut_and_grown(site: Site) -> None:
    """Cut to nothing, then extended by many pages at once: the last of them stay zero, unnamed."""
    site.cluster.execute("DELETE FROM a")
    site.cluster.execute("VACUUM a")
    with psycopg.connect(site.cluster.dsn(), autocommit=True) as session:
        cursor = session.cursor()
        with cursor.copy("COPY a (i, filler) FROM STDIN") as copy:
            for number in range(700):
                copy.write_row((number, "z" * 600))
    size = int(site.cluster.scalar("SELECT pg_relation_size('a') / 8192"))
    used = int(site.cluster.scalar("SELECT max((ctid::text::point)[0]::int) + 1 FROM a"))
    assert used < size


def changed_while_elsewhere(site: Site) -> None:
    """A database is moved away, changed, and moved back: WAL names its blocks elsewhere."""
    site.cluster.execute("ALTER DATABASE moving SET TABLESPACE inside")
    site.cluster.execute("UPDATE there SET i = -i", "moving")
    site.cluster.execute("ALTER DATABASE moving SET TABLESPACE pg_default")


def grown(site: Site) -> None:
    ddl.table(site.cluster, "grown", 1)
    site.cluster.execute("INSERT INTO a SELECT i, repeat('g', 900) FROM generate_series(1, 900) i")


@pytest.mark.parametrize(
    ("defect", "change"),
    [
        (_stop_at_the_baselines_length, grown),
        (partial(_forget, "_limits"), cut_and_grown),
        (partial(_forget, "_databases"), changed_while_elsewhere),
    ],
)
def test_without_a_rule_the_bytes_differ(
    make_site: SiteFactory,
    defect: Callable[[pytest.MonkeyPatch], None],
    change: Callable[[Site], None],
) -> None:
    site = make_site(settings=SUMMARIZING | ddl.SETTINGS)
    ddl.prepare(site.cluster)
    site.cluster.execute("CREATE TABLE there AS SELECT generate_series(1, 3000) AS i", "moving")
    baseline = BackupId(site.full().backup_id)
    change(site)
    frozen = freeze(site)
    for planted in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if planted:
                defect(patch)
            manifest = frozen.back_up(BackupType.DIFF, "wal", baseline)
        assert manifest.detector == "wal"
        try:
            wrong = bool(oracles.byte_oracle(site.restore(manifest.backup_id), frozen.path))
        except CorruptObjectError:
            wrong = True  # a block that has no bytes at all is noticed
        assert wrong == planted
