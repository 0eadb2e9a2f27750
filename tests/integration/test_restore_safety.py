"""What a restore refuses, and that it never writes outside of where it was told to."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbmodule.errors import (
    BrokenChainError,
    CancelledError,
    DbmoduleError,
    RefusedError,
    ServerError,
    TargetError,
)
from dbmodule.ident import BackupType
from dbmodule.manifest import Manifest
from dbmodule.pgdata.target import LocalTargetDirectory
from dbmodule.reports import BackupOptions, RestoreOptions
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.restore.run import RestoreRequest, restore
from dbmodule.storage.memory import MemoryStore
from tests.fault import mini
from tests.fault.hostile import Lie, commit_hostile, directory, link
from tests.fix_backup import Site, SiteFactory
from tests.fix_cluster import Clusters

REPOSITORY_ROOT = Path(__file__).parents[2]


# -- targets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_cluster(clusters: Clusters) -> Path:
    cluster = clusters.at(clusters.directory() / "data", 18)
    cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
    return cluster.datadir


@pytest.fixture
def stored(stopped_cluster: Path, tmp_path: Path) -> tuple[MemoryStore, Manifest]:
    """A full backup of the tiny data directory at ``tmp_path/data``."""
    store = MemoryStore()
    Repository.create(store)
    mini.make_mini(stopped_cluster, tmp_path / "data")
    return store, mini.back_up(store, tmp_path / "data", BackupType.FULL)


def snapshot(root: Path, without: str = "") -> dict[str, tuple[int, int, str]]:
    """Mode, mtime and content of everything below `root`, links not followed."""
    found = {}
    for path in sorted(root.rglob("*")):
        if without and path.is_relative_to(root / without):
            continue
        status = path.lstat()
        if path.is_symlink():
            content = str(path.readlink())
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return found


@pytest.mark.parametrize(
    "target",
    ["data", ".", "data/base/new", "data/pg_tblspc", "data/new/deeper", "file", "link", "circle"],
)
def test_unsafe_targets_are_refused_untouched(
    stored: tuple[MemoryStore, Manifest], tmp_path: Path, target: str
) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "pg_tblspc")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = snapshot(tmp_path)
    with pytest.raises(TargetError) as caught:
        mini.restore_to(stored[0], stored[1].backup_id, tmp_path / target)
    assert caught.value.exit_code == 4
    assert snapshot(tmp_path) == before


def test_empty_target_is_used(stored: tuple[MemoryStore, Manifest], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    mini.restore_to(stored[0], stored[1].backup_id, tmp_path / "target")
    assert (tmp_path / "target" / "global" / "pg_control").exists()


# -- interrupted restores -----------------------------------------------------------------------


@pytest.fixture
def site(make_site: SiteFactory) -> Site:
    site = make_site(18, extension=False)
    site.full()
    return site


def test_killed_restore_is_never_taken_for_a_finished_one(site: Site) -> None:
    for at in (2, 40, 400, 0):
        target = site.clusters.directory() / "data"
        assert run_killed(site, target, at) == -signal.SIGKILL
        assert_interrupted(site, target)


def test_cancelled_restore_is_never_taken_for_a_finished_one(site: Site) -> None:
    target = site.clusters.directory() / "data"
    answers = iter([False, True])
    with pytest.raises(CancelledError) as caught:
        site.app.restore(RestoreOptions(target), cancelled=lambda: next(answers))
    assert caught.value.exit_code == 130
    assert_interrupted(site, target)


def run_killed(site: Site, target: Path, at: int) -> int:
    command = [sys.executable, "-m", "tests.fault.killed_restore", str(site.repository_path)]
    path = os.pathsep.join([str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(target), str(at)],
        cwd=REPOSITORY_ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode


def assert_interrupted(site: Site, target: Path) -> None:
    """No server starts on it, and no second restore goes into it."""
    with pytest.raises(TargetError, match="interrupted"):
        site.app.restore(RestoreOptions(target))
    with pytest.raises(ServerError):
        site.copy_at(target).start()
    assert not (target / "postmaster.pid").exists()


def test_directory_of_a_running_server_is_refused(site: Site) -> None:
    before = (site.cluster.datadir / "global" / "pg_control").stat().st_ino
    for target in (site.cluster.datadir, site.cluster.datadir / "base" / "new"):
        with pytest.raises(TargetError):
            site.app.restore(RestoreOptions(target))
        assert (site.cluster.datadir / "global" / "pg_control").stat().st_ino == before
    assert not (site.cluster.datadir / "base" / "new").exists()
    assert site.cluster.scalar("SELECT 1") == 1


# -- hostile repositories -----------------------------------------------------------------------

HUGE = 2**63
HOSTILE: dict[str, dict[str, Any]] = {
    "parent": {"files": {"../escaped": b"x"}},
    "parent within": {"files": {"base/../../escaped": b"x"}, "entries": [directory("base")]},
    "absolute": {"files": {"/tmp/dbmodule-escaped": b"x"}},
    "double slash": {"files": {"base//escaped": b"x"}, "entries": [directory("base")]},
    "here": {"files": {"./escaped": b"x"}},
    "empty name": {"files": {"": b"x"}},
    "zero byte": {"files": {"esc\0aped": b"x"}},
    "directory outside": {"entries": [directory("../escaped")]},
    "link": {"entries": [link("escape", "/tmp")], "files": {"escape/x": b"x"}},
    "link within": {"entries": [link("base", "..")], "files": {"base/x": b"x"}},
    "tablespace link unmapped": {
        "entries": [directory("pg_tblspc"), link("pg_tblspc/16400", "/tmp")],
        "files": {"pg_tblspc/16400/x": b"x"},
    },
    "tablespace parent": {
        "entries": [directory("pg_tblspc"), link("pg_tblspc/../../x", "/tmp")],
    },
    "tablespace file outside": {"files": {"pg_tblspc/../../x": b"x"}},
    "twice": {"entries": [directory("base"), directory("base")]},
    "file and directory": {"files": {"a": b"x", "a/b": b"x"}},
    "directory below a file": {"files": {"a": b"x"}, "entries": [directory("a/b")]},
    "missing parent": {"files": {"not/there": b"x"}},
    "a file called pg_wal": {"files": {"pg_wal": b"x"}},
    "reserved": {"files": {"recovery.signal": b"x"}},
    "the marker": {"files": {"dbmodule.restoring": b"x"}},
    "control twice": {
        "entries": [directory("global")],
        "files": {"global/pg_control.dbmodule.staged": b"x"},
    },
    "long name": {"files": {"x" * 5000: b"x"}},
    "size without bytes": {"lies": [Lie("lie", 1 << 40, [])]},
    "size beyond all": {"lies": [Lie("lie", HUGE, [(0, 1, 0, 0, 0)])]},
    "size beyond its frames": {"lies": [Lie("lie", 80 * 8192, [(0, 80, 0, 0, 0)])]},
    "more blocks than size": {"lies": [Lie("lie", 8192, [(0, 2**32 - 1, 0, 0, 0)])]},
    "block beyond": {"lies": [Lie("lie", 8192, [(7, 1, 0, 0, 0)])]},
    "unordered": {"lies": [Lie("lie", 2 * 8192, [(9, 1, 0, 0, 0), (0, 1, 0, 0, 0)])]},
    "pack out of range": {"lies": [Lie("lie", 8192, [(0, 1, 99, 0, 0)])]},
    "frame out of range": {"lies": [Lie("lie", 8192, [(0, 1, 0, 9999, 0)])]},
    "slot out of range": {"lies": [Lie("lie", 8192, [(0, 1, 0, 0, 200)])]},
    "no tables": {"root": {"files": None}},
    "rows beyond": {"root": {"extents": {"rows": HUGE, "group_rows": HUGE, "groups": []}}},
    "negative rows": {"root": {"files": {"rows": -5, "group_rows": 4096, "groups": [[0, 0]]}}},
    "group elsewhere": {"root": {"files": {"rows": 1, "group_rows": 1, "groups": [[7, 7]]}}},
    "group of another kind": {"root": {"files": {"rows": 3, "group_rows": 9, "groups": [[0, 0]]}}},
    "group before": {"root": {"files": {"rows": 1, "group_rows": 1, "groups": [[0, -1]]}}},
    "extents missing": {"root": {"extents": {"rows": 0, "group_rows": 16384, "groups": []}}},
    "tablespace on existing data": {"tablespaces": {"16400": "/somewhere"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_backup_is_refused_and_stays_inside(
    stored: tuple[MemoryStore, Manifest], tmp_path: Path, case: str
) -> None:
    store, template = stored
    arguments = dict(HOSTILE[case])
    arguments["entries"] = [directory("global"), *arguments.get("entries", [])]
    if case == "control twice":
        arguments["entries"].pop()
    backup = commit_hostile(store, template, **arguments)
    target = tmp_path / "target"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("keep")
    before = snapshot(tmp_path)
    mapping = dict.fromkeys(arguments.get("tablespaces", {}).values(), precious)
    repository = Repository.open(store)
    with pytest.raises(DbmoduleError) as caught:
        restore(
            repository,
            repository.manifests(mini.CLUSTER),
            RestoreRequest(backup, target, mapping, threads=1),
            open_target=LocalTargetDirectory,
            path_exists=os.path.lexists,
            staged_control="global/pg_control.dbmodule.staged",
            progress=lambda phase, done, total: None,
            cancelled=lambda: False,
        )
    assert caught.value.exit_code in (4, 5)
    assert caught.value.message
    assert not (target / "global" / "pg_control").exists()
    assert snapshot(tmp_path, without="target") == before
    assert not Path("/tmp/dbmodule-escaped").exists()


def test_hostile_mode_is_no_set_user_id(
    stored: tuple[MemoryStore, Manifest], tmp_path: Path
) -> None:
    """What an enemy gives the server's account to own must not run as that account."""
    store, template = stored
    entry = directory("global")
    sneaky = replace(entry, path="sneaky", mode=0o6755)
    backup = commit_hostile(store, template, entries=[entry, sneaky])
    mini.restore_to(store, backup, tmp_path / "target")
    assert (tmp_path / "target" / "sneaky").stat().st_mode & 0o7777 == 0o755


