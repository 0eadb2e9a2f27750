"""Backups whose repository fails at every write in turn: nothing half done is ever a backup.

After each failure the earlier backups are listed, sound and restore to the same bytes, and the
next backup works. The data directory is a tiny one (see `tests.fault.mini`), with packs so small
that a backup makes several; the last test does the same on a running server.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.backup.run import take_backup
from dbmodule.backup.steps import Environment
from dbmodule.config import Config
from dbmodule.datafile import tablespace_version_directory
from dbmodule.errors import RepositoryError
from dbmodule.ident import BackupType
from dbmodule.pgdata.source import LocalDataDirectory
from dbmodule.ports import never_cancelled, no_progress
from dbmodule.postgres.server import PsycopgServer
from dbmodule.processes import LocalProcesses
from dbmodule.reports import BackupOptions, RestoreOptions
from dbmodule.repository.repository import Repository
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import LocalStore
from tests.fault import mini
from tests.fault.fault_store import Fault, FaultStore
from tests.fix_cluster import ClusterFactory
from tests.fix_scene import Scene, run_killed

MOST_WRITES = 60
RAISING = (Fault.BEFORE, Fault.FULL, Fault.AFTER)
KILLING = (Fault.KILL_BEFORE, Fault.KILL_WITHIN, Fault.KILL_AFTER)
ENCRYPTED_TOO = pytest.mark.parametrize(
    "scene", [None, mini.SECRET], ids=["plain", "encrypted"], indirect=True
)


def fail_at_every_write(scene: Scene, kind: BackupType, fault: Fault) -> int:
    """Let write 1, 2, 3 … fail until a backup succeeds; gives how many failed."""
    for number in range(1, MOST_WRITES):
        store = FaultStore(scene.store, number, fault)
        before = set(scene.known)
        try:
            scene.back_up(kind, store)
        except RepositoryError as error:
            assert store.struck
            assert error.exit_code == 5
        else:
            scene.check()
            if not store.struck:
                return number - 1
            # That the lock could not be given back is no reason to fail a backup.
            assert store.writes[-1].endswith("/ended")
        if fault is Fault.AFTER:
            scene.accept_late_commit(before)
        scene.check()
    raise AssertionError("the backup never succeeded")


@pytest.mark.parametrize("fault", RAISING)
def test_full_survives_a_failure_of_any_write(scene: Scene, fault: Fault) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    # The binding of the name, an index, the root and the manifest, beside any packs.
    assert fail_at_every_write(scene, BackupType.FULL, fault) >= 4


@ENCRYPTED_TOO
@pytest.mark.parametrize("fault", RAISING)
def test_diff_survives_a_failure_of_any_write(scene: Scene, fault: Fault) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    assert fail_at_every_write(scene, BackupType.DIFF, fault) >= 4
    mini.change_state(scene.root, 2)
    scene.back_up(BackupType.INCR)
    scene.check()


@ENCRYPTED_TOO
def test_work_of_a_failed_full_is_not_done_twice(scene: Scene) -> None:
    whole = Scene(scene.root, scene.base / "other").back_up(BackupType.FULL)
    # All but the manifest is written: packs, index, root.
    counting = FaultStore(LocalStore(scene.base / "counted"))
    Repository.create(counting)
    mini.back_up(counting, scene.root, BackupType.FULL)
    last = number_of_manifest(counting) - 1  # without the description
    failing = FaultStore(scene.store, last, Fault.BEFORE)
    with pytest.raises(RepositoryError):
        scene.back_up(BackupType.FULL, failing)
    assert scene.back_up(BackupType.FULL) < whole / 10
    scene.check()


def number_of_manifest(store: FaultStore) -> int:
    """Which write the commit was."""
    return next(n for n, name in enumerate(store.writes, 1) if name.startswith("manifests/"))


@ENCRYPTED_TOO
def test_killed_at_any_write(scene: Scene) -> None:
    scene.back_up(BackupType.FULL)
    mini.change_state(scene.root, 1)
    counting = FaultStore(scene.store)
    scene.back_up(BackupType.DIFF, counting)
    last = number_of_manifest(counting)  # of a process that finds as much to store
    plan = [(2, Fault.KILL_WITHIN), (3, Fault.KILL_AFTER), (last - 2, Fault.KILL_BEFORE)]
    plan += [(last, Fault.KILL_BEFORE), (last, Fault.KILL_WITHIN), (last, Fault.KILL_AFTER)]
    for step, (number, fault) in enumerate(plan, 2):
        mini.change_state(scene.root, step)
        before = set(scene.known)
        code = run_killed(scene, BackupType.DIFF, number, fault)
        assert code == -signal.SIGKILL, (number, fault)
        if fault is Fault.KILL_AFTER:
            scene.accept_late_commit(before)
        scene.check()
    mini.change_state(scene.root, 9)
    # The first write through a new store removes what dead writers left.
    scene.store = LocalStore(scene.base / "repo")
    scene.back_up(BackupType.INCR)
    scene.check()
    assert list((scene.base / "repo" / "tmp").iterdir()) == []


def test_running_server_survives_a_failure_of_any_write(
    make_cluster: ClusterFactory, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 2 << 20)
    cluster = make_cluster(18)
    cluster.execute("CREATE TABLE t AS SELECT g, md5(g::text) AS m FROM generate_series(1, 5000) g")
    url = str(scratch / "repo")
    config = Config.model_validate(
        {"server": {"dsn": cluster.dsn()}, "repository": {"url": url}, "backup": {"threads": 2}}
    )
    app = App.open(config)
    app.init(config_path=scratch / "dbmodule.toml", extension=False)
    committed = [app.backup(BackupOptions(BackupType.FULL)).backup_id]

    def online(kind: BackupType, store: FaultStore) -> None:
        server = PsycopgServer(cluster.dsn())
        try:
            identity = server.identify()
            directory = tablespace_version_directory(identity.major, identity.catalog_version)
            repository = Repository.open(store)
            environment = Environment(
                repository=repository,
                cluster=mini.CLUSTER,
                directory=LocalDataDirectory(cluster.datadir, directory),
                server=server,
                catalog=None,
                names=None,
                boot_id="",
                host="",
                threads=2,
                compression_level=1,
                locks=repository.locks(LocalProcesses()),
            )
            manifest = take_backup(
                environment,
                BackupOptions(kind, detect="content"),
                job_id=None,
                progress=no_progress,
                cancelled=never_cancelled,
            ).manifest
        finally:
            server.close()
        committed.append(manifest.backup_id)

    for kind in (BackupType.FULL, BackupType.DIFF):
        cluster.execute("UPDATE t SET m = md5(m) WHERE g % 50 = 0")
        number = until_it_works(url, partial(online, kind))
        assert number >= 5
        assert [b.backup_id for b in app.backups()] == committed
        assert cluster.query("SELECT * FROM pg_replication_slots") == []
    assert app.verify(None).status == "sound"
    app.restore(RestoreOptions(target=scratch / "restored"))
    expected = (cluster.datadir / "base" / "1" / "1259").read_bytes()
    assert (scratch / "restored" / "base" / "1" / "1259").read_bytes() == expected


def until_it_works(url: str, back_up: Callable[[FaultStore], None]) -> int:
    """Let write 1, 2, 3 … fail until the backup works; gives the number of writes it makes."""
    for number in range(1, MOST_WRITES):
        store = FaultStore(LocalStore(Path(url)), number)
        try:
            back_up(store)
        except RepositoryError:
            assert store.struck
        else:
            if not store.struck:
                return number - 1
            assert store.writes[-1].endswith("/ended")
    raise AssertionError("the backup never succeeded")
