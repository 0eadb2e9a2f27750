"""What a restore refuses to write, whoever wrote the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import CorruptObjectError, TargetError, UsageError
from dbmodule.registry import EntryKind
from dbmodule.repository.tables import FileEntry
from dbmodule.restore.plan import RESERVED, check_paths, check_replay, map_tablespaces
from tests.unit.strategies import entry, manifest, quick

FILE, DIRECTORY, LINK = EntryKind.CONTENT, EntryKind.DIRECTORY, EntryKind.SYMLINK


def good() -> list[FileEntry]:
    return [
        entry("base", DIRECTORY),
        entry("base/5", DIRECTORY),
        entry("pg_tblspc", DIRECTORY),
        entry("pg_tblspc/16390", LINK, target="/srv/one"),
        entry("base/5/16384", EntryKind.RELATION),
        entry("pg_tblspc/16390/PG_18_202506291/5/16400", EntryKind.RELATION),
        entry("base/..5/...", FILE),
        entry("\udcff\u00e9", FILE),
        entry("PG_VERSION", FILE),
    ]


def test_a_file_table_as_backups_write_it_is_accepted() -> None:
    check_paths(good(), {"16390": Path("/new")})
    check_paths([], {})


@pytest.mark.parametrize("kind", [EntryKind.RELATION, FILE, DIRECTORY, LINK])
@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "/", "/etc/passwd", "//etc/passwd", "../x", "base/../../x", "base/.."),
        *("base/./x", "base//x", "base/", "./base", "base/x\0", "\0", "pg_tblspc/16390/../x"),
        *sorted(RESERVED),
    ],
)
def test_a_path_that_leaves_the_target_is_refused(path: str, kind: EntryKind) -> None:
    with pytest.raises(CorruptObjectError, match="leaves the target"):
        check_paths([*good(), entry(path, kind)], {"16390"})


@quick(300)
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "\0", "a\0", "…"]), max_size=5))
def test_what_is_accepted_stays_below_the_target(parts: list[str]) -> None:
    path = "/".join(parts)
    root = Path("/target")
    try:
        check_paths([entry(path)], ())
    except CorruptObjectError:
        return
    assert "\0" not in path
    assert (root / path).is_relative_to(root)
    assert ".." not in Path(path).parts
    assert str(root / path) == f"/target/{path}"


@pytest.mark.parametrize(
    "path",
    [
        *("base", "base/5", "pg_wal", "pg_tblspc", "pg_tblspc/16391", "pg_tblspc/016390"),
        *("pg_tblspc/16390/x", "pg_tblspc/16390\n", "PG_TBLSPC/16390", "pg_tblspc/٣"),
    ],
)
def test_a_link_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(CorruptObjectError, match="no tablespace"):
        check_paths([entry(path, LINK, target="/etc")], {"16390", "016390", "٣"})


@pytest.mark.parametrize("kind", [FILE, DIRECTORY, EntryKind.RELATION])
def test_a_path_listed_twice_is_refused(kind: EntryKind) -> None:
    with pytest.raises(CorruptObjectError, match="twice"):
        check_paths([*good(), entry("base/5/16384", kind)], {"16390"})


@pytest.mark.parametrize("parent", [FILE, EntryKind.RELATION])
@pytest.mark.parametrize("child", [FILE, EntryKind.RELATION, DIRECTORY])
@pytest.mark.parametrize("child_path", ["a/b", "a/b/c/d"])
def test_nothing_lies_below_a_file(parent: EntryKind, child: EntryKind, child_path: str) -> None:
    above, below = entry("a", parent), entry(child_path, child)
    for order in ([above, below], [below, above]):
        with pytest.raises(CorruptObjectError, match="as a file and a directory"):
            check_paths(order, ())
        with pytest.raises(CorruptObjectError, match="as a file and a directory"):
            check_paths(iter(order), ())


def test_a_name_that_begins_like_a_file_is_not_below_it() -> None:
    check_paths([entry("a"), entry("ab/c"), entry("a.1")], ())


TWO = {"16390": "/srv/one", "16391": "/srv/two"}
TARGET = Path("/restore/data")


def mapped(**changes: str) -> dict[str, Path]:
    mapping = {"/srv/one": Path("/new/one"), "/srv/two": Path("/new/two")}
    mapping.update({old.replace("_", "/"): Path(new) for old, new in changes.items()})
    return map_tablespaces(manifest(tablespaces=TWO), mapping, TARGET)


def test_every_tablespace_goes_where_it_is_told() -> None:
    assert mapped() == {"16390": Path("/new/one"), "16391": Path("/new/two")}
    assert map_tablespaces(manifest(), {}, TARGET) == {}


def test_there_is_no_default_location() -> None:
    with pytest.raises(TargetError, match="nothing says where"):
        map_tablespaces(manifest(tablespaces=TWO), {"/srv/one": Path("/new/one")}, TARGET)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("new/two", "not an absolute path"),
        ("/restore/data", "lie in each other"),
        ("/restore/data/two", "lie in each other"),
        ("/restore", "lie in each other"),
        ("/", "lie in each other"),
        ("/new/one", "overlap"),
        ("/new/one/two", "overlap"),
        ("/new", "overlap"),
    ],
)
def test_locations_that_get_into_each_others_way_are_refused(location: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mapped(_srv_two=location)


def test_locations_that_only_sound_alike_are_accepted() -> None:
    assert mapped(_srv_two="/new/one2")["16391"] == Path("/new/one2")
    assert mapped(_srv_two="/restore/data2")["16391"] == Path("/restore/data2")


def test_a_mapping_of_an_unknown_tablespace_is_refused() -> None:
    with pytest.raises(UsageError, match="no tablespace at /srv/three"):
        mapped(_srv_three="/new/three")


def test_replaying_into_a_directory_that_is_there_is_refused() -> None:
    created = manifest(created_tablespaces={"16399": "/srv/new"})
    check_replay(created, {"/srv/new": False})
    check_replay(manifest(), {})
    with pytest.raises(TargetError, match="/srv/new"):
        check_replay(created, {"/srv/new": True})
