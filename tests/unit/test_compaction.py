"""Compaction: packs that are mostly dead shrink, and every backup reads what it read before."""

from __future__ import annotations

import pytest

from dbmodule.backup.walfiles import add_file
from dbmodule.compaction import mostly_dead, rewrite
from dbmodule.delta import FRAME_BYTES
from dbmodule.errors import CorruptObjectError
from dbmodule.ident import BackupType
from dbmodule.manifest import Manifest
from dbmodule.repository import index
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.husk import Moved, name_of_husk, read_husk, write_husk
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import name_of
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import TableWriter
from dbmodule.repository.usage import Usage
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import MemoryStore
from tests.unit.strategies import LEVEL, random_bytes
from tests.unit.test_chainview import commit, contents


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setattr(FrameWriter, "PACK_BYTES", 4 * FRAME_BYTES)
    return Repository.create(MemoryStore())


def back_up(repository: Repository, number: int, files: dict[str, bytes]) -> Manifest:
    frames = repository.writer(LEVEL)
    tables = TableWriter(frames)
    for path, data in files.items():
        add_file(tables, frames, path, data)
    return commit(repository, frames, tables, number, BackupType.FULL)


def usage_of(repository: Repository, *manifests: Manifest) -> Usage:
    usage = Usage(repository)
    for manifest in manifests:
        usage.add(manifest, every_frame=True)
    return usage


def compact(repository: Repository, *manifests: Manifest, share: float = 0.6) -> list[PackRef]:
    """Rewrite and remove; gives the packs that were."""
    usage = usage_of(repository, *manifests)
    packs = mostly_dead(repository, usage, share, ())
    rewrite(repository, usage, packs, before_write=lambda: None, progress=lambda done, total: None)
    for ref in packs:
        assert ref.pack not in usage_of(repository, *manifests).needed
        repository.store.delete(name_of(ref.pack))
    return packs


def forget(repository: Repository, gone: list[PackRef]) -> None:
    """Remove what the index knows of packs."""
    for name in list(repository.store.list(index.PREFIX)):
        if set(gone) & set(index.check(name, repository.store.get(name), repository.key)):
            repository.store.delete(name)


def some_files(number: int) -> dict[str, bytes]:
    return {f"f{number}.{i}": random_bytes(number * 100 + i, FRAME_BYTES) for i in range(3)}


def test_live_frames_are_found_in_their_new_place(repository: Repository) -> None:
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES)}
    back_up(repository, 1, {**first, **some_files(1)})
    second = {"b": first["b"], "c": random_bytes(3, 5000)}
    kept = back_up(repository, 2, second)
    before = sum(repository.store.size(name) for name in repository.store.list("packs/"))
    (old,) = compact(repository, kept)
    after = sum(repository.store.size(name) for name in repository.store.list("packs/"))
    assert after < before - 2 * FRAME_BYTES
    reopened = Repository.open(repository.store)
    assert contents(reopened, [kept]) == second
    husk = reopened.frames.husk(old.pack)
    assert husk is not None
    assert husk.numbers.tolist().count(-1) == len(husk.numbers) - 1


def test_a_reader_that_knew_the_pack_goes_on(repository: Repository) -> None:
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES)}
    back_up(repository, 1, {**first, **some_files(1)})
    kept = back_up(repository, 2, {"b": first["b"]})
    reader = Repository.open(repository.store)
    assert contents(reader, [kept]) == {"b": first["b"]}  # and remembers the footer
    compact(repository, kept)
    assert contents(reader, [kept]) == {"b": first["b"]}


def test_packs_are_rewritten_again_and_again(repository: Repository) -> None:
    files = some_files(1)
    back_up(repository, 1, files)
    rewritten = []
    for number in range(2, 4):
        del files[max(files)]
        kept = back_up(repository, number, files)
        gone = compact(repository, kept, share=0.95)
        forget(repository, gone)
        rewritten.append(gone[0])
        assert contents(Repository.open(repository.store), [kept]) == files
    first = repository.frames.husk(rewritten[0].pack)
    assert first is not None
    assert rewritten[1] in first.packs  # which has a husk, too
    assert len(files) == 1


