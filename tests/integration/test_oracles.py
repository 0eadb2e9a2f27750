"""Full + differential and full + incremental chains, judged by every oracle on every version."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dbmodule.chain import chain_of
from dbmodule.datafile import classify
from dbmodule.delta import PageMap
from dbmodule.ident import PAGE_SIZE, BackupId, parse_lsn
from dbmodule.pgdata.target import LocalTargetFile
from dbmodule.registry import EntryFlag, EntryKind
from dbmodule.reports import BackupReport
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.frames import FrameReader
from dbmodule.restore.files import write_file
from tests import oracles, workload
from tests.fix_backup import Site

DETECTORS = ("scan", "content")


def _plain_copy(site: Site) -> Path:
    copy = site.clusters.directory() / "copy"
    subprocess.run(["cp", "-a", site.cluster.datadir, copy], check=True)
    return copy


def _chain(site: Site, kind: str, detect: str) -> tuple[BackupReport, list[oracles.Difference]]:
    """full + diff, or full + incr + incr, the last one of the cleanly stopped cluster.

    Also gives the one block that may differ: the meta page of an SP-GiST index caches where it
    last found room, without WAL and without a new LSN (``SpGistUpdateMetaPage``). The server
    checks what it finds there, as it must after any crash, and only checksums show the change.
    """
    workload.set_up(site.cluster)
    site.full()
    workload.run_round(site.cluster, 1)
    if kind == "incr":
        site.incr(detect=detect)
        workload.run_round(site.cluster, 2)
    cached = site.cluster.scalar("SELECT pg_relation_filepath('document_spgist')")
    silent = site.cluster.scalar("SHOW data_checksums") == "off" and detect == "scan"
    site.cluster.stop("fast")
    take = site.incr if kind == "incr" else site.diff
    return take(offline=True, detect=detect), [(cached, 0)] if silent else []


@pytest.mark.parametrize("kind", ["diff", "incr"])
@pytest.mark.parametrize("detect", DETECTORS)
def test_byte_oracle(site: Site, kind: str, detect: str) -> None:
    last, cache = _chain(site, kind, detect)
    assert last.detector == detect
    assert 0 < last.pages_changed < last.pages_total
    restored = site.restore()
    assert set(oracles.byte_oracle(restored, _plain_copy(site))) <= set(cache)


def test_mutation_oracle_names_every_dropped_page(site: Site) -> None:
    last, cache = _chain(site, "diff", "scan")
    repository = site.repository()
    manifests = repository.manifests("main")
    chain = chain_of(manifests, BackupId(last.backup_id))
    restored, original = site.restore(), _plain_copy(site)
    stale = oracles.byte_oracle(restored, original)
    assert set(stale) <= set(cache)
    whole, base = ChainView(repository, chain), ChainView(repository, chain[:1])
    candidates = list(_changed_blocks(whole, base))
    assert len(candidates) >= 20
    for path, block in random.Random(1).sample(candidates, 20):
        mutant = _DroppingView(whole, base, path, block)
        _rewrite(restored, path, mutant, repository.frames)
        assert oracles.byte_oracle(restored, original) == sorted([(path, block), *stale])
        _rewrite(restored, path, whole, repository.frames)
    assert oracles.byte_oracle(restored, original) == stale


def _changed_blocks(whole: ChainView, base: ChainView) -> Iterator[tuple[str, int]]:
    """Blocks of the differential that the full holds too, with other bytes.

    Other fingerprints mean other bytes; configuration that a restore appends to is left out.
    """
    for path, entry in whole.files.items():
        before = base.files.get(path)
        if (
            entry.kind not in (EntryKind.RELATION, EntryKind.CONTENT)
            or EntryFlag.OVERLAY not in entry.flags
            or before is None
            or path in oracles.RESTORE_WRITES
            or classify(path) == "excluded"
        ):
            continue
        now, then = whole.prints(path), base.prints(path)
        for block in np.flatnonzero(whole.page_map(path).origin == 1).tolist():
            if block < len(then) and now[block].tobytes() != then[block].tobytes():
                yield path, block


class _DroppingView(ChainView):
    """A chain whose differential lacks one page."""

    def __init__(self, whole: ChainView, base: ChainView, path: str, block: int) -> None:
        self.packs = whole.packs
        self._whole, self._base, self._dropped = whole, base, (path, block)

    def page_map(self, path: str) -> PageMap:
        dropped, block = self._dropped
        folded = self._whole.page_map(path)
        if path == dropped:
            older = self._base.page_map(path)
            numbers = {ref.pack: number for number, ref in enumerate(self._whole.packs)}
            ref = older.refs[block].copy()
            ref["pack"] = numbers[self._base.packs[int(ref["pack"])].pack]
            folded.refs[block] = ref
        return folded


def _rewrite(restored: Path, path: str, view: ChainView, frames: FrameReader) -> None:
    place = restored / path
    size = place.stat().st_size
    with place.open("r+b") as file:
        file.truncate(0)
        file.truncate(size)
    target = LocalTargetFile(place, os.open(place, os.O_RDWR))
    write_file(view, frames, path, size, target)
    target.finish()


@pytest.mark.parametrize("kind", ["diff", "incr"])
def test_server_and_data_oracles(site: Site, kind: str) -> None:
    workload.set_up(site.cluster)
    site.full()
    workload.run_round(site.cluster, 1)
    if kind == "incr":
        site.incr()
        workload.run_round(site.cluster, 2)
    last = site.incr() if kind == "incr" else site.diff()
    assert last.detector == "scan"
    expected = oracles.digests(site.cluster)
    restored = site.restore()
    assert oracles.pg_verifybackup(site.cluster, restored) == []
    copy = site.copy_at(restored)
    copy.start()
    copy.wait_recovered()
    assert oracles.digests(copy) == expected
    assert copy.scalar("SELECT count(*) FROM forgetful") == 0
    assert oracles.server_oracle(copy) == []


@contextmanager
def _pgbench(site: Site) -> Iterator[None]:
    """TPC-B transactions by two clients for as long as the context is open."""
    process = site.cluster.spawn("pgbench", "--no-vacuum", "--client=2", "--time=600", "postgres")
    try:
        yield
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert "ERROR" not in output, output


@contextmanager
def _committer(site: Site) -> Iterator[list[tuple[int, int]]]:
    """Commits rows one by one, noting the WAL position at which each was surely committed."""
    committed: list[tuple[int, int]] = []
    stop = threading.Event()

    def run() -> None:
        with site.cluster.connect() as session:
            session.autocommit = True
            for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                session.execute("INSERT INTO noted VALUES (%s)", (number,))
                row = session.execute("SELECT pg_current_wal_lsn()::text").fetchone()
                assert row is not None
                committed.append((number, parse_lsn(row[0])))

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        try:
            yield committed
        finally:
            stop.set()
        done.result()


@pytest.mark.parametrize("kind", ["diff", "incr"])
def test_backups_under_load_lose_no_transaction(site: Site, kind: str) -> None:
    site.cluster.run("pgbench", "--initialize", "--quiet", "--scale=5", "postgres")
    site.cluster.execute("CREATE TABLE noted (id int PRIMARY KEY)")
    with _pgbench(site), _committer(site) as committed:
        reports = [site.full()]
        reports.append(site.incr() if kind == "incr" else site.diff())
        reports.append(site.incr() if kind == "incr" else site.diff())
    for report in reports:
        assert report.status == "completed"
        stop = parse_lsn(report.stop_lsn)
        copy = site.start_copy(report.backup_id)
        sums = copy.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts),"
            " (SELECT sum(tbalance) FROM pgbench_tellers),"
            " (SELECT sum(bbalance) FROM pgbench_branches),"
            " (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
        )[0]
        assert len(set(sums)) == 1
        present = {number for (number,) in copy.query("SELECT id FROM noted")}
        assert {number for number, lsn in committed if lsn <= stop} <= present
        assert oracles.server_oracle(copy) == []
        shutil.rmtree(copy.datadir)


def test_second_differential_stores_only_what_is_new(site: Site) -> None:
    site.cluster.run("pgbench", "--initialize", "--quiet", "--scale=10", "postgres")
    site.full()
    site.cluster.run("pgbench", "--no-vacuum", "--transactions=1000", "postgres")
    first = site.diff()
    site.cluster.run("pgbench", "--no-vacuum", "--transactions=1000", "postgres")
    second = site.diff()
    assert second.pages_changed > 1.3 * first.pages_changed
    assert second.pages_stored < 1.2 * first.pages_stored
    assert second.bytes_stored < 1.2 * first.bytes_stored
    quiet = site.diff()
    assert quiet.pages_stored < 0.1 * second.pages_stored
    assert PAGE_SIZE * quiet.pages_changed == quiet.bytes_changed or quiet.bytes_changed > 0
