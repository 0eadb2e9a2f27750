"""`verify` finds every planted fault in every object, and what it passes restores to right bytes.

The repositories hold backups of a tiny data directory (see `tests.fault.mini`), so that hundreds
of faults take seconds; nothing depends on the server's version here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, count
from pathlib import Path

import pytest

from dbmodule.errors import DbmoduleError, RepositoryError
from dbmodule.ident import BackupId, BackupType, SystemId
from dbmodule.ports import ObjectStore
from dbmodule.reports import VerifyLevel, VerifyReport
from dbmodule.repository.encrypted import EncryptedStore
from dbmodule.repository.locks import PREFIX as LOCKS
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage.memory import MemoryStore
from tests.fault import mini
from tests.fault.fault_store import DamagedStore
from tests.fix_cluster import Clusters

PACK_BYTES = 24 << 10
DESCRIPTION = "repository.json"
RANDOM_PLACES = 6
Planted = dict[str, bytes | None]


class Archive:
    """A repository of one chain: its objects, and what each backup has to restore to.

    Faults are planted under the names of the store; what is said of them has plain names.
    """

    def __init__(
        self, source: Path, root: Path, kinds: list[BackupType], secret: Secret | None = None
    ) -> None:
        self.store = MemoryStore()
        self.known: dict[BackupId, dict[str, bytes]] = {}
        self.root = root
        mini.make_mini(source, root)
        self.repository = Repository.create(self.store, secret)
        if self.repository.vault is not None:
            self.repository.vault.keyring.add(Secret.new(), "another")
        for step, kind in enumerate(kinds, 1):
            manifest = mini.back_up(self.store, root, kind)
            self.known[manifest.backup_id] = mini.contents(root)
            mini.change_state(root, step)
        self.chain = list(self.known)
        # But for the locks, which no backup is lost with.
        kept = [name for name in self.store.list("") if not name.startswith(LOCKS)]
        self.objects = {name: self.store.get(name) for name in kept}

    def named(self, prefix: str) -> list[str]:
        return [name for name in self.objects if name.startswith(prefix)]

    def manifest(self, position: int) -> str:
        return self.stored(f"manifests/{mini.CLUSTER}/{self.chain[position]}.json")

    def stored(self, name: str) -> str:
        """What the store calls an object."""
        inner = self.repository.store
        return inner.stored_name(name) if isinstance(inner, EncryptedStore) else name

    def plain(self, name: str) -> str:
        """What the repository calls an object of the store."""
        inner = self.repository.store
        known = {self.stored(plain): plain for plain in inner.list("")}
        return known.get(name, name)

    def opens(self, name: str) -> bool:
        """Can nothing be read without this object?"""
        vault = self.repository.vault
        return name == DESCRIPTION or (
            vault is not None and name == f"keys/{vault.keyring.key_id}.json"
        )

    def with_planted(self, planted: Planted) -> ObjectStore:
        return DamagedStore(self.store, planted)


@pytest.fixture(scope="module")
def stopped_cluster(clusters: Clusters) -> Path:
    cluster = clusters.at(clusters.directory() / "data", 18)
    cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
    return cluster.datadir


@pytest.fixture(scope="module", params=[None, mini.SECRET], ids=["plain", "encrypted"])
def secret(request: pytest.FixtureRequest) -> Secret | None:
    found: Secret | None = request.param
    return found


@pytest.fixture(scope="module")
def archive(
    stopped_cluster: Path, tmp_path_factory: pytest.TempPathFactory, secret: Secret | None
) -> Archive:
    """Full, differential and incremental, in several packs each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameWriter, "PACK_BYTES", PACK_BYTES)
        root = tmp_path_factory.mktemp("archive") / "data"
        kinds = [BackupType.FULL, BackupType.DIFF, BackupType.INCR]
        return Archive(stopped_cluster, root, kinds, secret)


@pytest.fixture(scope="module")
def single(
    stopped_cluster: Path, tmp_path_factory: pytest.TempPathFactory, secret: Secret | None
) -> Archive:
    """One full backup."""
    root = tmp_path_factory.mktemp("single") / "data"
    return Archive(stopped_cluster, root, [BackupType.FULL], secret)


