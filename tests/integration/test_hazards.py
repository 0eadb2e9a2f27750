"""Every way in which a server changes, hides or moves a page, and the rule that finds it.

A hazard is built on a real server between a full and the backups that build on it; the server's
directory is held still, backed up from there, restored, and compared with what it was, block by
block. Then the same is done with the rule taken out of the library: the oracle must see it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from dbmodule import detect
from dbmodule.backup.copier import Copier
from dbmodule.backup.values import CopyResult
from dbmodule.datafile import Kind, RelationFile
from dbmodule.errors import DbmoduleError
from dbmodule.ident import PAGE_SIZE, BackupId, BackupType, BlockNo, Lsn
from dbmodule.ports import SourceFile
from dbmodule.registry import Marks
from dbmodule.repository.tables import FileEntry
from dbmodule.walsummary import ChangedBlocks
from tests import ddl, oracles
from tests.fix_backup import Site, SiteFactory
from tests.frozen import Frozen, freeze

Patch = pytest.MonkeyPatch


# -- rules taken out -------------------------------------------------------------------------------


def older_is_unchanged(patch: Patch) -> None:
    """What tools do that compare LSNs only."""

    def compare(seen: detect.Observed, baseline: Marks, start: Lsn) -> detect.PageChanges:
        changed = seen.marks["lsn"] >= start
        changed[len(baseline) :] = True
        none = np.zeros(len(changed), np.bool_)
        return detect.PageChanges(changed, none, none)

    patch.setattr(detect, "compare_marks", compare)


def equal_is_unchanged(patch: Patch) -> None:
    """Pages beyond the baseline's length have nothing to differ from."""
    kept = detect.compare_marks

    def compare(seen: detect.Observed, baseline: Marks, start: Lsn) -> detect.PageChanges:
        found = kept(seen, baseline, start)
        found.changed[len(baseline) :] = False
        return found

    patch.setattr(detect, "compare_marks", compare)


def trust(pattern: str, patch: Patch) -> None:
    """Files whose length did not change did not change."""
    kept = Copier._identity_equals

    def equals(self: Copier, file: SourceFile, before: FileEntry) -> bool:
        same = file.identity().size == before.size and re.search(pattern, before.path)
        return bool(same) or kept(self, file, before)

    patch.setattr(Copier, "_identity_equals", equals)


def leave_out(prefix: str, patch: Patch) -> None:
    """Files that the baseline does not have are passed over."""
    kept = Copier.copy

    def copy(self: Copier, path: str, kind: Kind) -> CopyResult | None:
        return None if path.startswith(prefix) else kept(self, path, kind)

    patch.setattr(Copier, "copy", copy)


def databases_are_not_copied(patch: Patch) -> None:
    """For WAL summaries, what `older_is_unchanged` is for page headers."""
    kept = ChangedBlocks.within

    def within(
        self: ChangedBlocks, relation: tuple[int, int, int], first: int, count: int
    ) -> NDArray[np.int64]:
        self._databases.clear()
        return kept(self, relation, first, count)

    patch.setattr(ChangedBlocks, "within", within)


