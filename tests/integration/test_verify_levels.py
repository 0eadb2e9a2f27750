"""What each level of `verify` finds, what it cannot find, and what it must not take for damage."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dbmodule.backup import copier
from dbmodule.backup.batch import Batch
from dbmodule.backup.collect import Collector
from dbmodule.delta import Refs
from dbmodule.ident import PAGE_SIZE, BackupType
from dbmodule.manifest import Manifest
from dbmodule.registry import Marks
from dbmodule.reports import VerifyLevel
from dbmodule.repository import pack
from dbmodule.repository.repository import Repository, manifest_name
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage.memory import MemoryStore
from tests import ddl
from tests.fault import mini
from tests.fix_backup import Site, SiteFactory
from tests.fix_cluster import Clusters
from tests.integration.test_verify import Archive, Planted, faults, flip, named_damage

FULL, DIFF, INCR = BackupType.FULL, BackupType.DIFF, BackupType.INCR
QUICK, NORMAL, DEEP = VerifyLevel
LEVELS = pytest.mark.parametrize("level", list(VerifyLevel))
MAPS = "base/1/1259_fsm"


@pytest.fixture(scope="module")
def stopped(clusters: Clusters) -> Path:
    cluster = clusters.at(clusters.directory() / "data", 18)
    cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
    return cluster.datadir


@pytest.fixture(scope="module")
def archive(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameWriter, "PACK_BYTES", 24 << 10)
        root = tmp_path_factory.mktemp("levels") / "data"
        return Archive(stopped, root, [FULL, DIFF, INCR])


@pytest.fixture
def root(stopped: Path, tmp_path: Path) -> Path:
    mini.make_mini(stopped, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    Repository.create(made)
    return made


def packs_of(archive: Archive, position: int) -> set[str]:
    """The packs that a backup refers to; its root among them."""
    repository = Repository.open(archive.store)
    manifest, _ = repository.manifest(mini.CLUSTER, archive.chain[position])
    refs = {pack.name_of(ref.pack) for ref in repository.tables(manifest).packs}
    return refs | {pack.name_of(pack.PackId(manifest.root.pack))}


# -- sound -----------------------------------------------------------------------------------------


@LEVELS
def test_what_is_sound_is_sound(archive: Archive, level: VerifyLevel) -> None:
    report = mini.verify_all(archive.store, level)
    assert (report.status, report.damage, report.level) == ("sound", [], level)
    packs = archive.named("packs/")
    everything = sum(map(len, archive.objects.values()))
    if level is QUICK:
        assert report.objects_checked == len(archive.objects) - 1 - len(archive.named("index/"))
        assert report.bytes_read < everything - sum(len(archive.objects[name]) for name in packs)
    else:
        assert report.objects_checked == len(archive.objects) - 1
        assert report.bytes_read > everything - 1000
    relation = len(archive.known[archive.chain[0]][mini.RELATION]) // PAGE_SIZE
    others = sum(
        len(archive.known[archive.chain[0]][f"{mini.RELATION}_{fork}"]) // PAGE_SIZE
        for fork in ("fsm", "vm")
    )
    # All pages of the full; then two of the relation for each of the others.
    assert report.pages_checked == (relation + others + 2 * 2 if level is DEEP else 0)
    assert report.pages_known_corrupt == 0


def test_of_one_backup_every_page_is_looked_at_wherever_it_came_from(archive: Archive) -> None:
    from dbmodule.ports import never_cancelled, no_progress
    from dbmodule.verify import verify

    repository = Repository.open(archive.store)

    def pages(position: int) -> int:
        return verify(
            repository,
            mini.CLUSTER,
            [archive.chain[position]],
            level=DEEP,
            threads=2,
            progress=no_progress,
            cancelled=never_cancelled,
        ).pages_checked

    assert pages(0) == pages(1) == pages(2) > 0


def test_backups_of_a_server_at_work_are_sound(
    make_site: SiteFactory, pg_major: int, checksums: bool
) -> None:
    site = make_site(pg_major, checksums=checksums, settings=ddl.SETTINGS)
    rng = random.Random(3)
    ddl.prepare(site.cluster)
    site.full()
    for take in (site.diff, site.incr, site.incr):
        ddl.run_at_random(site.cluster, rng, 15)
        take()
    site.app.synthesize("latest")
    for level in VerifyLevel:
        report = site.app.verify(None, level=level)
        assert report.damage == []
    assert report.pages_checked > 1000
    assert report.pages_known_corrupt == 0


# -- what each finds -------------------------------------------------------------------------------


def test_quick_finds_whatever_changes_a_document_or_a_length(archive: Archive) -> None:
    referred = set().union(*(packs_of(archive, position) for position in range(3)))
    for number, (name, data) in enumerate(archive.objects.items()):
        if name == "repository.json" or name.startswith("index/"):
            continue
        for what, damaged in faults(data, number):
            if name == archive.manifest(-1) and damaged is None:
                continue  # a backup without its manifest does not exist
            if name.startswith("packs/") and damaged is not None and len(damaged) == len(data):
                continue  # see the next test
            report = mini.verify_all(archive.with_planted({name: damaged}), QUICK)
            found = report.status == "damaged"
            assert found == (name in referred or not name.startswith("packs/")), f"{name}: {what}"


def test_quick_does_not_read_packs_and_the_others_do(archive: Archive) -> None:
    """What the documentation says that it cannot find."""
    roots = {
        pack.name_of(pack.PackId(Repository.open(archive.store).manifest("main", b)[0].root.pack))
        for b in archive.chain
    }
    blind = 0
    for name in packs_of(archive, 2) - roots:
        store = archive.with_planted({name: flip(archive.objects[name], 20, 1)})
        blind += mini.verify_all(store, QUICK).status == "sound"
        assert mini.verify_all(store, NORMAL).status == "damaged"
        assert mini.verify_all(store, DEEP).status == "damaged"
    assert blind


@LEVELS
def test_an_old_manifest_that_is_put_back_is_found(archive: Archive, level: VerifyLevel) -> None:
    """The backup expired and its packs were removed; then its manifest came back."""
    own = packs_of(archive, 2) - packs_of(archive, 1) - packs_of(archive, 0)
    expired: Planted = dict.fromkeys(own)
    before = archive.with_planted({**expired, archive.manifest(2): None})
    assert mini.verify_all(before, level).status == "sound"
    said = named_damage(mini.verify_all(archive.with_planted(expired), level))
    assert any(name in said for name in own)


@LEVELS
def test_a_manifest_of_another_repository_is_found(
    archive: Archive, stopped: Path, tmp_path: Path, level: VerifyLevel
) -> None:
    other = Archive(stopped, tmp_path / "other", [FULL])
    (name,) = other.named("manifests/")
    report = mini.verify_all(archive.with_planted({name: other.objects[name]}), level)
    assert [d.object for d in report.damage] == [name]
    known = archive.manifest(0)
    report = mini.verify_all(archive.with_planted({known: other.objects[name]}), level)
    assert known in named_damage(report)


@LEVELS
def test_objects_in_each_others_place_are_found(archive: Archive, level: VerifyLevel) -> None:
    first, second = archive.manifest(0), archive.manifest(1)
    swapped: Planted = {first: archive.objects[second], second: archive.objects[first]}
    said = named_damage(mini.verify_all(archive.with_planted(swapped), level))
    assert first in said and second in said
    a, b = sorted(packs_of(archive, 2))[:2]
    assert len(archive.objects[a]) != len(archive.objects[b])
    swapped = {a: archive.objects[b], b: archive.objects[a]}
    said = named_damage(mini.verify_all(archive.with_planted(swapped), level))
    # A quick one learns of a pack from the tables, which may lie in the other one.
    assert (a in said or b in said) if level is QUICK else (a in said and b in said)


# -- what only a full one finds --------------------------------------------------------------------


def test_pages_in_each_others_place_are_found_by_their_checksums(
    root: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of the library: every byte is what was hashed, and every page another block's."""
    add = Collector.add

    def swapped(self: Collector, numbers: np.ndarray, refs: Refs) -> None:
        add(self, numbers, refs[::-1])

    with monkeypatch.context() as patch:
        patch.setattr(copier, "SMALL_BYTES", -1)  # as a large relation is copied
        patch.setattr(Collector, "add", swapped)
        manifest = mini.back_up(store, root, FULL)
    assert manifest.data_checksums
    assert mini.verify_all(store, NORMAL).status == "sound"
    report = mini.verify_all(store, DEEP)
    assert report.status == "damaged"
    said = named_damage(report)
    assert manifest_name(mini.CLUSTER, manifest.backup_id) in said
    assert f"{mini.RELATION}: the pages of block 0, 1, 2, 3, 4 and " in said
    assert "do not match their own checksum" in said
    assert "are not those that the registry remembers" in said