# -- tablespaces --------------------------------------------------------------------------------


@pytest.fixture
def spaced(make_site: SiteFactory, pg_major: int) -> tuple[Site, Path]:
    """A server with a table in a tablespace of its own."""
    site = make_site(pg_major, extension=False)
    location = site.clusters.directory() / "space"
    make_location(site, location)
    site.cluster.execute(f"CREATE TABLESPACE outside LOCATION '{location}'")
    site.cluster.execute(
        "CREATE TABLE t TABLESPACE outside AS SELECT g, md5(g::text) AS m"
        " FROM generate_series(1, 3000) g"
    )
    site.cluster.execute("SELECT pg_switch_wal(); CHECKPOINT")
    return site, location


def make_location(site: Site, location: Path) -> None:
    location.mkdir(mode=0o700)
    if os.geteuid() == 0:
        owner = site.cluster.datadir.stat()
        os.chown(location, owner.st_uid, owner.st_gid)


def test_copy_never_touches_its_source_s_tablespace(spaced: tuple[Site, Path]) -> None:
    site, location = spaced
    site.full()
    site.cluster.execute("UPDATE t SET m = 'later' WHERE g % 10 = 0")
    site.diff(detect="content")
    site.cluster.stop()  # so that nothing but the copy could write there
    before = snapshot(location)
    expected = sorted(snapshot(site.cluster.datadir / "pg_tblspc"))
    elsewhere = site.clusters.directory() / "moved"
    copy = site.start_copy(tablespace_map={str(location): elsewhere})
    assert copy.scalar("SELECT count(*) FROM t WHERE m = 'later'") == 300
    assert copy.scalar("SELECT count(*) FROM t") == 3000
    assert copy.scalar(
        "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'outside'"
    ) == str(elsewhere)
    copy.execute("INSERT INTO t SELECT g, 'copy' FROM generate_series(1, 5000) g")
    copy.execute("CREATE TABLE u TABLESPACE outside AS SELECT 1 AS x")
    copy.execute("CHECKPOINT")
    copy.stop()
    assert snapshot(location) == before
    assert sorted(snapshot(site.cluster.datadir / "pg_tblspc")) == expected
    site.cluster.start()
    assert site.cluster.scalar("SELECT count(*) FROM t") == 3000