def both(*defects: Callable[[Patch], None]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        for defect in defects:
            defect(patch)

    return plant


# -- hazards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hazard:
    name: str
    before: str
    """SQL before the full."""
    change: Callable[[Site], None]
    defect: Callable[[Patch], None]
    detectors: tuple[str, ...] = ("scan", "wal")


def run(script: str, site: Site) -> None:
    """Statements of a script; `\\c name` goes on in another database."""
    database = "postgres"
    for line in script.split(";"):
        statement = line.strip()
        if statement.startswith("\\c "):
            database = statement.removeprefix("\\c ")
        elif statement:
            with psycopg.connect(site.cluster.dsn(database), autocommit=True) as session:
                session.execute("SET allow_in_place_tablespaces = on")
                session.execute(statement.encode())


def sql(script: str) -> Callable[[Site], None]:
    return partial(run, script)


def cut_and_extended(site: Site) -> None:
    """Cut to nothing, then extended by pages of which the last stay zero."""
    run("DELETE FROM zeroed; VACUUM zeroed; CHECKPOINT", site)
    if site.cluster.major >= 16:
        with (
            psycopg.connect(site.cluster.dsn(), autocommit=True) as session,
            session.cursor().copy("COPY zeroed (i, filler) FROM STDIN") as copy,
        ):
            for number in range(700):
                copy.write_row((number, "z" * 600))
    else:
        extended_and_crashed(site)
    run("CHECKPOINT", site)
    path = site.cluster.datadir / site.cluster.scalar("SELECT pg_relation_filepath('zeroed')")
    assert path.read_bytes()[-PAGE_SIZE:] == bytes(PAGE_SIZE)


def extended_and_crashed(site: Site) -> None:
    """Before 16 a file grows by one page, which is filled at once; a crash leaves it as it grew."""
    run("ALTER SYSTEM SET wal_writer_delay = '10s'; SELECT pg_reload_conf()", site)
    with closing(psycopg.connect(site.cluster.dsn())) as session:
        session.execute(f"INSERT INTO zeroed {FILL} LIMIT 700".encode())
        site.cluster.stop("immediate")
    site.cluster.start()
    site.cluster.wait_recovered()
    run("ALTER SYSTEM RESET wal_writer_delay; SELECT pg_reload_conf()", site)


def recreated_under_its_oid(site: Site) -> None:
    oid = site.cluster.scalar("SELECT oid FROM pg_database WHERE datname = 'again'")
    run(
        f"DROP DATABASE again;CREATE DATABASE again OID = {oid} TEMPLATE other STRATEGY file_copy",
        site,
    )


def shared_locks(site: Site) -> None:
    """Two holders of a row lock make a multixact."""
    for _ in range(3):
        with psycopg.connect(site.cluster.dsn()) as one, psycopg.connect(site.cluster.dsn()) as two:
            for holder in (one, two):
                holder.execute("SELECT FROM locked WHERE i = 1 FOR SHARE")


def prepared(site: Site) -> None:
    with psycopg.connect(site.cluster.dsn()) as session:
        session.execute("UPDATE prepared SET filler = 'p' WHERE i = 7")
        session.execute("PREPARE TRANSACTION 'waiting'")


def many_transactions(site: Site) -> None:
    with psycopg.connect(site.cluster.dsn(), autocommit=True) as session:
        for _ in range(40):
            session.execute("SELECT pg_current_xact_id()")


FILL = "SELECT i, repeat(md5(i::text), 20) AS filler FROM generate_series(1, 3000) AS i"

HAZARDS = [
    Hazard(
        "zero pages after truncation and extension",
        f"CREATE TABLE zeroed AS {FILL}",
        cut_and_extended,
        older_is_unchanged,
        detectors=("scan",),  # the rules of the other are in test_wal_summaries.py
    ),
    Hazard(
        "a table grows",
        f"CREATE TABLE growing AS {FILL}",
        sql(f"INSERT INTO growing {FILL}"),
        equal_is_unchanged,
        detectors=("scan",),
    ),
    Hazard(
        "free space map",
        f"CREATE TABLE spacious AS {FILL}; VACUUM spacious",
        sql("DELETE FROM spacious WHERE i % 3 = 0 AND i < 2900; VACUUM spacious"),
        partial(trust, "_fsm$"),
    ),
    Hazard(
        "visibility map: bits are cleared without a new LSN",
        f"CREATE TABLE visible AS {FILL}; VACUUM visible",
        sql("UPDATE visible SET filler = 'u' WHERE i = 1500"),
        partial(trust, "_vm$"),
    ),
    Hazard(
        "a database copied file by file onto the OID of a dropped one",
        "CREATE DATABASE other; CREATE DATABASE again; \\c other; CREATE TABLE t AS SELECT"
        " generate_series(1, 3000) AS i; \\c again; CREATE TABLE u AS SELECT 'x' AS i",
        recreated_under_its_oid,
        both(older_is_unchanged, databases_are_not_copied),
    ),
    Hazard(
        "a database moved to another tablespace, changed there, and moved back",
        "CREATE DATABASE mover; CREATE TABLESPACE within LOCATION ''; \\c mover;"
        "CREATE TABLE t AS SELECT generate_series(1, 3000) AS i",
        sql(
            "ALTER DATABASE mover SET TABLESPACE within; \\c mover; UPDATE t SET i = -i;"
            "\\c postgres; ALTER DATABASE mover SET TABLESPACE pg_default"
        ),
        both(partial(trust, "^base/"), databases_are_not_copied),
    ),
    Hazard(
        "rewritten: VACUUM FULL, CLUSTER, REINDEX, TRUNCATE",
        f"CREATE TABLE rewritten AS {FILL}; CREATE INDEX rewritten_i ON rewritten (i);"
        f"CREATE TABLE emptied AS {FILL}",
        sql(
            "DELETE FROM rewritten WHERE i % 2 = 0; VACUUM FULL rewritten;"
            "CLUSTER rewritten USING rewritten_i; REINDEX TABLE rewritten;"
            "VACUUM FULL pg_class; TRUNCATE emptied"
        ),
        partial(trust, "pg_filenode.map$"),
    ),
    Hazard(
        "from unlogged to logged and back",
        f"CREATE UNLOGGED TABLE forgetful AS {FILL}; CREATE TABLE lasting AS {FILL}",
        sql("ALTER TABLE forgetful SET LOGGED; ALTER TABLE lasting SET UNLOGGED"),
        partial(trust, "^base/"),
    ),
    Hazard(
        "the commit log",
        "SELECT 1",
        many_transactions,
        partial(trust, "^pg_xact/"),
    ),
    Hazard(
        "multixacts",
        "CREATE TABLE locked AS SELECT 1 AS i",
        shared_locks,
        partial(trust, "^pg_multixact/"),
    ),
    Hazard(
        "a prepared transaction",
        f"CREATE TABLE prepared AS {FILL}",
        prepared,
        partial(leave_out, "pg_twophase/"),
    ),
    Hazard(
        "indexes of every kind, sequences, large objects, TOAST",
        "CREATE TABLE indexed AS SELECT i, i % 97 AS h, ARRAY[i, i + 1] AS a, point(i, -i) AS p,"
        " 'k' || i AS s FROM generate_series(1, 3000) AS i;"
        "CREATE INDEX ON indexed USING btree (i); CREATE INDEX ON indexed USING hash (h);"
        "CREATE INDEX ON indexed USING gin (a); CREATE INDEX ON indexed USING gist (p);"
        "CREATE INDEX ON indexed USING brin (i); CREATE INDEX ON indexed USING spgist (s);"
        "CREATE SEQUENCE counter; CREATE TABLE toasted (t text);"
        "ALTER TABLE toasted ALTER t SET STORAGE EXTERNAL;"
        "INSERT INTO toasted SELECT repeat('t', 9000 + i) FROM generate_series(1, 20) AS i",
        sql(
            "UPDATE indexed SET h = h + 1, a = ARRAY[-i], p = point(-i, i), s = 'q' || i"
            " WHERE i % 100 = 0; SELECT nextval('counter') FROM generate_series(1, 100);"
            "SELECT lo_from_bytea(0, decode(repeat('ab', 9000), 'hex'));"
            "UPDATE toasted SET t = repeat('u', 9000) WHERE length(t) = 9007"
        ),
        partial(trust, "^base/"),
    ),
]


@pytest.fixture(scope="module")
def shared(make_module_site: SiteFactory, pg_major: int) -> Site:
    """One server of each version, for all hazards one after the other."""
    settings = ddl.SETTINGS | {"autovacuum": "off"}
    if pg_major >= 17:
        settings["summarize_wal"] = "on"
    return make_module_site(pg_major, settings=settings)


def differences(
    frozen: Frozen, kind: BackupType, by: str, baseline: BackupId
) -> list[oracles.Difference]:
    """Blocks of a frozen state that a backup does not restore to what they were."""
    try:
        manifest = frozen.back_up(kind, by, baseline)
        restored = frozen.site.restore(manifest.backup_id)
    except DbmoduleError as error:
        return [(str(error), -1)]
    assert manifest.detector == by
    found = oracles.byte_oracle(restored, frozen.path)
    shutil.rmtree(restored)
    return found


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_hazard(shared: Site, hazard: Hazard) -> None:
    run(hazard.before, shared)
    full = BackupId(shared.full().backup_id)
    incr = BackupId(shared.incr().backup_id)
    hazard.change(shared)
    frozen = freeze(shared)
    for by in hazard.detectors:
        if by == "wal" and shared.cluster.major < 17:
            continue
        silent = cached(shared) if by == "wal" else set()
        for kind, baseline in ((BackupType.DIFF, full), (BackupType.INCR, incr)):
            assert set(differences(frozen, kind, by, baseline)) <= silent
        with pytest.MonkeyPatch.context() as patch:
            hazard.defect(patch)
            seen = differences(frozen, BackupType.DIFF, by, full)
        assert set(seen) > silent, f"without its rule, {by} restored the right bytes all the same"
    shutil.rmtree(frozen.path)


def cached(site: Site) -> set[oracles.Difference]:
    """The meta pages of SP-GiST indexes: they cache where room was last found, without WAL.

    So summaries cannot name them. The server checks what it finds there before it uses it, as it
    must after any crash.
    """
    return {
        (path, 0)
        for (path,) in site.cluster.query(
            "SELECT pg_relation_filepath(c.oid) FROM pg_class AS c JOIN pg_am AS a"
            " ON a.oid = c.relam WHERE a.amname = 'spgist'"
        )
    }


SEGMENT_BLOCKS = 131072


def segments_start_at_block_zero(patch: Patch) -> None:
    def first_block(self: RelationFile, blocks_per_segment: int) -> BlockNo:
        return BlockNo(0)

    patch.setattr(RelationFile, "first_block", first_block)


def test_a_table_of_several_segments(make_site: SiteFactory, large_major: int) -> None:
    """Rows are updated on both sides of the border at 1 GB, where the file ``.1`` begins."""
    settings = {"autovacuum": "off", "max_wal_size": "4GB"}
    detectors = ["scan"]
    if large_major >= 17:
        settings["summarize_wal"] = "on"
        detectors.append("wal")
    site = make_site(large_major, settings=settings)
    site.cluster.run("pgbench", "--initialize", "--quiet", "--scale=86", "postgres")
    assert int(site.cluster.scalar("SELECT pg_relation_size('pgbench_accounts') / 8192")) > (
        SEGMENT_BLOCKS
    )
    full = BackupId(site.full().backup_id)
    changed = site.cluster.query(
        "UPDATE pgbench_accounts SET abalance = 1 WHERE ctid IN"
        f" ('({SEGMENT_BLOCKS - 1},3)', '({SEGMENT_BLOCKS},5)', '({SEGMENT_BLOCKS + 1},1)')"
        " RETURNING aid"
    )
    assert len(changed) == 3
    frozen = freeze(site)
    for by in detectors:
        assert differences(frozen, BackupType.DIFF, by, full) == []
    assert all(m.status == "completed" for m in site.repository().manifests("main").values())
    with pytest.MonkeyPatch.context() as patch:
        segments_start_at_block_zero(patch)
        misled = frozen.back_up(BackupType.DIFF, "scan", full)
        assert misled.status == "completed_with_corruption"
        assert {c.path[-2:] for c in misled.corruption} == {".1"}
        if "wal" in detectors:
            assert differences(frozen, BackupType.DIFF, "wal", full) != []