@pytest.mark.parametrize("kind", [FULL, DIFF])
def test_a_page_that_is_not_the_one_remembered_is_found(
    root: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, kind: BackupType
) -> None:
    """As where a map leads to an older copy of the right page, whose checksum is right."""
    marks = Batch.trusted_marks

    def newer(self: Batch, *arguments: object) -> Marks:
        made = marks(self, *arguments)  # type: ignore[arg-type]
        made["lsn"][self.numbers[: len(made)] == 1] += 8
        return made

    if kind is DIFF:
        mini.back_up(store, root, FULL)
        mini.change_pages(root, mini.RELATION, [1], 77)
    with monkeypatch.context() as patch:
        patch.setattr(copier, "SMALL_BYTES", -1)
        patch.setattr(Batch, "trusted_marks", newer)
        mini.back_up(store, root, kind)
    assert mini.verify_all(store, NORMAL).status == "sound"
    (damage,) = mini.verify_all(store, DEEP).damage
    assert damage.problem == (
        f"{mini.RELATION}: the pages of block 1 are not those that the registry remembers"
    )


# -- what is no damage -----------------------------------------------------------------------------


def harm(root: Path, path: str, block: int, lsn: int | None = None) -> None:
    """A page that does not match its checksum any more."""
    with (root / path).open("r+b") as file:
        file.seek(block * PAGE_SIZE)
        data = bytearray(file.read(PAGE_SIZE))
        data[5000] ^= 1
        if lsn is not None:
            data[:8] = (lsn >> 32).to_bytes(4, "little") + (lsn & 0xFFFFFFFF).to_bytes(4, "little")
        file.seek(block * PAGE_SIZE)
        file.write(data)


