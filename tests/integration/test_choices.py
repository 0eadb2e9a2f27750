"""What a backup may build on: refusals from the command line, a full as the way out, dry runs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crc32c
import pytest

from dbmodule import controlfile
from dbmodule.errors import BrokenChainError
from dbmodule.manifest import Manifest
from dbmodule.repository.repository import Repository
from tests import ddl
from tests.fix_backup import Site, SiteFactory

ROOT = Path(__file__).parents[2]


def dbmodule(site: Site, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of a command."""
    done = subprocess.run(
        [sys.executable, "-c", "from dbmodule_cli.main import main; main()", *arguments, "--json"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
            "DBMODULE_CONFIG": str(site.base / "dbmodule.toml"),
        },
        cwd=site.base,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def shared(make_module_site: Callable[..., Site]) -> Iterator[Site]:
    site = make_module_site(settings={"autovacuum": "off"})
    ddl.table(site.cluster, "t")
    yield site


def stored(site: Site) -> dict[str, int]:
    """Every file of the repository and its length, but for locks."""
    names = site.repository().store.list("")
    return {
        name: site.repository().store.size(name) for name in names if not name.startswith("locks/")
    }


def test_a_dry_run_counts_what_is_stored_next_and_writes_nothing(shared: Site) -> None:
    site = shared
    site.full()
    site.cluster.execute("UPDATE t SET filler = 'x' WHERE i % 100 = 0")
    before = stored(site)
    marks = site.cluster.scalar("SELECT count(*) FROM dbmodule.lineage")
    code, dry = dbmodule(site, "backup", "diff", "--dry-run", "--detect", "scan")
    assert code == 0
    assert dry["dry_run"] is True
    assert stored(site) == before
    assert site.cluster.scalar("SELECT count(*) FROM dbmodule.lineage") == marks
    recorded = "SELECT count(*) FROM dbmodule.backup WHERE backup_id = "
    assert site.cluster.scalar(recorded + f"'{dry['backup_id']}'") == 0
    file = site.cluster.scalar("SELECT pg_relation_filenode('t')")
    (found,) = [r for r in dry["relations"] if r["relfilenode"] == file and r["fork"] == "main"]
    assert found["pages_changed"] >= 40
    real = site.diff(detect="scan")
    # The mark of its start is what a dry run does not leave.
    assert 0 <= real.pages_changed - dry["pages_changed"] <= 12
    assert abs(real.bytes_stored - dry["bytes_stored"]) < 0.2 * real.bytes_stored


def _no_backup(site: Site, full: Manifest) -> None:
    for path in (site.repository_path / "manifests").rglob("*.json"):
        path.unlink()


def _damaged_manifest(site: Site, full: Manifest) -> None:
    path = next((site.repository_path / "manifests").rglob(f"{full.backup_id}*"))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-40])


def _missing_tables(site: Site, full: Manifest) -> None:
    next(p for p in site.repository_path.rglob("*") if full.root.pack in p.name).unlink()


def _damaged_tables(site: Site, full: Manifest) -> None:
    path = next(p for p in site.repository_path.rglob("*") if full.root.pack in p.name)
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "code", "word"),
    [
        (_no_backup, "no_baseline", "Take a full backup"),
        (_damaged_manifest, "broken_chain", "full backup"),
        (_missing_tables, "broken_chain", "dbmodule verify"),
        (_damaged_tables, "broken_chain", "dbmodule verify"),
    ],
)
def test_a_baseline_that_is_missing_or_damaged_is_refused_and_a_full_is_the_way_out(
    make_site: SiteFactory, harm: Callable[[Site, Manifest], None], code: str, word: str
) -> None:
    site = make_site()
    full = site.full()
    harm(site, manifest_of(site.repository(), full.backup_id))
    before = stored(site)
    pinned = () if harm is _no_backup else ("--baseline", full.backup_id)
    exit_code, refused = dbmodule(site, "backup", "diff", *pinned)
    assert exit_code == 4
    assert refused["error"]["code"] == code
    assert word in refused["error"]["hint"]
    assert stored(site) == before
    exit_code, report = dbmodule(site, "backup", "diff", *pinned, "--fallback", "full")
    assert exit_code == 0
    assert (report["type"], report["baseline_id"]) == ("full", None)
    assert "full" in report["backup_id"]
    assert report["detector_reason"].startswith("no baseline: ")
    # It is a full like any other, and a differential may build on it.
    exit_code, report = dbmodule(site, "backup", "diff")
    assert (exit_code, report["type"]) == (0, "diff")


def manifest_of(repository: Repository, backup: str) -> Manifest:
    return {str(b): m for b, m in repository.manifests("main").items()}[backup]


def test_damage_that_is_met_in_the_middle_is_a_refusal_too(make_site: SiteFactory) -> None:
    """The pack with the page marks is gone: the tables name it, and the copier meets it."""
    site = make_site()
    ddl.table(site.cluster, "t")
    full = site.full()
    root = manifest_of(site.repository(), full.backup_id).root.pack
    for path in site.repository_path.rglob("*"):
        if path.is_file() and "packs" in path.parts and root not in path.name:
            path.unlink()
    with pytest.raises(BrokenChainError, match="cannot be built on"):
        site.diff(detect="scan")


def test_the_way_out_is_not_taken_where_it_is_not_needed(shared: Site) -> None:
    shared.full()
    code, report = dbmodule(shared, "backup", "incr", "--fallback", "full")
    assert (code, report["type"]) == (0, "incr")


def test_another_block_size_is_refused(make_site: SiteFactory, pg_major: int) -> None:
    """No server here has one, so the control file says so, with its right CRC."""
    site = make_site(pg_major)
    site.full()
    site.cluster.stop("fast")
    path = site.cluster.datadir / "global" / "pg_control"
    content = bytearray(path.read_bytes())
    kept = bytes(content)
    at = content.index(struct.pack("<II", 8192, 131072))
    struct.pack_into("<I", content, at, 16384)
    crc_at = controlfile._CRC_OFFSETS[struct.unpack_from("<I", content, 8)[0]]
    struct.pack_into("<I", content, crc_at, crc32c.crc32c(bytes(content[:crc_at])))
    path.write_bytes(content)
    before = stored(site)
    for kind in ("full", "diff"):
        code, refused = dbmodule(site, "backup", kind, "--offline")
        assert code == 4
        assert "block size is 16384" in refused["error"]["message"]
        assert refused["error"]["hint"]
    assert stored(site) == before
    path.write_bytes(kept)
    assert dbmodule(site, "backup", "diff", "--offline")[0] == 0
