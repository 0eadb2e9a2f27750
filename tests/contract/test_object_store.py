"""What every object store must do, run against each adapter; then what is special to `LocalStore`.

A new adapter joins by adding a factory to `STORES`.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dbmodule.errors import (
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
    UsageError,
)
from dbmodule.ports import ObjectStore
from dbmodule.repository.encrypted import EncryptedStore
from dbmodule.storage import LocalStore, MemoryStore, open_store

STORES: dict[str, Callable[[pytest.FixtureRequest, Path], ObjectStore]] = {
    "local": lambda request, path: LocalStore(path / "repository"),
    "memory": lambda request, path: MemoryStore(),
    "encrypted": lambda request, path: EncryptedStore(
        LocalStore(path / "repository"), bytes(32), plain=()
    ),
    "s3": lambda request, path: request.getfixturevalue("s3").store(),
    "azure": lambda request, path: request.getfixturevalue("azure").store(),
}


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return STORES[request.param](request, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "repository")


# --- every store -------------------------------------------------------------------------------


def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    assert store.put_new("packs/ab/1", [b"one", bytearray(b"two"), memoryview(b"three")]) == 11
    assert store.get("packs/ab/1") == b"onetwothree"
    assert store.size("packs/ab/1") == 11
    assert list(store.list("")) == ["packs/ab/1"]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (3, 0, b""),
        (8, 100, b"89"),
        (10, None, b""),
        (10, 5, b""),
        (99, 1, b""),
    ],
)
def test_a_range_is_cut_at_the_end(
    store: ObjectStore, offset: int, length: int | None, expected: bytes
) -> None:
    store.put_new("a", [b"0123456789"])
    assert store.get("a", offset, length) == expected


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (0, -1)])
def test_a_negative_range_is_a_mistake(store: ObjectStore, offset: int, length: int) -> None:
    store.put_new("a", [b"0123456789"])
    with pytest.raises(ValueError, match="negative"):
        store.get("a", offset, length)


@pytest.mark.parametrize("chunks", [[], [b""], [b"", b""]])
def test_an_empty_object_is_an_object(store: ObjectStore, chunks: list[bytes]) -> None:
    assert store.put_new("empty", chunks) == 0
    assert store.get("empty") == b""
    assert store.size("empty") == 0
    assert list(store.list("")) == ["empty"]


def test_a_missing_object_is_reported(store: ObjectStore) -> None:
    store.put_new("a/b", [b"x"])
    for name in ("nothing", "a", "a/c", "a/b/c", "x/y/z"):
        with pytest.raises(ObjectMissingError):
            store.get(name)
        with pytest.raises(ObjectMissingError):
            store.size(name)
        store.delete(name)
    assert list(store.list("")) == ["a/b"]


def test_a_store_that_was_never_written_is_empty(store: ObjectStore) -> None:
    assert list(store.list("")) == []
    assert list(store.list("packs/")) == []
    store.delete("packs/1")
    with pytest.raises(ObjectMissingError):
        store.get("config")


def test_a_taken_name_is_refused_and_keeps_its_content(store: ObjectStore) -> None:
    store.put_new("a", [b"first"])
    with pytest.raises(ObjectExistsError):
        store.put_new("a", [b"second"])
    assert store.get("a") == b"first"


def test_delete_frees_the_name(store: ObjectStore) -> None:
    store.put_new("d/a", [b"first"])
    store.put_new("d/b", [b"other"])
    store.delete("d/a")
    store.delete("d/a")
    assert list(store.list("")) == ["d/b"]
    store.put_new("d/a", [b"second"])
    assert store.get("d/a") == b"second"


def test_list_is_ascending_and_by_string_prefix(store: ObjectStore) -> None:
    names = ["a", "b-c", "b.c", "b/c", "b/c-", "b/c.d/e", "b/c0", "b0", "B", "tmp-x", "tmpx/y"]
    for name in names:
        store.put_new(name, [name.encode()])
    assert list(store.list("")) == sorted(names)
    for prefix in ("a", "b", "b/", "b/c", "b/c.d/", "b/c.d/e", "tmp", "c", "b/c.d/e/", "..", "."):
        assert list(store.list(prefix)) == sorted(n for n in names if n.startswith(prefix))


def test_thousands_of_names_are_listed(store: ObjectStore) -> None:
    names = [f"packs/{i % 7:02x}/{i:06d}" for i in range(2500)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda name: store.put_new(name, [b"."]), names)) == {1}
    assert list(store.list("packs/")) == sorted(names)
    assert len(list(store.list("packs/03/"))) == len([i for i in range(2500) if i % 7 == 3])


def test_list_bears_changes_while_it_runs(store: ObjectStore) -> None:
    for i in range(20):
        store.put_new(f"{i % 2}/{i:02d}", [b"."])
    names = store.list("")
    seen = [next(names)]
    for i in range(1, 20, 2):
        store.delete(f"1/{i:02d}")
    store.put_new("2/20", [b"."])
    seen += names
    assert seen == sorted(seen)
    assert set(seen) >= {f"0/{i:02d}" for i in range(0, 20, 2)}


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/passwd", "a//b", "a/", "../a", "a/../b", "a/..", ".", "..", "a/./b", "a b",
     "a\\b", "a\0", "a\n", "ä", "tmp", "tmp/a", "x" * 256],
)  # fmt: skip
def test_other_names_are_refused(store: ObjectStore, name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: store.put_new(name, [b"x"]),
        lambda: store.get(name),
        lambda: store.size(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(RepositoryError, match="not an object name"):
            use()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prefix", ["/", "../", "a/../", "a//", "tmp/", "a b"])
def test_a_prefix_of_no_name_is_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(RepositoryError, match="not an object name"):
        list(store.list(prefix))


def test_a_large_object_is_streamed(store: ObjectStore) -> None:
    chunk = os.urandom(1 << 20)

    def chunks() -> Iterator[memoryview]:
        for i in range(48):
            yield memoryview(chunk)[i:]

    size = store.put_new("large", chunks())
    assert size == store.size("large") == 48 * len(chunk) - sum(range(48))
    assert store.get("large", len(chunk), 10) == chunk[1:11]
    assert store.get("large", size - 5) == chunk[-5:]


@pytest.mark.parametrize("error", [RuntimeError, FileExistsError, OSError])
def test_a_source_that_fails_leaves_nothing(
    store: ObjectStore, error: type[Exception], tmp_path: Path
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise error("the source failed")

    with pytest.raises(error, match="the source failed"):
        store.put_new("a", chunks())
    assert list(store.list("")) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.put_new("a", [b"whole"])
    assert store.get("a") == b"whole"


def test_one_of_many_racing_threads_wins(store: ObjectStore) -> None:
    for round_ in range(5):
        start = threading.Barrier(64)
        name = f"locks/{round_}"

        def put(i: int, name: str = name, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                store.put_new(name, [b"%04d" % i] * 1000)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(64) as pool:
            won = [i for i, winner in enumerate(pool.map(put, range(64))) if winner]
        assert len(won) == 1
        assert store.get(name) == b"%04d" % won[0] * 1000


def test_an_object_is_seen_whole_or_not_at_all(store: ObjectStore) -> None:
    half_way = threading.Event()
    go_on = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"first half, "
        half_way.set()
        assert go_on.wait(10)
        yield b"second half"

    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(store.put_new, "a", chunks())
        assert half_way.wait(10)
        assert list(store.list("")) == []
        with pytest.raises(ObjectMissingError):
            store.get("a")
        go_on.set()
        assert put.result() == 23
    assert store.get("a") == b"first half, second half"


# --- the directory -----------------------------------------------------------------------------


def test_modes_keep_others_out(local: LocalStore, tmp_path: Path) -> None:
    local.put_new("a/b/c", [b"x"])
    for path in [tmp_path / "repository", *(tmp_path / "repository").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir(mode=0o750)
    LocalStore(tmp_path / "r").put_new("a", [b"x"])
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o750


def test_missing_parents_of_the_root_are_made(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "x" / "y" / "z")
    store.put_new("a/b", [b"1"])
    assert LocalStore(tmp_path / "x" / "y" / "z").get("a/b") == b"1"


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match=r"no repository at .*/gone") as caught:
        LocalStore(tmp_path / "gone").get("config")
    assert "Mount it" in caught.value.hint


def test_foreign_files_are_not_objects(local: LocalStore, tmp_path: Path) -> None:
    local.put_new("a", [b"1"])
    (tmp_path / "repository" / "lost+found").mkdir()
    (tmp_path / "repository" / "a file").write_text("")
    os.mkfifo(tmp_path / "repository" / "pipe")
    assert list(local.list("")) == ["a"]


def test_the_order_of_syncs_makes_the_link_durable(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data before the name, the name before success, and every new directory's own name too."""
    steps: list[tuple[str, str]] = []

    def note(step: str, path: str) -> None:
        relative = os.path.relpath(path, tmp_path)
        steps.append((step, "temp" if relative.endswith(".part") else relative))

    real_fsync, real_link, real_write = os.fsync, os.link, os.write

    def fsync(fd: int) -> None:
        real_fsync(fd)
        note("fsync", os.readlink(f"/proc/self/fd/{fd}"))

    def link(source: Path, target: Path) -> None:
        real_link(source, target)
        note("link", str(target))

    def write(fd: int, data: memoryview) -> int:
        note("write", os.readlink(f"/proc/self/fd/{fd}"))
        return real_write(fd, data[:3])

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "write", write)
    local.put_new("d/a", [b"12345"])
    monkeypatch.undo()

    assert local.get("d/a") == b"12345"
    linked = steps.index(("link", "repository/d/a"))
    assert steps[linked - 3 : linked] == [("write", "temp")] * 2 + [("fsync", "temp")]
    assert {("fsync", "."), ("fsync", "repository")} <= set(steps[:linked])
    assert steps[linked + 1 :] == [("fsync", "repository/d")]


