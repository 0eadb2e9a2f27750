"""Backups of a cleanly stopped server: refused while it runs, and recoverable afterwards."""

from __future__ import annotations

import pytest

from dbmodule.errors import ServerError
from tests import oracles, workload
from tests.fix_backup import COPY_OPTIONS, Site


def test_a_copy_of_a_stopped_cluster_starts_and_is_sound(site: Site) -> None:
    workload.set_up(site.cluster)
    expected = oracles.digests(site.cluster)
    site.cluster.stop("fast")
    full = site.full(offline=True)
    assert full.status == "completed"
    again = site.incr(offline=True)
    assert again.pages_stored == 0
    restored = site.restore()
    assert oracles.pg_verifybackup(site.cluster, restored) == []
    copy = site.copy_at(restored)
    copy.start(COPY_OPTIONS)
    copy.wait_recovered()
    assert oracles.digests(copy) == expected
    assert copy.scalar("SELECT timeline_id FROM pg_control_checkpoint()") == 2
    assert oracles.server_oracle(copy) == []


def test_online_backups_go_on_from_an_offline_full(site: Site) -> None:
    workload.set_up(site.cluster)
    site.cluster.stop("fast")
    site.full(offline=True)
    site.cluster.start()
    workload.run_round(site.cluster, 1)
    diff = site.diff()
    # An offline full leaves no mark that could prove it an ancestor.
    assert (diff.detector, "lineage" in diff.detector_reason) == ("content", True)
    expected = oracles.digests(site.cluster)
    copy = site.start_copy()
    assert oracles.digests(copy) == expected
    assert oracles.server_oracle(copy) == []
    recorded = site.cluster.query("SELECT backup_id, baseline_id FROM dbmodule.backup_dependency")
    assert recorded == [(diff.backup_id, diff.baseline_id)]


def test_a_running_or_crashed_server_is_refused(site: Site) -> None:
    with pytest.raises(ServerError, match=r"postmaster\.pid"):
        site.full(offline=True)
    site.cluster.kill()
    (site.cluster.datadir / "postmaster.pid").unlink(missing_ok=True)
    with pytest.raises(ServerError, match="not shut down cleanly"):
        site.full(offline=True)
    assert site.app.backups() == []


def test_wal_behind_a_link_is_read_and_restored_as_a_directory(site: Site) -> None:
    site.cluster.stop("fast")
    elsewhere = site.clusters.directory() / "wal"
    wal = site.cluster.datadir / "pg_wal"
    wal.rename(elsewhere)
    wal.symlink_to(elsewhere)
    site.cluster.start()
    site.cluster.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS i")
    site.full()
    copy = site.start_copy()
    assert copy.scalar("SELECT sum(i) FROM t") == 5050
    assert not (copy.datadir / "pg_wal").is_symlink()