def test_tablespace_maps_that_make_no_sense_are_refused(spaced: tuple[Site, Path]) -> None:
    site, location = spaced
    site.full()
    before = snapshot(location)
    base = site.clusters.directory()
    target = base / "data"
    (base / "link").symlink_to(target)
    refused: list[dict[str, Path]] = [
        {},
        {str(location): location},
        {str(location): location / "below"},
        {str(location): Path("relative")},
        {str(location): target},
        {str(location): target / "inside"},
        {str(location): base / "link"},
        {str(location): base},
        {str(location): base / "x" / ".." / "data" / "inside"},
        {str(location): site.cluster.datadir / "inside"},
        {str(location): base / "fine", "/unknown": base / "other"},
    ]
    for mapping in refused:
        with pytest.raises(DbmoduleError) as caught:
            site.app.restore(RestoreOptions(target, tablespace_map=mapping))
        assert caught.value.exit_code in (2, 4), mapping
        assert not target.exists(), mapping
    assert snapshot(location) == before


def test_tablespace_created_during_the_backup_is_not_replayed_into(
    make_site: SiteFactory, pg_major: int
) -> None:
    site = make_site(pg_major, extension=False)
    location = site.clusters.directory() / "space"
    make_location(site, location)
    create = f"CREATE TABLESPACE late LOCATION '{location}'"
    full_while(site, [create, "CREATE TABLE l TABLESPACE late AS SELECT 1 AS x"])
    before = snapshot(location)
    elsewhere = site.clusters.directory() / "moved"
    for mapping in ({}, {str(location): elsewhere}):
        with pytest.raises(RefusedError) as caught:
            target = site.clusters.directory() / "data"
            site.app.restore(RestoreOptions(target, tablespace_map=mapping))
        assert caught.value.exit_code in (2, 4)
        assert not target.exists()
    assert snapshot(location) == before