def faults(data: bytes, seed: int) -> Iterator[tuple[str, bytes | None]]:
    """Ways in which one object can be damaged."""
    rng = random.Random(seed)
    places = {0, len(data) // 2, len(data) - 1, *rng.sample(range(len(data)), RANDOM_PLACES)}
    for place in sorted(places):
        yield f"byte {place} flipped", flip(data, place, 1 << rng.randrange(8))
    yield "cut by one", data[:-1]
    yield "cut in half", data[: len(data) // 2]
    yield "empty", b""
    yield "gone", None
    yield "one byte more", data + b"\0"
    yield "one newline more", data + b"\n"
    yield "all zero", bytes(len(data))


def flip(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def named_damage(report: VerifyReport) -> str:
    """All that the report says, to look names up in."""
    return "\n".join(f"{d.object}: {d.problem}" for d in report.damage)


def test_sound_repository_is_sound(archive: Archive) -> None:
    report = mini.verify_all(archive.store)
    assert (report.status, report.damage) == ("sound", [])
    assert sorted(report.backups) == sorted(archive.chain)
    # Every object was read, to the last byte; the description was read when it was opened.
    assert report.objects_checked == len(archive.objects) - 1
    inner = archive.repository.store
    sizes = [inner.size(n) for n in inner.list("") if n != DESCRIPTION and not n.startswith(LOCKS)]
    sizes += [len(archive.objects[name]) for name in archive.named("keys/")]
    assert report.bytes_read == sum(sizes)


@pytest.mark.parametrize("level", [VerifyLevel.NORMAL, VerifyLevel.FULL])
def test_every_fault_in_every_object_is_found(archive: Archive, level: VerifyLevel) -> None:
    for number, (name, data) in enumerate(archive.objects.items()):
        for what, damaged in faults(data, number):
            if archive.opens(name):
                continue  # see below
            if damaged is None and (name == archive.manifest(-1) or name.startswith("keys/")):
                continue  # a backup without its manifest does not exist: see below
            report = mini.verify_all(archive.with_planted({name: damaged}), level)
            where = f"{name}: {what}"
            assert report.status == "damaged", where
            plain = archive.plain(name)
            gone = plain.rpartition("/")[2].removesuffix(".json")
            expected = plain if damaged is not None or name.startswith("packs/") else gone
            if name.startswith("index/") and damaged is None:
                expected = "no index segment lists it"
            assert expected in named_damage(report), where


def test_every_byte_of_small_objects_counts(single: Archive) -> None:
    flipped = 0
    for name, data in single.objects.items():
        if single.opens(name) or len(data) > 1500:
            continue
        plain = single.plain(name)
        for place in range(len(data)):
            planted: Planted = {name: flip(data, place, 1 << place % 8)}
            report = mini.verify_all(single.with_planted(planted))
            assert plain in named_damage(report), f"{name}: byte {place}"
            flipped += 1
    assert flipped > 500


def test_damage_to_what_opens_it_is_a_clear_error(single: Archive) -> None:
    for name, data in single.objects.items():
        if not single.opens(name):
            continue
        planted = [damaged for _, damaged in faults(data, 0)]
        planted += [flip(data, place, 1 << place % 8) for place in range(len(data))]
        for damaged in planted:
            store = single.with_planted({name: damaged})
            with pytest.raises(RepositoryError) as caught:
                mini.verify_all(store)
            assert caught.value.exit_code == 5
            assert caught.value.message
            with pytest.raises(RepositoryError):
                mini.back_up(store, single.root, BackupType.FULL)


def test_objects_in_each_others_place_are_found(archive: Archive) -> None:
    for prefix in ("packs/", "manifests/", "index/"):
        for a, b in combinations(archive.named(prefix), 2):
            planted: Planted = {a: archive.objects[b], b: archive.objects[a]}
            said = named_damage(mini.verify_all(archive.with_planted(planted)))
            assert archive.plain(a) in said, (a, b)
            assert archive.plain(b) in said, (a, b)
            # One of them in both places: a stale copy was put back.
            said = named_damage(mini.verify_all(archive.with_planted({a: archive.objects[b]})))
            assert archive.plain(a) in said, (a, b)


def test_manifest_under_another_id_is_found(archive: Archive) -> None:
    known, other = archive.manifest(0), BackupId("20200101-000000-full-abcdef")
    name = f"manifests/{mini.CLUSTER}/{other}.json"
    stored = archive.stored(name)
    report = mini.verify_all(archive.with_planted({stored: archive.objects[known]}))
    assert report.status == "damaged"
    assert name in named_damage(report)


def test_name_of_another_cluster_is_found(archive: Archive, single: Archive) -> None:
    """A binding that is whole, and tied by the same key, but to another database cluster."""
    other = MemoryStore()
    for opens in filter(archive.opens, archive.objects):
        other.put_new(opens, [archive.objects[opens]])
    mini.opened(other).bind(mini.CLUSTER, SystemId(42))
    name = f"clusters/{mini.CLUSTER}.json"
    stored = archive.stored(name)
    report = mini.verify_all(archive.with_planted({stored: other.get(stored)}))
    assert name in named_damage(report)


def test_backup_without_its_manifest_does_not_exist(archive: Archive, tmp_path: Path) -> None:
    store = archive.with_planted({archive.manifest(-1): None})
    report = mini.verify_all(store)
    assert report.status == "sound"
    assert sorted(report.backups) == sorted(archive.chain[:-1])
    with pytest.raises(DbmoduleError) as caught:
        mini.restore_to(store, archive.chain[-1], tmp_path / "target")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "target").exists()


def test_restore_of_what_is_damaged_refuses_or_is_right(archive: Archive, tmp_path: Path) -> None:
    numbers = count()
    refused = 0
    for name, data in archive.objects.items():
        for damaged in (flip(data, len(data) // 2, 4), flip(data, len(data) - 40, 4), None):
            store = archive.with_planted({name: damaged})
            for backup, expected in archive.known.items():
                target = tmp_path / str(next(numbers))
                try:
                    mini.restore_to(store, backup, target)
                except DbmoduleError as error:
                    assert error.exit_code in (4, 5)
                    assert not (target / "global" / "pg_control").exists()
                    refused += 1
                else:
                    assert mini.restored_contents(target, expected) == expected, name
    assert refused >= len(archive.named("packs/"))


def test_damage_to_one_backup_spares_the_others(archive: Archive, tmp_path: Path) -> None:
    name = archive.manifest(-1)
    store = archive.with_planted({name: flip(archive.objects[name], 100, 1)})
    full = archive.chain[0]
    mini.restore_to(store, full, tmp_path / "target")
    expected = archive.known[full]
    assert mini.restored_contents(tmp_path / "target", expected) == expected


def test_damaged_index_costs_space_only(archive: Archive, tmp_path: Path) -> None:
    """Whatever is in the index, a backup works and is right; and the frames are stored again."""
    before = mini.contents(archive.root)
    rng = random.Random(7)
    numbers = count()
    for name in archive.named("index/"):
        data = archive.objects[name]
        ways = [damaged for _, damaged in faults(data, 3)]
        ways += [flip(data, rng.randrange(200), 1 << rng.randrange(8)) for _ in range(20)]
        ways += [rng.randbytes(len(data)), data[:24] + rng.randbytes(len(data) - 24)]
        for damaged in ways:
            store = MemoryStore()
            for other, content in archive.objects.items():
                if other != name:
                    store.put_new(other, [content])
                elif damaged is not None:
                    store.put_new(name, [damaged])
            manifest = mini.back_up(store, archive.root, BackupType.DIFF)
            if next(numbers) % 10 == 0:
                target = tmp_path / str(manifest.backup_id)
                mini.restore_to(store, manifest.backup_id, target)
                assert mini.restored_contents(target, before) == before


def test_what_nobody_with_the_key_has_put_there_is_found(
    stopped_cluster: Path, tmp_path: Path
) -> None:
    made = Archive(stopped_cluster, tmp_path / "data", [BackupType.FULL], mini.SECRET)
    known = made.manifest(0)
    for name in (known + "x", "manifests/abc", "index/" + known.rpartition("/")[2], "new/a"):
        report = mini.verify_all(made.with_planted({name: made.objects[known]}))
        assert [found.object for found in report.damage] == [name]
