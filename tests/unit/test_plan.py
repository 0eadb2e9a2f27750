"""What of a listed data directory is copied, and as what."""

from __future__ import annotations

from dbmodule.backup.plan import Plan, make_plan
from dbmodule.datafile import CONTROL_FILE, RECREATED_DIRECTORIES, Kind
from dbmodule.ports import SourceEntry


def file(path: str, size: int = 8192) -> SourceEntry:
    return SourceEntry(path, "file", 0o600, size)


def directory(path: str) -> SourceEntry:
    return SourceEntry(path, "directory", 0o700)


def link(path: str, target: str) -> SourceEntry:
    return SourceEntry(path, "symlink", 0o777, target=target)


def planned(*paths: str) -> dict[str, Kind]:
    return {path: kind for path, kind, _ in make_plan(map(file, paths)).files}


def test_each_file_gets_its_kind() -> None:
    assert planned(
        "PG_VERSION",
        "base/5/16384",
        "base/5/16384.1",
        "base/5/16384_fsm",
        "base/5/16384_vm",
        "global/1260",
        "base/5/pg_filenode.map",
        "pg_twophase/00000305",
        "pg_xact/0000",
        "postgresql.conf",
    ) == {
        "PG_VERSION": Kind.CONTENT,
        "base/5/16384": Kind.RELATION,
        "base/5/16384.1": Kind.RELATION,
        "base/5/16384_fsm": Kind.CONTENT,
        "base/5/16384_vm": Kind.CONTENT,
        "global/1260": Kind.RELATION,
        "base/5/pg_filenode.map": Kind.ATOMIC,
        "pg_twophase/00000305": Kind.ATOMIC,
        "pg_xact/0000": Kind.CONTENT,
        "postgresql.conf": Kind.CONTENT,
    }


def test_the_control_file_is_left_for_the_end() -> None:
    assert planned(CONTROL_FILE, "global/1260") == {"global/1260": Kind.RELATION}


def test_what_is_excluded_is_left_out() -> None:
    assert (
        planned(
            "postmaster.pid",
            "backup_label",
            "backup_manifest",
            "standby.signal",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status/000000010000000000000001.done",
            "pg_replslot/s/state",
            "pg_stat_tmp/global.stat",
            "base/pgsql_tmp/pgsql_tmp77.0",
            "base/5/pgsql_tmp77.0",
            "base/5/t3_16500",
            "base/5/t3_16500_fsm",
            "base/5/pg_internal.init",
            "global/pg_internal.init.88",
        )
        == {}
    )


def test_of_an_unlogged_relation_only_its_init_fork_is_copied() -> None:
    assert set(
        planned(
            "base/5/16400",
            "base/5/16400.1",
            "base/5/16400_fsm",
            "base/5/16400_vm",
            "base/5/16400_init",
            "base/5/16401",
            "base/5/164001",
        )
    ) == {"base/5/16400_init", "base/5/16401", "base/5/164001"}


def test_an_init_fork_speaks_for_its_own_directory_only() -> None:
    paths = {
        "base/5/16400",
        "base/6/16400_init",
        "pg_tblspc/16390/PG_18_202506291/6/16400",
        "global/16400",
    }
    assert set(planned(*paths)) == paths


def test_directories_that_a_restore_makes_are_not_recorded() -> None:
    entries = [directory(path) for path in RECREATED_DIRECTORIES]
    entries += [link("pg_wal", "/fast/wal")]  # in place of the directory
    plan = make_plan(entries)
    assert (plan.directories, plan.links, plan.files) == ([], [], [])


def test_other_directories_are_recorded_in_order() -> None:
    paths = ["base", "base/5", "base/pgsql_tmp", "pg_replslot/s", "pg_tblspc", "pg_xact", "mine"]
    plan = make_plan(map(directory, paths))
    assert [entry.path for entry in plan.directories] == [
        "base",
        "base/5",
        "pg_tblspc",
        "pg_xact",
        "mine",
    ]


def test_tablespaces_outside_the_directory_are_named() -> None:
    entries = [
        link("pg_tblspc/16390", "/srv/one"),
        directory("pg_tblspc/16391"),  # in place
        link("pg_tblspc/16392", "/srv/two"),
    ]
    plan = make_plan(entries)
    assert plan.tablespaces == {"16390": "/srv/one", "16392": "/srv/two"}
    assert [entry.path for entry in plan.directories] == ["pg_tblspc/16391"]


def test_the_listed_bytes_are_those_of_the_planned_files() -> None:
    assert Plan().bytes_listed == 0
    plan = make_plan([file("base/5/1", 8192), file("postmaster.pid", 90), file("PG_VERSION", 3)])
    assert plan.bytes_listed == 8195
