"""Installing the extension: as files and as plain SQL, on copies of the servers' programs.

The copies keep the machine's own installations free of our files; a server looks for extensions
relative to its programs, so it finds those of its copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbmodule.errors import ServerError, UsageError
from dbmodule.postgres import extension
from dbmodule.postgres.cluster import LocalCluster
from tests.fix_cluster import Clusters, Database

OBJECTS = """
    SELECT c.relkind::text, c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
           a.attnotnull, pg_get_expr(d.adbin, d.adrelid), c.relacl::text,
           col_description(c.oid, a.attnum)
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
    LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'dbmodule'::regnamespace
    UNION ALL
    SELECT 'constraint', conname, conrelid::regclass::text, pg_get_constraintdef(oid), NULL, NULL,
           NULL, NULL
    FROM pg_constraint WHERE connamespace = 'dbmodule'::regnamespace
    UNION ALL
    SELECT 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid), NULL, NULL, NULL,
           p.proacl::text, obj_description(p.oid)
    FROM pg_proc AS p
    WHERE p.pronamespace = 'dbmodule'::regnamespace
       OR p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'backup\\_%'
    ORDER BY 1, 2, 3, 4
"""


@pytest.fixture(scope="module")
def copies() -> dict[int, LocalCluster]:
    return {}


@pytest.fixture
def copy(clusters: Clusters, pg_major: int, copies: dict[int, LocalCluster]) -> LocalCluster:
    """A running server on a copy of its programs, with the files of the extension."""
    if pg_major not in copies:
        original = clusters.make(pg_major)
        root = clusters.directory()
        root.chmod(0o755)
        sharedir = extension.server_sharedir(original.bindir / "pg_config")
        trees = [original.bindir.parent]
        if not sharedir.is_relative_to(original.bindir.parent):
            trees.append(sharedir)
        for tree in trees:
            shutil.copytree(tree, root / tree.relative_to("/"))
        libraries = original.bindir.parents[1].with_name(f"{original.bindir.parents[1].name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, root / libraries.relative_to("/"))
        bindir = root / original.bindir.relative_to("/")
        cluster = LocalCluster(
            bindir, original.datadir, original.socket_dir, original.port, original.os_user
        )
        extension.install(extension.server_sharedir(bindir / "pg_config"))
        cluster.start()
        copies[pg_major] = cluster
    return copies[pg_major]


@pytest.fixture(scope="module", autouse=True)
def copies_stopped(copies: dict[int, LocalCluster]) -> Iterator[None]:
    yield
    for cluster in copies.values():
        cluster.stop("immediate")


def new_database(cluster: LocalCluster, name: str) -> Database:
    cluster.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    cluster.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    return Database(name, cluster)


def test_the_extension_and_the_plain_form_make_the_same_objects(copy: LocalCluster) -> None:
    as_extension = new_database(copy, "as_extension")
    as_plain = new_database(copy, "as_plain")
    assert extension.create(as_extension.dsn) == "created"
    extension.install_plain(as_plain.dsn)
    assert as_extension.query(OBJECTS) == as_plain.query(OBJECTS)
    assert len(as_plain.query(OBJECTS)) > 100
    assert as_extension.scalar(
        "SELECT extversion FROM pg_extension WHERE extname = 'dbmodule'"
    ) == (extension.packaged_version())
    for db in (as_extension, as_plain):
        assert extension.installed_version(db.dsn) == extension.packaged_version()
        assert extension.create(db.dsn) == "present"
        assert db.scalar("SELECT backup_full()") == 1


def test_create_extension_takes_a_schema_and_drops_cleanly(copy: LocalCluster) -> None:
    db = new_database(copy, "dropped")
    db.execute('CREATE SCHEMA "My Tools"; CREATE EXTENSION dbmodule SCHEMA "My Tools"')
    assert db.scalar('SELECT "My Tools".backup_full()') == 1
    db.execute("CREATE EXTENSION IF NOT EXISTS dbmodule; DROP EXTENSION dbmodule")
    assert db.scalar("SELECT to_regnamespace('dbmodule')") is None
    db.execute("CREATE EXTENSION dbmodule")
    assert db.scalar("SELECT backup_full()") == 1


def test_a_dump_carries_the_extension_without_what_is_true_only_here(
    copy: LocalCluster, tmp_path: Path
) -> None:
    db = new_database(copy, "dumped")
    extension.create(db.dsn)
    db.execute(
        "SELECT backup_full(); INSERT INTO dbmodule.lineage (mark, backup_id, position) "
        "VALUES (repeat('a', 32), 'x', 'start')"
    )
    dump = copy.run("pg_dump", "-d", db.dsn).stdout
    assert "CREATE EXTENSION" in dump
    assert "COPY" not in dump
    restored = new_database(copy, "restored")
    # Newer pg_dump writes psql's own commands around what the server can run.
    restored.execute("\n".join(line for line in dump.splitlines() if not line.startswith("\\")))
    assert restored.scalar("SELECT count(*) FROM dbmodule.job") == 0
    assert extension.installed_version(restored.dsn) == extension.packaged_version()


def test_files_are_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "dbmodule.control").write_text("old")
    first = extension.install(tmp_path)
    assert extension.install(tmp_path) == first
    assert sorted((tmp_path / "extension").iterdir()) == sorted(first)
    assert [path.name for path in first][-1] == "dbmodule.control"
    assert {path.stat().st_mode & 0o777 for path in first} == {0o644}
    assert "default_version" in first[-1].read_text()
    with pytest.raises(ServerError) as caught:
        extension.install(tmp_path / "absent")
    assert "plain-SQL" in caught.value.hint


def test_without_the_files_the_plain_form_is_taken(database: Database) -> None:
    assert extension.installed_version(database.dsn) is None
    assert extension.create(database.dsn) == "plain"
    assert extension.create(database.dsn) == "present"
    assert database.scalar("SELECT backup_full()") == 1
    with pytest.raises(ServerError):
        extension.install_plain(database.dsn)


def test_the_plain_form_takes_a_schema_and_refuses_odd_names(database: Database) -> None:
    for odd in ("", 'a"b', "a$b", "a'b", "a\\b"):
        with pytest.raises(UsageError):
            extension.install_plain(database.dsn, odd)
    with pytest.raises(ServerError):
        extension.install_plain(database.dsn, "absent")
    assert extension.installed_version(database.dsn) is None
    database.execute('CREATE SCHEMA "My Tools"')
    extension.install_plain(database.dsn, "My Tools")
    assert database.scalar('SELECT "My Tools".backup_full()') == 1


def test_a_role_that_may_not_is_told_so(database: Database) -> None:
    database.execute("DROP ROLE IF EXISTS plain_user; CREATE ROLE plain_user LOGIN")
    try:
        with pytest.raises(ServerError) as caught:
            extension.create(database.cluster.dsn(database.name, "plain_user"))
        assert "superuser" in caught.value.hint
    finally:
        database.execute("DROP ROLE plain_user")


def test_the_script_does_nothing_when_read_by_psql(cluster: LocalCluster) -> None:
    sql = Path(extension.__file__).parents[2] / "sql" / "dbmodule--0.1.0.sql"
    readable = cluster.socket_dir / "script.sql"
    shutil.copy(sql, readable)
    readable.chmod(0o644)
    result = cluster.run("psql", "-X", "-w", "-d", cluster.dsn(), "-f", str(readable))
    assert "CREATE EXTENSION dbmodule" in result.stdout
    assert cluster.scalar("SELECT to_regnamespace('dbmodule')") is None


def test_a_broken_connection_string_is_a_server_error() -> None:
    with pytest.raises(ServerError):
        extension.installed_version("no such = thing")
    with pytest.raises(ServerError):
        extension.server_sharedir(Path("/nonexistent/pg_config"))