def test_the_loser_of_a_race_may_rely_on_the_winners_object(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.put_new("d/a", [b"1"])
    synced = []
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ObjectExistsError):
        local.put_new("d/a", [b"2"])
    assert synced[-1] == str(tmp_path / "repository" / "d")


@pytest.mark.parametrize(
    ("call", "number", "hint"),
    [
        ("write", errno.ENOSPC, "Free some space"),
        ("write", errno.EDQUOT, "quota"),
        ("fsync", errno.EIO, "disk"),
        ("link", errno.EPERM, "hard links"),
        ("link", errno.EOPNOTSUPP, "hard links"),
        ("link", errno.EXDEV, "one file system"),
        ("open", errno.EROFS, "read-only"),
        ("open", errno.EACCES, "right"),
        ("open", errno.EMFILE, "file system"),
    ],
)
def test_a_failing_disk_is_reported_and_leaves_nothing(
    local: LocalStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    hint: str,
) -> None:
    local.put_new("d/before", [b"1"])
    local.put_new("e/before", [b"1"])

    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RepositoryError) as caught:
        local.put_new("d/a", [b"x" * 1000])
    monkeypatch.undo()
    assert not isinstance(caught.value, ObjectExistsError)
    assert str(tmp_path / "repository" / "d" / "a") in caught.value.message
    assert os.strerror(number) in caught.value.message
    assert hint in caught.value.hint
    assert list(local.list("")) == ["d/before", "e/before"]
    assert list((tmp_path / "repository" / "tmp").iterdir()) == []
    local.put_new("d/a", [b"now it works"])


