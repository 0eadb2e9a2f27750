"""Pages, names, control file and WAL as real servers write them, against the servers' own tools."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dbmodule import controlfile, datafile, page, wal
from dbmodule.controlfile import DBState, WalLevel
from dbmodule.datafile import Kind
from dbmodule.errors import SourceError
from dbmodule.ident import PAGE_SIZE, Lsn, format_lsn, parse_lsn
from dbmodule.postgres.cluster import LocalCluster
from tests.fix_cluster import ClusterFactory, Clusters

SEGMENT = 16 * 1024 * 1024

WORKLOAD = (
    "CREATE TABLE plain (id int PRIMARY KEY, body text)",
    "CREATE UNLOGGED TABLE volatile AS SELECT generate_series(1, 1000) AS id",
    "INSERT INTO plain SELECT n, repeat(md5(n::text), 8) FROM generate_series(1, 6000) AS n",
    "DELETE FROM plain WHERE id % 3 = 0",
    "VACUUM plain",
    "CREATE TABLE moved TABLESPACE elsewhere AS SELECT * FROM plain",
    "CREATE INDEX ON moved USING gin (string_to_array(body, 'a'))",
    "CREATE INDEX ON moved USING brin (id)",
    "CREATE SEQUENCE counter",
    "SELECT nextval('counter') FROM generate_series(1, 100)",
    "SELECT pg_logical_emit_message(false, 'long', repeat('x', 300000))",
)


@dataclass(frozen=True)
class Backup:
    """A server that was backed up under load and runs on, and what the backup was told."""

    cluster: LocalCluster
    location: Path
    start: Lsn
    stop: Lsn
    system_identifier: int

    def segments(self) -> list[tuple[str, bytes]]:
        names = wal.segments_between(1, self.start, self.stop, SEGMENT)
        directory = self.cluster.datadir / "pg_wal"
        return [(name, (directory / name).read_bytes()) for name in names]

    def check(self, segments: list[tuple[str, bytes]], **changes: int) -> wal.WalSummary:
        facts = {
            "major": self.cluster.major,
            "system_identifier": self.system_identifier,
            "timeline": 1,
            "segment_size": SEGMENT,
            "start_lsn": self.start,
            "stop_lsn": self.stop,
        }
        return wal.check_segments(segments, **(facts | changes))


@pytest.fixture(scope="module")
def backup(clusters: Clusters, make_module_cluster: ClusterFactory, pg_major: int) -> Backup:
    cluster = make_module_cluster(pg_major, settings={"wal_keep_size": "1GB"})
    location = clusters.directory()
    cluster.execute("CREATE EXTENSION pageinspect")
    with cluster.connect() as connection:
        ((start,),) = connection.execute("SELECT pg_backup_start('formats', true)").fetchall()
        cluster.execute(f"CREATE TABLESPACE elsewhere LOCATION '{location}'")
        for statement in WORKLOAD:
            cluster.execute(statement)
        cluster.execute("SELECT pg_switch_wal()")
        cluster.execute("INSERT INTO plain SELECT n, '' FROM generate_series(10001, 10100) AS n")
        ((stop,),) = connection.execute("SELECT lsn FROM pg_backup_stop(false)").fetchall()
    system_identifier = cluster.scalar("SELECT system_identifier FROM pg_control_system()")
    return Backup(cluster, location, parse_lsn(start), parse_lsn(stop), system_identifier)


@pytest.fixture
def stopped(backup: Backup) -> Iterator[LocalCluster]:
    backup.cluster.stop()
    yield backup.cluster
    backup.cluster.start()


def paths(datadir: Path) -> list[str]:
    """Every file, through the links of tablespaces."""
    top = [path for path in datadir.rglob("*") if path.is_file()]
    linked = [
        path for link in (datadir / "pg_tblspc").iterdir() for path in link.rglob("*")
        if path.is_file()
    ]  # fmt: skip
    return sorted({path.relative_to(datadir).as_posix() for path in [*top, *linked]})


def test_every_page_of_a_stopped_server_verifies(stopped: LocalCluster) -> None:
    control = controlfile.parse((stopped.datadir / datafile.CONTROL_FILE).read_bytes())
    forks: set[str] = set()
    for path in paths(stopped.datadir):
        file = datafile.relation(path)
        if file is None:
            continue
        forks.add(file.fork)
        content = (stopped.datadir / path).read_bytes()
        first_block = file.first_block(control.blocks_per_segment)
        assert page.checksum_failures(content, first_block).tolist() == [], path
        headers = page.headers(content)
        assert (page.looks_valid(headers) | page.all_zero(content)).all(), path
        assert (page.lsns(headers) <= control.checkpoint).all(), path
    assert forks == {"main", "fsm", "vm", "init"}


def test_a_flipped_bit_is_found_in_its_page(stopped: LocalCluster) -> None:
    biggest = max(
        (path for path in paths(stopped.datadir) if datafile.classify(path) is Kind.RELATION),
        key=lambda path: (stopped.datadir / path).stat().st_size,
    )
    content = bytearray((stopped.datadir / biggest).read_bytes())
    rng = random.Random(1)
    for _ in range(100):
        position, mask = rng.randrange(len(content)), 1 << rng.randrange(8)
        content[position] ^= mask
        assert page.checksum_failures(content, 0).tolist() == [position // PAGE_SIZE]
        content[position] ^= mask
    assert page.checksum_failures(content, 131072).size == len(content) // PAGE_SIZE


def test_checksums_are_those_of_pageinspect(backup: Backup) -> None:
    rng = np.random.default_rng(2)
    first_blocks = [0, 1, 131071, 131072, 5 * 131072 + 7, 2**31 - 1]
    with backup.cluster.connect() as connection:
        for first_block in first_blocks:
            content = rng.bytes(PAGE_SIZE)
            ((answer,),) = connection.execute(
                "SELECT page_checksum(%s::bytea, %s)", [content, first_block]
            ).fetchall()
            assert page.compute_checksums(content, first_block).tolist() == [answer & 0xFFFF]
            assert page.compute_checksums_numpy(content, first_block).tolist() == [answer & 0xFFFF]


def test_names_are_what_the_server_says_they_are(backup: Backup) -> None:
    cluster = backup.cluster
    with cluster.connect() as connection:
        connection.execute("CREATE TEMP TABLE passing AS SELECT 1")
        relations = connection.execute(
            "SELECT pg_relation_filepath(oid), relfilenode::bigint, relpersistence::text"
            " FROM pg_class WHERE pg_relation_filenode(oid) IS NOT NULL"
        ).fetchall()
        found = paths(cluster.datadir)
    assert {kind for _, _, kind in relations} == {"p", "u", "t"}
    in_tablespace = 0
    for path, relfilenode, persistence in relations:
        assert path in found
        file = datafile.relation(path)
        if persistence == "t":
            assert datafile.classify(path) is Kind.EXCLUDED
            continue
        assert datafile.classify(path) is Kind.RELATION
        assert file is not None
        assert relfilenode in (0, file.relfilenode)
        in_tablespace += path.startswith("pg_tblspc/")
        names = [other.rpartition("/")[2] for other in found
                 if other.rpartition("/")[0] == path.rpartition("/")[0]]  # fmt: skip
        unlogged = file.relfilenode in datafile.unlogged_relations(names)
        assert unlogged == (persistence == "u")
    assert in_tablespace
    control = controlfile.parse((cluster.datadir / datafile.CONTROL_FILE).read_bytes())
    version = datafile.tablespace_version_directory(cluster.major, control.catalog_version)
    assert [path.name for path in backup.location.iterdir()] == [version]
    atomic = {path.rpartition("/")[2] for path in found if datafile.classify(path) is Kind.ATOMIC}
    assert atomic == {"pg_filenode.map"}
    assert datafile.classify("global/pg_control") is Kind.CONTROL
    for directory in datafile.RECREATED_DIRECTORIES:
        exists = (cluster.datadir / directory).is_dir()
        assert exists or (directory == "pg_wal/summaries" and cluster.major < 17)


STATES = {
    DBState.SHUT_DOWN: "shut down",
    DBState.IN_PRODUCTION: "in production",
}


def control_data(cluster: LocalCluster) -> dict[str, str]:
    output = cluster.run("pg_controldata", "-D", str(cluster.datadir)).stdout
    return dict(re.split(r":\s*", line, maxsplit=1) for line in output.splitlines() if ":" in line)


def compare_control(cluster: LocalCluster, state: DBState) -> None:
    control = controlfile.parse((cluster.datadir / datafile.CONTROL_FILE).read_bytes())
    stated = control_data(cluster)
    assert control.state is state
    assert control.wal_level is WalLevel.REPLICA
    assert {
        "Database system identifier": str(control.system_identifier),
        "pg_control version number": str(control.pg_control_version),
        "Catalog version number": str(control.catalog_version),
        "Database cluster state": STATES[control.state],
        "Latest checkpoint location": format_lsn(control.checkpoint),
        "Latest checkpoint's REDO location": format_lsn(control.redo),
        "Latest checkpoint's TimeLineID": str(control.timeline),
        "Latest checkpoint's PrevTimeLineID": str(control.prev_timeline),
        "Latest checkpoint's full_page_writes": "on" if control.full_page_writes else "off",
        "Minimum recovery ending location": format_lsn(control.min_recovery_point),
        "Min recovery ending loc's timeline": str(control.min_recovery_timeline),
        "Backup start location": format_lsn(control.backup_start),
        "Backup end location": format_lsn(control.backup_end),
        "End-of-backup record required": "yes" if control.backup_end_required else "no",
        "wal_level setting": control.wal_level.name.lower(),
        "wal_log_hints setting": "on" if control.wal_log_hints else "off",
        "Database block size": str(control.block_size),
        "Blocks per segment of large relation": str(control.blocks_per_segment),
        "WAL block size": str(control.wal_block_size),
        "Bytes per WAL segment": str(control.wal_segment_size),
        "Data page checksum version": str(control.data_checksum_version),
    }.items() <= stated.items()


def test_the_control_file_says_what_pg_controldata_says(stopped: LocalCluster) -> None:
    compare_control(stopped, DBState.SHUT_DOWN)


def test_the_control_file_of_a_running_server(backup: Backup) -> None:
    compare_control(backup.cluster, DBState.IN_PRODUCTION)


def test_other_settings_in_the_control_file(make_cluster: ClusterFactory, pg_major: int) -> None:
    cluster = make_cluster(pg_major, checksums=False, settings={"wal_log_hints": "on"})
    compare_control(cluster, DBState.IN_PRODUCTION)
    control = controlfile.parse((cluster.datadir / datafile.CONTROL_FILE).read_bytes())
    assert control.wal_log_hints
    assert control.data_checksum_version == 0


def test_a_walk_sees_the_records_that_pg_waldump_sees(backup: Backup) -> None:
    dumped = backup.cluster.run(
        "pg_waldump",
        *("-p", str(backup.cluster.datadir / "pg_wal"), "-t", "1"),
        *("-s", format_lsn(backup.start), "-e", format_lsn(backup.stop)),
    ).stdout.splitlines()
    summary = backup.check(backup.segments())
    assert summary.records == len(dumped)
    assert summary.end_lsn == backup.stop
    assert "BACKUP_END" in dumped[-1]
    assert any("SWITCH" in line for line in dumped)
    ((oid,),) = backup.cluster.query("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere'")
    (created,) = summary.created_tablespaces
    assert (created.oid, created.path) == (oid, str(backup.location))
    (line,) = (line for line in dumped if "Tablespace" in line)
    stated = re.search(r"lsn: ([0-9A-F]+/[0-9A-F]+)", line)
    assert stated is not None
    assert parse_lsn(stated[1]) == created.lsn


def test_a_walk_may_end_only_where_a_record_ends(backup: Backup) -> None:
    for offset in (-8, 8):
        with pytest.raises(SourceError):
            backup.check(backup.segments(), stop_lsn=backup.stop + offset)


def test_damaged_wal_is_found(backup: Backup) -> None:
    """Whole words, since single bytes may be padding, in front of the switch and after it."""
    segments = [(name, bytearray(content)) for name, content in backup.segments()]
    base = backup.start // SEGMENT * SEGMENT
    switched = base + len(segments[0][1].rstrip(b"\0"))
    ranges = [range(backup.start, switched - 8, 8), range(base + SEGMENT, backup.stop, 8)]
    rng = random.Random(3)
    for words in ranges:
        for word in rng.sample(words, 6):
            _, content = segments[(word - base) // SEGMENT]
            at = word % SEGMENT
            content[at : at + 8] = bytes(byte ^ 0x10 for byte in content[at : at + 8])
            with pytest.raises(SourceError, match="WAL segment"):
                backup.check([(name, bytes(content)) for name, content in segments])
            content[at : at + 8] = bytes(byte ^ 0x10 for byte in content[at : at + 8])
    backup.check([(name, bytes(content)) for name, content in segments])


def test_foreign_or_missing_wal_is_found(backup: Backup) -> None:
    segments = backup.segments()
    with pytest.raises(SourceError, match="belongs to the cluster"):
        backup.check(segments, system_identifier=backup.system_identifier + 1)
    with pytest.raises(SourceError, match="is missing"):
        backup.check(segments[:-1])
    with pytest.raises(SourceError, match="expected, not"):
        backup.check(segments[1:])
    with pytest.raises(SourceError, match="expected, not"):
        backup.check(segments, timeline=2)
    other_major = next(major for major in wal.PAGE_MAGIC if major != backup.cluster.major)
    with pytest.raises(SourceError, match="bad page header"):
        backup.check(segments, major=other_major)


def test_wal_after_a_promotion(make_cluster: ClusterFactory, pg_major: int) -> None:
    """The new timeline's first pages are copies of the old one's, up to where it was left."""
    cluster = make_cluster(pg_major)
    cluster.execute("CREATE TABLE before AS SELECT generate_series(1, 1000)")
    cluster.stop()
    (cluster.datadir / "standby.signal").touch()
    cluster.start()
    assert cluster.scalar("SELECT pg_promote()")
    cluster.execute("CHECKPOINT")
    control = controlfile.parse((cluster.datadir / datafile.CONTROL_FILE).read_bytes())
    assert control.timeline == 2
    compare_control(cluster, DBState.IN_PRODUCTION)

    history_file = cluster.datadir / "pg_wal" / wal.history_name(2)
    history = wal.parse_history(history_file.read_text())
    ((timeline, switch),) = history
    assert timeline == 1
    assert wal.lies_on_history(1, switch, 2, history)
    assert not wal.lies_on_history(1, switch + 8, 2, history)

    cluster.execute("INSERT INTO before SELECT generate_series(1, 5000)")
    insert = parse_lsn(cluster.scalar("SELECT pg_current_wal_insert_lsn()::text"))
    cluster.execute("SELECT pg_switch_wal()")
    facts = {"major": pg_major, "system_identifier": control.system_identifier, "timeline": 2}
    name = wal.segment_name(2, wal.segment_of(switch, SEGMENT), SEGMENT)
    segment = (cluster.datadir / "pg_wal" / name).read_bytes()
    summary = wal.check_segments(
        [(name, segment)], start_lsn=switch, stop_lsn=insert, segment_size=SEGMENT, **facts
    )
    assert summary.records > 5000
