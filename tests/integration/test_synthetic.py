"""A full that is made of a chain: the same bytes, no reading of the database, and built on."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest

from dbmodule.backup.synthetic import synthesize
from dbmodule.chain import chain_of
from dbmodule.errors import CancelledError, RepositoryError, UsageError
from dbmodule.ident import BackupId
from dbmodule.ports import never_cancelled, no_progress
from dbmodule.processes import LocalProcesses
from dbmodule.registry import EntryFlag, EntryKind
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.repository import Repository
from dbmodule.storage import MemoryStore, open_store
from tests import ddl, oracles
from tests.fault.fault_store import Fault, FaultStore
from tests.fix_backup import Site, SiteFactory


def view_of(site: Site, backup: str) -> ChainView:
    repository = site.repository()
    return ChainView(repository, chain_of(repository.manifests("main"), BackupId(backup)))


@pytest.fixture
def worked(make_site: SiteFactory, pg_major: int) -> Site:
    """A chain of four over random work, the last of it offline: its bytes are the cluster's."""
    site = make_site(pg_major, settings=ddl.SETTINGS)
    rng = random.Random(11)
    ddl.prepare(site.cluster)
    site.full()
    for _ in range(2):
        ddl.run_at_random(site.cluster, rng, 20)
        site.incr()
    ddl.run_at_random(site.cluster, rng, 20)
    site.cluster.stop("fast")
    site.incr(offline=True)
    return site


def test_it_restores_what_its_chain_restores_and_is_built_on(worked: Site) -> None:
    site = worked
    *_, last = site.app.backups()
    full = site.app.synthesize("latest")
    assert (full.type, full.baseline_id, full.detector) == ("full", None, "synthetic")
    assert (full.start_lsn, full.stop_lsn) == (last.start_lsn, last.stop_lsn)
    assert full.bytes_read == 0
    # Tables, and not one page.
    first = site.app.backups()[0]
    assert full.bytes_stored < first.bytes_stored / 4
    old, new = view_of(site, last.backup_id), view_of(site, full.backup_id)
    assert list(old.files) == list(new.files)
    for path, entry in new.files.items():
        assert not entry.flags & (EntryFlag.OVERLAY | EntryFlag.UNCHANGED)
        stored = entry.kind in (EntryKind.RELATION, EntryKind.CONTENT)
        if stored and EntryFlag.WAL not in entry.flags:
            assert np.array_equal(old.prints(path), new.prints(path)), path
    # Alone: what it was made of is gone.
    for manifest in (site.repository_path / "manifests" / "main").iterdir():
        if full.backup_id not in manifest.name:
            manifest.unlink()
    assert site.app.verify(None).status == "sound"
    restored = site.restore(full.backup_id)
    assert oracles.byte_oracle(restored, site.cluster.datadir) == []
    shutil.rmtree(restored)
    site.cluster.start()
    site.cluster.execute("CREATE TABLE after_it AS SELECT generate_series(1, 900) AS i")
    diff = site.diff()
    # Offline backups leave no lineage marks, and nor has what is made of one.
    assert (diff.baseline_id, diff.detector) == (full.backup_id, "content")
    assert diff.pages_changed < diff.pages_total / 4
    assert oracles.digests(site.start_copy(diff.backup_id)) == oracles.digests(site.cluster)
    # And again: a chain on a synthetic full is a chain like any other.
    again = site.app.synthesize(diff.backup_id)
    assert oracles.digests(site.start_copy(again.backup_id)) == oracles.digests(site.cluster)


def test_the_database_need_not_be_there(make_site: SiteFactory) -> None:
    site = make_site()
    ddl.table(site.cluster, "t")
    site.full()
    site.cluster.execute("UPDATE t SET filler = 'x' WHERE i = 7")
    diff = site.diff()
    expected = oracles.digests(site.cluster)
    site.cluster.stop("fast")
    full = site.app.synthesize("latest")
    assert oracles.digests(site.start_copy(full.backup_id)) == expected
    relations = site.app.show(full.backup_id).relations
    assert relations[0].pages_changed > 100
    assert {r.relation_name for r in relations} >= {"public.t", "pg_catalog.pg_class"}
    site.cluster.start()
    incr = site.incr()
    assert (incr.baseline_id, incr.detector) == (full.backup_id, "scan")
    assert 0 < incr.pages_changed < incr.pages_total / 4
    rows = site.cluster.query("SELECT backup_id, type FROM dbmodule.backup ORDER BY started_at")
    assert (full.backup_id, "full") in rows
    assert (diff.backup_id, "diff") in rows


def test_what_is_a_full_already_is_refused(make_site: SiteFactory) -> None:
    site = make_site()
    full = site.full()
    with pytest.raises(UsageError, match="already"):
        site.app.synthesize(full.backup_id)


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.AFTER])
def test_a_failure_at_any_write_harms_nothing(make_site: SiteFactory, fault: Fault) -> None:
    site = make_site()
    ddl.table(site.cluster, "t")
    site.full()
    site.cluster.execute("UPDATE t SET filler = 'x' WHERE i % 9 = 7")
    diff = BackupId(site.diff().backup_id)
    kept = MemoryStore()
    source = open_store(str(site.repository_path))
    for name in source.list(""):
        kept.put_new(name, [source.get(name)])

    def run(repository: Repository) -> BackupId:
        return synthesize(
            repository,
            None,
            "main",
            diff,
            locks=repository.locks(LocalProcesses()),
            compression_level=1,
            progress=no_progress,
            cancelled=never_cancelled,
        ).backup_id

    for number in range(1, 20):
        store = MemoryStore()
        for name in kept.list(""):
            store.put_new(name, [kept.get(name)])
        try:
            run(Repository.open(FaultStore(store, at=number, fault=fault)))
        except RepositoryError:
            repository = Repository.open(store)
            assert diff in repository.manifests("main")
            made = run(repository)
            assert len(ChainView(repository, [repository.manifest("main", made)[0]]).files) > 900
        else:
            assert number > 3
            break
    else:
        raise AssertionError("no run without a failure")
    with pytest.raises(CancelledError):
        site.app.synthesize("latest", cancelled=lambda: True)
    assert len(site.app.backups()) == 2