def test_a_read_error_is_reported(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.put_new("a", [b"1"])

    def pread(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(RepositoryError, match=r"cannot read .*/a: Input/output error"):
        local.get("a")


def test_short_reads_are_continued(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put_new("a", [b"0123456789"])
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real_pread(fd, min(n, 3), at))
    assert local.get("a") == b"0123456789"
    assert local.get("a", 1, 8) == b"12345678"


_WRITER = """
import sys, time
from pathlib import Path
from dbmodule.errors import ObjectExistsError
from dbmodule.repository.encrypted import EncryptedStore
from dbmodule.storage import LocalStore

store = LocalStore(Path(sys.argv[1]))
me = sys.argv[2].encode()

def race():
    print("ready", flush=True)
    sys.stdin.readline()
    yield me * 1000

def stop_half_way():
    yield b"half"
    print("ready", flush=True)
    sys.stdin.readline()
    yield b"whole"

try:
    store.put_new("locks/1", race() if sys.argv[3] == "race" else stop_half_way())
    print("won", flush=True)
except ObjectExistsError:
    print("lost", flush=True)
"""


def _writer(root: Path, me: str, role: str) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(root), me, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert select.select([writer.stdout], [], [], 20)[0], "the writer did not start"
    assert writer.stdout.readline() == "ready\n"
    return writer


def test_one_of_many_racing_processes_wins(tmp_path: Path) -> None:
    writers = [_writer(tmp_path / "r", str(i), "race") for i in range(6)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    results = [writer.communicate(timeout=20)[0] for writer in writers]
    assert sorted(results) == ["lost\n"] * 5 + ["won\n"]
    winner = str(results.index("won\n")).encode()
    assert LocalStore(tmp_path / "r").get("locks/1") == winner * 1000
    assert list((tmp_path / "r" / "tmp").iterdir()) == []


def test_a_killed_writer_leaves_no_object_and_its_rest_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "r"
    writer = _writer(root, "x", "stop_half_way")
    writer.kill()
    writer.communicate(timeout=20)
    assert len(list((root / "tmp").iterdir())) == 1

    store = LocalStore(root)
    assert list(store.list("")) == []
    assert len(list((root / "tmp").iterdir())) == 1, "reading must not sweep"
    store.put_new("locks/1", [b"mine"])
    assert list((root / "tmp").iterdir()) == []


def test_a_live_writer_is_not_swept(tmp_path: Path) -> None:
    root = tmp_path / "r"
    writer = _writer(root, "x", "stop_half_way")
    LocalStore(root).put_new("other", [b"1"])
    assert len(list((root / "tmp").iterdir())) == 1
    assert writer.communicate("go\n", timeout=20)[0] == "won\n"
    assert LocalStore(root).get("locks/1") == b"halfwhole"


def test_a_temp_file_swept_before_it_was_locked_is_made_again(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweeper that comes between open and flock takes the file for a dead writer's."""
    import fcntl

    local.put_new("before", [b"1"])
    real_flock = fcntl.flock
    swept: list[Path] = []

    def flock(fd: int, operation: int) -> None:
        if not swept:
            swept.extend((tmp_path / "repository" / "tmp").iterdir())
            for path in swept:
                path.unlink()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    local.put_new("a", [b"whole"])
    assert len(swept) == 1
    assert local.get("a") == b"whole"


# --- URLs --------------------------------------------------------------------------------------


def test_a_path_or_file_url_opens_a_directory(tmp_path: Path) -> None:
    spaced = tmp_path / "a b"
    LocalStore(spaced).put_new("x", [b"1"])
    for url in (str(spaced), spaced.as_uri(), spaced.as_uri().replace("//", "//localhost", 1)):
        store = open_store(url)
        assert store.get("x") == b"1"
        assert store.url == spaced.as_uri()


def test_a_relative_path_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("r")
    monkeypatch.chdir("/")
    store.put_new("x", [b"1"])
    assert (tmp_path / "r" / "x").read_bytes() == b"1"


def test_memory_has_to_be_allowed() -> None:
    assert isinstance(open_store("memory://", allow_memory=True), MemoryStore)
    with pytest.raises(UsageError, match="memory://"):
        open_store("memory://")


@pytest.mark.parametrize("url", ["", "s3://b/p", "file://host/p", "file://", "file:///p?q", "x://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert caught.value.hint
