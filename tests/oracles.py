"""Judges of a restore, strongest first; each gives what is wrong, so that empty means right."""

from __future__ import annotations

import os
from pathlib import Path

from dbmodule.datafile import Kind, classify, relation, unlogged_relations
from dbmodule.ident import PAGE_SIZE
from dbmodule.postgres.cluster import LocalCluster
from tests.hints import masked

RESTORE_WRITES = {"postgresql.auto.conf", "recovery.signal", "backup_manifest", "backup_label"}

Difference = tuple[str, int]
"""Path and block (8 kB, from 0); block -1 when the whole file is there on one side only."""


def _files(root: Path) -> dict[str, Path]:
    """What a backup holds of a data directory: relative path → file."""
    found: dict[str, Path] = {}
    for directory, _, names in os.walk(root, followlinks=True):
        below = Path(directory).relative_to(root).as_posix()
        unlogged = unlogged_relations(names)
        for name in names:
            path = name if below == "." else f"{below}/{name}"
            file = relation(path)
            lost = file and file.relfilenode in unlogged and file.fork != "init"
            if classify(path) is not Kind.EXCLUDED and path not in RESTORE_WRITES and not lost:
                found[path] = Path(directory) / name
    return found


def byte_oracle(restored: Path, original: Path, *, hints: bool = True) -> list[Difference]:
    """Every block in which two data directories differ, partial tails of relations ignored.

    Without `hints`, hint bits may differ.
    """
    ours, theirs = _files(restored), _files(original)
    wrong: list[Difference] = [(path, -1) for path in sorted(ours.keys() ^ theirs.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        a, b = ours[path].read_bytes(), theirs[path].read_bytes()
        if relation(path) is not None:
            a, b = (data[: len(data) // PAGE_SIZE * PAGE_SIZE] for data in (a, b))
        if a != b:
            for at in range(0, max(len(a), len(b)), PAGE_SIZE):
                one, other = a[at : at + PAGE_SIZE], b[at : at + PAGE_SIZE]
                if one != other and (hints or not _is_main(path) or masked(one) != masked(other)):
                    wrong.append((path, at // PAGE_SIZE))
    return wrong


def _is_main(path: str) -> bool:
    file = relation(path)
    return file is not None and file.fork == "main"


def server_oracle(copy: LocalCluster) -> list[str]:
    """What the server's own tools find in a running restored cluster, which is stopped then."""
    wrong: list[str] = []
    checks = copy.run(
        "pg_amcheck",
        *("--all", "--install-missing=public", "--heapallindexed", "--rootdescend"),
        *("--no-password", "--jobs=2"),
        check=False,
    )
    if checks.returncode != 0:
        wrong.append(f"pg_amcheck: {checks.stdout}{checks.stderr}")
    for (name,) in copy.query("SELECT datname FROM pg_database WHERE datallowconn"):
        copy.execute("CREATE EXTENSION IF NOT EXISTS pg_visibility", name)
        for function in ("pg_check_visible", "pg_check_frozen"):
            found = copy.query(
                f"SELECT c.oid::regclass::text, f FROM pg_class AS c, {function}(c.oid) AS f"
                " WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence <> 't'",
                name,
            )
            wrong += [f"{function} in {name}: {row}" for row in found]
    copy.stop("fast")
    if copy.run("pg_controldata", str(copy.datadir)).stdout.find("checksum version:") < 0:
        wrong.append("pg_controldata does not tell the checksum version")
    if _has_checksums(copy):
        sums = copy.run("pg_checksums", "--check", "-D", str(copy.datadir), check=False)
        if sums.returncode != 0:
            wrong.append(f"pg_checksums: {sums.stdout}{sums.stderr}")
    return wrong


def _has_checksums(cluster: LocalCluster) -> bool:
    text = cluster.run("pg_controldata", str(cluster.datadir)).stdout
    return any(
        line.startswith("Data page checksum version:") and line.split()[-1] != "0"
        for line in text.splitlines()
    )


def pg_verifybackup(cluster: LocalCluster, restored: Path) -> list[str]:
    """What PostgreSQL's own verifier says of a restored directory that was not started yet."""
    result = cluster.run("pg_verifybackup", str(restored), check=False)
    return [] if result.returncode == 0 else [result.stdout + result.stderr]


_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname)
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'm', 'S') AND c.relpersistence = 'p'
   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'dbmodule')
UNION ALL SELECT 'pg_catalog.pg_largeobject'
"""


def digests(cluster: LocalCluster) -> dict[tuple[str, str], tuple[object, ...]]:
    """A digest of every table and sequence of every database, for the data oracle."""
    found = {}
    for (name,) in cluster.query("SELECT datname FROM pg_database WHERE datallowconn"):
        for (table,) in cluster.query(_TABLES, name):
            (row,) = cluster.query(
                "SELECT count(*), sum(('x' || substr(md5(row(t.*)::text), 1, 16))::bit(64)::bigint"
                f"::numeric) FROM {table} AS t",
                name,
            )
            found[name, table] = row
    return found