def test_blocks_of_later_segments_count_from_the_fork_s_beginning(
    root: Path, store: MemoryStore
) -> None:
    """The checksum depends on it: pages of the first segment are damage in the second."""
    first = (root / mini.RELATION).read_bytes()
    (root / f"{mini.RELATION}.1").write_bytes(first)
    blocks = range(len(first) // PAGE_SIZE)
    wrong = mini.back_up(store, root, FULL)
    assert wrong.corrupt_pages == len(blocks)
    mini.change_pages(root, f"{mini.RELATION}.1", list(blocks), 9, wrong.blocks_per_segment)
    right = mini.back_up(store, root, FULL)
    assert right.corrupt_pages == 0
    report = mini.verify_all(store, DEEP)
    assert (report.damage, report.pages_known_corrupt) == ([], len(blocks))


@pytest.mark.parametrize("listed", [Manifest.MAX_LISTED, 1])
def test_pages_that_were_recorded_as_corrupt_are_no_damage(
    root: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    monkeypatch.setattr(Manifest, "MAX_LISTED", listed)
    for path, block in ((mini.RELATION, 2), (mini.RELATION, 3), (MAPS, 1)):
        harm(root, path, block)
    full = mini.back_up(store, root, FULL)
    assert (full.corrupt_pages, len(full.corruption)) == (3, min(listed, 3))
    report = mini.verify_all(store, DEEP)
    assert (report.damage, report.pages_known_corrupt) == ([], 3)
    mini.change_pages(root, mini.RELATION, [0], 5)
    mini.back_up(store, root, DIFF)
    assert mini.verify_all(store, DEEP).damage == []


def test_a_torn_page_that_the_backup_s_wal_mends_is_no_damage(
    root: Path, store: MemoryStore
) -> None:
    start = mini.back_up(store, root, FULL).start_lsn
    harm(root, mini.RELATION, 2, start)
    torn = mini.back_up(store, root, FULL)
    assert torn.corrupt_pages == 0
    report = mini.verify_all(store, DEEP)
    assert (report.damage, report.pages_known_corrupt) == ([], 0)


def test_without_checksums_marks_are_all_there_is(
    make_site: SiteFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(18, checksums=False)
    marks: Callable[..., Marks] = Batch.trusted_marks
    site.full()
    assert _pages_checked(site) > 0

    def newer(self: Batch, *arguments: object) -> Marks:
        made = marks(self, *arguments)
        made["checksum"] ^= 1
        return made

    with monkeypatch.context() as patch:
        patch.setattr(copier, "SMALL_BYTES", -1)
        patch.setattr(Batch, "trusted_marks", newer)
        site.full()
    report = site.app.verify("latest", level=DEEP)
    assert report.status == "damaged"
    assert {d.problem.rpartition(" are ")[2] for d in report.damage} == {
        "not those that the registry remembers"
    }


def _pages_checked(site: Site) -> int:
    report = site.app.verify(None, level=DEEP)
    assert report.damage == []
    return report.pages_checked
