"""Chains of backups against a dictionary: whatever happened to the files, each backup folds to what
they were when it was taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

from dbmodule import datafile, page
from dbmodule.backup import batch, copier
from dbmodule.backup.baseline import ChainBaseline, Host
from dbmodule.backup.copier import Copier
from dbmodule.backup.copying import add_result
from dbmodule.backup.values import BaselineView, CopySettings, NoBaseline
from dbmodule.chain import chain_of, choose_baseline
from dbmodule.delta import EXTENT
from dbmodule.errors import BrokenChainError, CorruptObjectError
from dbmodule.ident import PAGE_SIZE, BackupId, BackupType, Lsn, Timeline
from dbmodule.manifest import Manifest, Root
from dbmodule.ports import Buffer, SourceEntry, never_cancelled
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, FileIdentity
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import GROUP_ROWS, FileEntry, TableWriter, encode_root
from dbmodule.repository.writer import FrameWriter
from dbmodule.restore.files import write_file
from dbmodule.storage import MemoryStore
from dbmodule.walsummary import ChangedBlocks
from tests.unit.strategies import LEVEL, WAL_SEGMENT, entry, manifest, quick, relation_page

CALLED_NS = 10**18
RELATIONS = ("base/5/16384", "base/5/16385")
OTHERS = ("base/5/16384_fsm", "pg_xact/0000", "postgresql.conf")
Files = dict[str, bytes]


class MemoryFile:
    """`ports.SourceFile` over bytes."""

    mode = 0o600

    def __init__(self, data: bytes, written: int) -> None:
        self._data = data
        self._identity = FileIdentity(len(data), written, written, 1, 1)

    def identity(self) -> FileIdentity:
        return self._identity

    def read_into(self, buffer: memoryview, offset: int) -> int:
        piece = self._data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        pass


class MemoryDirectory:
    """`ports.DataDirectory` whose files are written by a model of a server."""

    path = "memory"

    def __init__(self) -> None:
        self.files: Files = {}
        self.written: dict[str, int] = {}
        self.clock = 0

    def put(self, path: str, data: bytes) -> None:
        self.clock += 1
        self.files[path], self.written[path] = data, self.clock

    def walk(self) -> Iterator[SourceEntry]:
        for path in sorted(self.files):
            yield SourceEntry(path, "file", 0o600, len(self.files[path]))

    def open(self, path: str) -> MemoryFile | None:
        data = self.files.get(path)
        return None if data is None else MemoryFile(data, self.written[path])

    def read(self, path: str) -> bytes | None:
        return self.files.get(path)

    def names(self, path: str) -> list[str]:
        return []

    def owner(self) -> str:
        return "postgres"


class PerfectSummaries(ChangedBlocks):
    """WAL summaries that name each block that differs, and no other."""

    def __init__(self, then: Files, now: Files) -> None:
        self._then, self._now = then, now

    def within(self, relation: tuple[int, int, int], first: int, count: int) -> NDArray[np.int64]:
        path = f"base/{relation[1]}/{relation[2]}"
        then, now = (
            np.frombuffer(files[path][: count * PAGE_SIZE], np.uint8).reshape(count, PAGE_SIZE)
            for files in (self._then, self._now)
        )
        return np.flatnonzero((then != now).any(axis=1))


class MemoryTarget:
    """`ports.TargetFile` in memory, that notices a byte written twice."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._written = np.zeros(size, np.bool_)

    def write(self, data: Buffer, offset: int) -> None:
        part = slice(offset, offset + len(data))
        assert not self._written[part].any()
        assert part.stop <= len(self.data)
        self._written[part] = True
        self.data[part] = data

    def finish(self) -> int:
        return 0

    def abandon(self) -> None:
        pass


def commit(
    repository: Repository,
    frames: FrameWriter,
    tables: TableWriter,
    number: int,
    kind: BackupType,
    baseline: Manifest | None = None,
    **changes: Any,
) -> Manifest:
    """End a backup: make it durable and write its manifest."""
    described = tables.finish()
    packs = frames.flush()
    root = frames.store_root(encode_root(described, packs))
    frames.check_references()
    frames.close()
    made = manifest(
        number,
        kind,
        None if baseline is None else baseline.backup_id,
        boot_id="this boot",
        host="this host",
        root=Root(root.pack, root.size, root.footer),
        **changes,
    )
    if baseline is not None:
        digest = repository.check_chain([baseline])[0]
        made = dataclasses.replace(made, baseline_hash=digest)
    repository.commit(made)
    return repository.manifest(made.cluster, made.backup_id)[0]