def full_while(site: Site, statements: list[str]) -> None:
    """A full backup; the statements run when it begins to copy."""
    waiting = list(statements)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "copy" and waiting:
            with site.cluster.connect() as connection:
                while waiting:
                    connection.execute(waiting.pop(0).encode())

    site.app.backup(BackupOptions(BackupType.FULL), progress=progress)


def test_in_place_tablespaces_restore_and_start(make_site: SiteFactory, pg_major: int) -> None:
    """One from before the backup, and one that only its WAL knows of."""
    site = make_site(pg_major, extension=False)
    # For these sessions only, so that nothing in the data directory allows them.
    allow = "SET allow_in_place_tablespaces = on"
    with site.cluster.connect() as connection:
        connection.execute(allow)
        connection.execute("CREATE TABLESPACE early LOCATION ''")
        connection.execute("CREATE TABLE e TABLESPACE early AS SELECT 1 AS x")
    full_while(site, ["SELECT 1"])
    copy = site.start_copy()
    assert copy.scalar("SELECT x FROM e") == 1
    copy.stop()
    site.cluster.execute("DROP TABLE e")
    site.cluster.execute("DROP TABLESPACE early")
    late = [allow, "CREATE TABLESPACE late LOCATION ''"]
    full_while(site, [*late, "CREATE TABLE l TABLESPACE late AS SELECT 2 AS x"])
    copy = site.start_copy()
    assert copy.scalar("SELECT x FROM l") == 2


# -- chains -------------------------------------------------------------------------------------


def test_chain_without_its_full_is_refused(
    stored: tuple[MemoryStore, Manifest], tmp_path: Path
) -> None:
    store, full = stored
    root = tmp_path / "data"
    mini.change_state(root, 1)
    diff = mini.back_up(store, root, BackupType.DIFF)
    store.delete(manifest_name(mini.CLUSTER, full.backup_id))
    with pytest.raises(BrokenChainError, match=full.backup_id) as caught:
        mini.restore_to(store, diff.backup_id, tmp_path / "target")
    assert caught.value.exit_code == 4
    for kind in (BackupType.DIFF, BackupType.INCR):
        with pytest.raises(RefusedError) as refused:
            mini.back_up(store, root, kind)
        assert refused.value.exit_code == 4
    assert not (tmp_path / "target").exists()
    mini.back_up(store, root, BackupType.FULL)
    mini.back_up(store, root, BackupType.DIFF)


def test_chain_whose_full_was_replaced_is_refused(
    stored: tuple[MemoryStore, Manifest], tmp_path: Path
) -> None:
    store, full = stored
    root = tmp_path / "data"
    mini.change_state(root, 1)
    diff = mini.back_up(store, root, BackupType.DIFF)
    store.delete(manifest_name(mini.CLUSTER, full.backup_id))
    Repository.open(store).commit(replace(full, label="another"))
    for backup in (diff.backup_id,):
        with pytest.raises(BrokenChainError, match="has changed") as caught:
            mini.restore_to(store, backup, tmp_path / "target")
        assert caught.value.exit_code == 4
    with pytest.raises(BrokenChainError):
        mini.back_up(store, root, BackupType.INCR)
    said = mini.verify_all(store)
    assert [d.object for d in said.damage] == [manifest_name(mini.CLUSTER, diff.backup_id)]
