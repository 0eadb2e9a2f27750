"""Every kind of name that a data directory holds, and the ones that only look like it."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.datafile import (
    RECREATED_DIRECTORIES,
    Fork,
    Kind,
    RelationFile,
    classify,
    contents_excluded,
    relation,
    tablespace_version_directory,
    unlogged_relations,
)

DIRECTORIES = ["global", "base/1", "base/16384", "pg_tblspc/16400/PG_18_202506291/5"]
oids = st.integers(1, 2**32 - 1)


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize("name", ["1", "1259", "16385.1", "4294967295.31"])
def test_main_forks_are_relations(directory: str, name: str) -> None:
    assert classify(f"{directory}/{name}") is Kind.RELATION


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize("name", ["1259_fsm", "1259_vm", "16385_init", "16385_fsm.1", "1259_vm.2"])
def test_other_forks_are_compared_by_content(directory: str, name: str) -> None:
    assert classify(f"{directory}/{name}") is Kind.CONTENT
    file = relation(f"{directory}/{name}")
    assert file is not None
    assert f"_{file.fork}" in name


@pytest.mark.parametrize(
    "path",
    [
        "base/1/01259",
        "base/01/1259",
        "base/1/1259.0",
        "base/1/1259.01",
        "base/1/1259_FSM",
        "base/1/1259_foo",
        "base/1/1259.1_fsm",
        "base/1/1259.",
        "base/1/1259 ",
        "base/1/1259\n",
        "base/1/4294967296",
        "base/4294967296/1",
        "base/1/1.4294967296",
        "base/1/\u0661",
        "base/1/x/1259",
        "base/1259",
        "global/1/1259",
        "1259",
        "pg_tblspc/16400",
        "pg_tblspc/16400/5/16401",
        "pg_tblspc/16400/PG_18/5/16401",
        "pg_tblspc/16400/PG_18_202506291/16401",
        "pg_tblspc/x/PG_18_202506291/5/16401",
        "x/base/1/1259",
        "pg_xact/0000",
        "pg_multixact/members/0000",
        "pg_multixact/offsets/0000",
        "pg_commit_ts/0000",
        "pg_logical/replorigin_checkpoint",
        "pg_logical/mappings/map-4000-4eb-1_60DE1E08-5376b5-537c6b",
        "pg_logical/snapshots/0-3000028.snap",
        "pg_stat/pgstat.stat",
        "PG_VERSION",
        "base/1/PG_VERSION",
        "postgresql.conf",
        "postgresql.auto.conf",
        "pg_hba.conf",
        "pg_ident.conf",
        "recovery.conf",
        "log/postgresql.log",
        "server.key",
        "pg_twophase/00000305.tmp",
        "pg_twophase/0000030",
        "pg_twophase/x/00000305",
        "base/1/pg_filenode.map.tmp",
        "pg_filenode.map",
        "pg_control",
        "base/1/pg_control",
        "sub/backup_label",
        "sub/postmaster.pid",
        "pg_wally/000000010000000000000001",
        "tx_1",
        "t3_16385",
        "global/t3_16385",
        "base/1/t3_16385.tmp",
        "base/1/tx_16385",
        "base/1/t3",
        "pgsql",
    ],
)
def test_what_is_not_known_for_certain_is_content(path: str) -> None:
    assert classify(path) is Kind.CONTENT
    assert relation(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "global/pg_filenode.map",
        "base/16384/pg_filenode.map",
        "pg_tblspc/16400/PG_15_202209061/5/pg_filenode.map",
        "pg_twophase/00000305",
        "pg_twophase/000000000000030A",
    ],
)
def test_files_with_a_crc_are_read_at_once(path: str) -> None:
    assert classify(path) is Kind.ATOMIC


def test_the_control_file() -> None:
    assert classify("global/pg_control") is Kind.CONTROL


@pytest.mark.parametrize(
    "path",
    [
        "backup_label",
        "backup_label.old",
        "backup_manifest",
        "tablespace_map",
        "tablespace_map.old",
        "recovery.signal",
        "standby.signal",
        "postmaster.pid",
        "postmaster.opts",
        "current_logfiles",
        "postgresql.auto.conf.tmp",
        "global/pg_internal.init",
        "base/5/pg_internal.init",
        "base/5/pg_internal.init.4711",
        "pg_tblspc/16400/PG_18_202506291/5/pg_internal.init",
        "base/5/t3_16385",
        "base/5/t0_16385",
        "base/5/t12_16385_fsm",
        "base/5/t12_16385_vm.1",
        "base/5/t12_16385.1",
        "pg_tblspc/16400/PG_18_202506291/5/t3_16385",
        "base/pgsql_tmp/pgsql_tmp4711.0",
        "base/pgsql_tmp/pgsql_tmp4711.0.fileset/i0of1.p0.0",
        "pg_tblspc/16400/PG_18_202506291/pgsql_tmp/pgsql_tmp4711.1",
        "pg_wal/000000010000000000000001",
        "pg_wal/00000002.history",
        "pg_wal/archive_status/000000010000000000000001.done",
        "pg_wal/summaries/0000000100000000010000280000000001000100.summary",
        "pg_replslot/slot/state",
        "pg_stat_tmp/global.stat",
        "pg_subtrans/0000",
        "pg_notify/0000",
        "pg_serial/0000",
        "pg_snapshots/00000003-0000001B-1",
        "pg_dynshmem/mmap.1",
    ],
)
def test_excluded(path: str) -> None:
    assert classify(path) is Kind.EXCLUDED
    assert relation(path) is None


@pytest.mark.parametrize("directory", RECREATED_DIRECTORIES)
def test_recreated_directories_are_left_empty(directory: str) -> None:
    assert contents_excluded(directory)
    assert classify(f"{directory}/anything") is Kind.EXCLUDED
    assert classify(f"{directory}/any/thing") is Kind.EXCLUDED


def test_parents_come_before_their_children() -> None:
    for position, directory in enumerate(RECREATED_DIRECTORIES):
        parent = directory.rpartition("/")[0]
        assert not parent or parent in RECREATED_DIRECTORIES[:position]


@pytest.mark.parametrize(
    "directory", ["base/pgsql_tmp", "pg_tblspc/1/PG_18_2025/pgsql_tmp", "pg_wal/x"]
)
def test_other_directories_without_contents(directory: str) -> None:
    assert contents_excluded(directory)


@pytest.mark.parametrize(
    "directory",
    ["", "base", "base/1", "global", "pg_xact", "pg_stat", "pg_logical", "pg_logical/mappings",
     "pg_logical/snapshots", "pg_twophase", "pg_tblspc", "pg_multixact/members", "log", "x/pg_wal"],
)  # fmt: skip
def test_directories_that_are_copied(directory: str) -> None:
    assert not contents_excluded(directory)


@given(oids, oids, oids, st.integers(0, 2**32 - 1), st.sampled_from(typing.get_args(Fork)))
def test_numbers_are_read_back(
    tablespace: int, database: int, relfilenode: int, segment: int, fork: Fork
) -> None:
    name = f"{relfilenode}" + ("" if fork == "main" else f"_{fork}")
    name += f".{segment}" if segment else ""
    places = {
        f"base/{database}": (1663, database),
        "global": (1664, 0),
        f"pg_tblspc/{tablespace}/PG_17_202406281/{database}": (tablespace, database),
    }
    for directory, (in_tablespace, in_database) in places.items():
        file = relation(f"{directory}/{name}")
        assert file == RelationFile(in_tablespace, in_database, relfilenode, fork, segment)


def test_first_block_counts_whole_segments() -> None:
    file = relation("base/1/1259.3")
    assert file is not None
    assert file.first_block(131072) == 3 * 131072


@given(st.text())
def test_any_text_is_classified(path: str) -> None:
    assert classify(path) in Kind
    assert (classify(path) is Kind.RELATION) <= (relation(path) is not None)


def test_unlogged_relations_are_those_with_an_init_fork() -> None:
    names = ["1", "1_fsm", "16385", "16385_init", "16385_vm", "16390_init", "x_init", "t3_5_init"]
    assert unlogged_relations(names) == {16385, 16390}
    assert unlogged_relations([]) == frozenset()


def test_version_directory() -> None:
    assert tablespace_version_directory(15, 202209061) == "PG_15_202209061"