def contents(repository: Repository, chain: Sequence[Manifest]) -> Files:
    """What a restore of the chain would write."""
    view = ChainView(repository, chain)
    found: Files = {}
    for path, row in view.files.items():
        target = MemoryTarget(row.size)
        counts = write_file(view, repository.frames, path, row.size, target)
        assert sum(counts.pages_from.values()) == -(-row.size // PAGE_SIZE)
        found[path] = bytes(target.data)
    return found


class Chains(RuleBasedStateMachine):
    """A server that writes, and backups of every type in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(FrameWriter, "PACK_BYTES", 60_000)
        for module in (batch, copier):
            self.patch.setattr(module, "REREAD_SECONDS", (0.0,))
        for name, rows in {"files": 2, "extents": 3, "marks": 16, "hashes": 5}.items():
            self.patch.setitem(GROUP_ROWS, name, rows)
        self.directory = MemoryDirectory()
        self.lsn = 2 * WAL_SEGMENT
        self.repository = Repository.create(MemoryStore())
        self.backups: dict[BackupId, Manifest] = {}
        self.expected: dict[BackupId, Files] = {}

    def teardown(self) -> None:
        try:
            self.every_backup_is_what_it_was()
        finally:
            self.patch.undo()

    def next_page(self) -> bytes:
        self.lsn += 40
        return relation_page(self.lsn, self.lsn % 7, filler=self.lsn % 251)

    # -- the server -----------------------------------------------------------------------------

    @initialize(blocks=st.integers(0, 70))
    def create(self, blocks: int) -> None:
        for path in RELATIONS:
            self.directory.put(path, b"".join(self.next_page() for _ in range(blocks)))
        for path in OTHERS:
            self.directory.put(path, b"begin " * blocks)

    @rule(path=st.sampled_from(RELATIONS), blocks=st.sets(st.integers(0, 75), max_size=6))
    def write_pages(self, path: str, blocks: set[int]) -> None:
        """Write some pages; those between the old end and a new one are zero."""
        data = bytearray(self.directory.files.get(path, b""))
        for block in sorted(blocks):
            end = (block + 1) * PAGE_SIZE
            data.extend(bytes(max(0, end - len(data))))
            data[end - PAGE_SIZE : end] = self.next_page()
        self.directory.put(path, bytes(data))

    @rule(path=st.sampled_from(RELATIONS), first=st.integers(0, 70), count=st.integers(1, 40))
    def write_run(self, path: str, first: int, count: int) -> None:
        self.write_pages(path, set(range(first, first + count)))

    @rule(path=st.sampled_from(RELATIONS), block=st.integers(0, 75))
    def write_page_without_lsn(self, path: str, block: int) -> None:
        self.write_pages(path, {block})
        data = bytearray(self.directory.files[path])
        odd = relation_page(1, 0, filler=self.lsn % 251)
        data[block * PAGE_SIZE : (block + 1) * PAGE_SIZE] = odd
        self.directory.put(path, bytes(data))

    @rule(path=st.sampled_from(RELATIONS + OTHERS), blocks=st.integers(0, 40))
    def truncate(self, path: str, blocks: int) -> None:
        self.directory.put(path, self.directory.files.get(path, b"")[: blocks * PAGE_SIZE])

    @rule(path=st.sampled_from(RELATIONS + OTHERS), blocks=st.integers(1, 40))
    def extend_with_zeroes(self, path: str, blocks: int) -> None:
        old = self.directory.files.get(path, b"")
        self.directory.put(path, old + bytes(blocks * PAGE_SIZE))

    @rule(path=st.sampled_from(RELATIONS + OTHERS))
    def drop(self, path: str) -> None:
        self.directory.files.pop(path, None)

    @rule(
        path=st.sampled_from(OTHERS[1:]), at=st.integers(0, 100_000), piece=st.binary(max_size=9000)
    )
    def write_bytes(self, path: str, at: int, piece: bytes) -> None:
        data = bytearray(self.directory.files.get(path, b""))
        data.extend(bytes(max(0, at - len(data))))
        data[at : at + len(piece)] = piece
        self.directory.put(path, bytes(data))

    # -- backups --------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(BackupType), detector=st.sampled_from(["wal", "scan", "content"]))
    def back_up(self, kind: BackupType, detector: str) -> None:
        baseline = None
        if not self.backups:
            kind = BackupType.FULL
        if kind is not BackupType.FULL:
            baseline = choose_baseline(self.backups, kind, None)
        self.lsn += 40
        start = Lsn(self.lsn)
        view: BaselineView = NoBaseline()
        if baseline is not None:
            chain = chain_of(self.backups, baseline.backup_id)
            here = Host("this host", "this boot", Timeline(1))
            view = ChainBaseline(self.repository, chain, detector=detector, here=here)
            if detector == "wal":
                view.changed = PerfectSummaries(
                    self.expected[baseline.backup_id], self.directory.files
                )
        frames = self.repository.writer(LEVEL)
        tables = TableWriter(frames)
        settings = CopySettings(start, CALLED_NS, False, WAL_SEGMENT, 131072)
        by_file = Copier(self.directory, frames, settings, view, never_cancelled)
        whole = {}
        for path, data in sorted(self.directory.files.items()):
            result = by_file.copy(path, datafile.classify(path))
            assert result is not None
            add_result(tables, result)
            partial = len(data) % PAGE_SIZE if datafile.relation(path) is not None else 0
            whole[path] = data[: len(data) - partial]
        made = commit(
            self.repository,
            frames,
            tables,
            len(self.backups) + 1,
            kind,
            baseline,
            start_lsn=start,
            stop_lsn=start,
        )
        self.backups[made.backup_id] = made
        self.expected[made.backup_id] = whole
        self.check(made)

    @precondition(lambda self: bool(self.backups))
    @rule()
    def every_backup_is_what_it_was(self) -> None:
        for made in self.backups.values():
            self.check(made)

    def check(self, made: Manifest) -> None:
        chain = chain_of(self.backups, made.backup_id)
        self.repository.check_chain(chain)
        found = contents(self.repository, chain)
        expected = self.expected[made.backup_id]
        assert found.keys() == expected.keys()
        for path, data in expected.items():
            assert found[path] == data, path
        self.check_fingerprints(ChainView(self.repository, chain), expected)

    def check_fingerprints(self, view: ChainView, expected: Files) -> None:
        for path, row in view.files.items():
            prints = view.prints(path)
            if row.kind is EntryKind.RELATION:
                assert prints.dtype == MARK
                headers = page.headers(expected[path])
                assert prints["lsn"].tolist() == page.lsns(headers).tolist()
                assert prints["checksum"].tolist() == headers["checksum"].tolist()
            else:
                frames = self.repository.writer(LEVEL)
                assert prints.tobytes() == b"".join(frames.hashes(expected[path]))
                frames.close()


TestChains = Chains.TestCase
TestChains.settings = settings(quick(40), stateful_step_count=25)


class Hand:
    """Backups whose tables are written by hand, right or wrong."""

    def __init__(self) -> None:
        self.repository = Repository.create(MemoryStore())
        self.chain: list[Manifest] = []

    def add(self, rows: list[tuple[FileEntry, list[tuple[int, ...]], int]]) -> Manifest:
        """A backup on the one before; a row is a file, its extents, and how many marks it has."""
        frames = self.repository.writer(LEVEL)
        tables = TableWriter(frames)
        frames.store_run(bytes([len(self.chain) + 1]) * PAGE_SIZE * 4)
        for row, extents, marks in rows:
            first = tables.add("extents", np.array(extents, EXTENT))
            first_print = tables.add("marks", np.zeros(marks, MARK))
            tables.add_file(
                dataclasses.replace(
                    row,
                    first_extent=first,
                    extents=len(extents),
                    first_print=first_print,
                    prints=marks,
                )
            )
        kind = BackupType.INCR if self.chain else BackupType.FULL
        baseline = self.chain[-1] if self.chain else None
        number = len(self.chain) + 1
        made = commit(self.repository, frames, tables, number, kind, baseline)
        self.chain.append(made)
        return made

    def view(self) -> ChainView:
        return ChainView(self.repository, self.chain)


def relation(flags: EntryFlag = EntryFlag.NONE, blocks: int = 4) -> FileEntry:
    return entry("base/5/1", EntryKind.RELATION, flags=flags, size=blocks * PAGE_SIZE)


WHOLE: list[tuple[int, ...]] = [(0, 4, 0, 0, 0)]


def test_a_file_without_a_beginning_breaks_the_chain() -> None:
    hand = Hand()
    hand.add([])
    hand.add([(relation(EntryFlag.OVERLAY), WHOLE, 4)])
    for ask in (hand.view().page_map, hand.view().prints):
        with pytest.raises(BrokenChainError, match="has no beginning"):
            ask("base/5/1")


def test_a_file_that_was_dropped_and_made_again_starts_anew() -> None:
    hand = Hand()
    hand.add([(relation(), WHOLE, 4)])
    hand.add([])
    hand.add([(relation(blocks=1), [(0, 1, 0, 0, 3)], 1)])
    folded = hand.view().page_map("base/5/1")
    assert folded.origin.tolist() == [2]
    assert folded.refs["slot"].tolist() == [3]
    hand.chain.pop()
    assert hand.view().files == {}


def test_packs_of_all_members_are_numbered_anew() -> None:
    hand = Hand()
    hand.add([(relation(), WHOLE, 4)])
    hand.add([(relation(EntryFlag.OVERLAY), [(1, 2, 0, 0, 1)], 2)])
    hand.add([(relation(EntryFlag.OVERLAY | EntryFlag.UNCHANGED), [], 0)])
    view = hand.view()
    folded = view.page_map("base/5/1")
    assert folded.origin.tolist() == [0, 1, 1, 0]
    assert folded.refs["pack"].tolist() == [0, 1, 1, 0]
    assert len({pack.pack for pack in view.packs}) == len(view.packs) == 3
    target = MemoryTarget(4 * PAGE_SIZE)
    write_file(view, hand.repository.frames, "base/5/1", 4 * PAGE_SIZE, target)
    expected = b"".join(bytes([n]) * PAGE_SIZE for n in (1, 2, 2, 1))
    assert bytes(target.data) == expected


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [(0, 3, 0, 0, 0)],
        [(1, 3, 0, 0, 0)],
        [(0, 5, 0, 0, 0)],
        [(0, 4, 1, 0, 0)],
        [(0, 4, 0xFFFFFFFF, 0, 0)],
    ],
)
def test_a_page_map_that_does_not_fit_its_file_is_refused(extents: list[tuple[int, ...]]) -> None:
    hand = Hand()
    hand.add([(relation(), extents, 4)])
    with pytest.raises(CorruptObjectError, match="page map of base/5/1"):
        hand.view().page_map("base/5/1")


@pytest.mark.parametrize("extents", [[(0, 4, 0, 0, 3)], [(0, 4, 0, 1, 0)], [(0, 4, 0, 0, 200)]])
def test_a_reference_to_bytes_that_are_not_there_is_refused(
    extents: list[tuple[int, ...]],
) -> None:
    hand = Hand()
    hand.add([(relation(), extents, 4)])
    target = MemoryTarget(4 * PAGE_SIZE)
    with pytest.raises(CorruptObjectError):
        write_file(hand.view(), hand.repository.frames, "base/5/1", 4 * PAGE_SIZE, target)


def test_fingerprints_that_do_not_match_the_page_map_are_refused() -> None:
    hand = Hand()
    hand.add([(relation(), WHOLE, 3)])
    with pytest.raises(CorruptObjectError, match="does not match its page map"):
        hand.view().prints("base/5/1")


def test_an_empty_file_has_an_empty_map() -> None:
    hand = Hand()
    hand.add([(relation(blocks=0), [], 0), (entry("PG_VERSION"), [], 0)])
    assert len(hand.view().page_map("base/5/1").refs) == 0
    assert hand.view().prints("PG_VERSION").dtype == HASH


def test_a_replaced_baseline_breaks_the_chain() -> None:
    hand = Hand()
    hand.add([])
    hand.add([])
    hand.repository.check_chain(hand.chain)
    store = hand.repository.store
    full = hand.chain[0]
    store.delete(f"manifests/main/{full.backup_id}.json")
    hand.repository.commit(dataclasses.replace(full, label="another"))
    with pytest.raises(BrokenChainError, match="its manifest has changed"):
        hand.repository.check_chain(hand.chain)