def test_dead_frames_of_a_pack_with_a_husk_are_not_found_again(repository: Repository) -> None:
    """The index still lists them, and the table of contents vouches for them."""
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES)}
    back_up(repository, 1, {**first, **some_files(1)})
    kept = back_up(repository, 2, {"b": first["b"]})
    compact(repository, kept)
    again = back_up(repository, 3, first)
    assert contents(repository, [again]) == first
    assert contents(repository, [kept]) == {"b": first["b"]}
    # The live one is found in its new place.
    usage = usage_of(repository, kept, again)
    assert usage.needed.keys() <= usage.present


def test_a_pack_whose_husk_does_not_know_a_frame_stays(repository: Repository) -> None:
    """A late husk of an expiry that was stopped: others have found the frame meanwhile."""
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES), **some_files(1)}
    back_up(repository, 1, first)
    kept = back_up(repository, 2, {"b": first["b"]})
    late = usage_of(repository, kept)
    packs = mostly_dead(repository, late, 0.6, ())
    other = back_up(repository, 3, {"a": first["a"]})
    assert packs[0].pack in usage_of(repository, other).needed
    rewrite(repository, late, packs, before_write=lambda: None, progress=lambda done, total: None)
    assert packs[0].pack in usage_of(repository, kept, other).needed
    assert packs[0].pack not in usage_of(repository, kept).needed
    assert contents(repository, [other]) == {"a": first["a"]}


def test_a_damaged_pack_is_left_as_it_is(repository: Repository) -> None:
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES)}
    back_up(repository, 1, {**first, **some_files(1)})
    kept = back_up(repository, 2, {"b": first["b"]})
    usage = usage_of(repository, kept)
    (old,) = mostly_dead(repository, usage, 0.6, ())
    data = bytearray(repository.store.get(name_of(old.pack)))
    start = int(repository.frames.footer(old).offsets[int(usage.frames[old.pack][-1])])
    data[start + 5] ^= 1
    repository.store.delete(name_of(old.pack))
    repository.store.put_new(name_of(old.pack), [data])
    rewrite(repository, usage, [old], before_write=lambda: None, progress=lambda done, total: None)
    assert list(repository.store.list("husks/")) == []
    assert old.pack in usage_of(repository, kept).needed


def test_a_husk_that_lies_is_found_out(repository: Repository) -> None:
    first = {"a": random_bytes(1, FRAME_BYTES), "b": random_bytes(2, FRAME_BYTES)}
    made = back_up(repository, 1, first)
    refs = repository.tables(made).packs
    frames = repository.tables(made).frames_in_use()
    ref = refs[0]
    start = ref.size - 16 - ref.footer
    footer = repository.store.get(name_of(ref.pack), start, ref.footer)
    data = repository.store.get(name_of(ref.pack))
    other = Repository.create(MemoryStore())
    count = len(frames[0])
    write_husk(repository.documents, ref.pack, footer, [Moved(0, count, refs[0], 0)])
    husk = read_husk(repository.documents, ref.pack, repository.key)
    assert husk is not None
    assert not husk.lacks(frames[0])
    assert len(data) == ref.size
    assert read_husk(other.documents, ref.pack, other.key) is None
    # It leads to itself, or to another frame.
    repository.store.delete(name_of_husk(ref.pack))
    write_husk(repository.documents, ref.pack, footer, [Moved(0, 1, refs[0], 1)])
    husk = read_husk(repository.documents, ref.pack, repository.key)
    assert husk is not None
    reader = FrameReader(repository.store, repository.key)
    with pytest.raises(CorruptObjectError, match="takes another frame"):
        list(reader._moved(reader.footer(ref), husk, frames[0][:1], 0, 0))
    with pytest.raises(CorruptObjectError, match="was removed"):
        list(reader._moved(reader.footer(ref), husk, frames[0][1:2], 0, 0))
