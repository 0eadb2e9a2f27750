"""A chain of backups seen as one: the folded page map and registry of each file.

For every member but the last only the rows that change something are kept in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dbmodule.datafile import is_late_unlogged
from dbmodule.delta import ZERO_FRAME, PageMap, expand
from dbmodule.errors import BrokenChainError, CorruptObjectError
from dbmodule.ident import PAGE_SIZE
from dbmodule.manifest import Manifest
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, fold
from dbmodule.repository.index import PackRef
from dbmodule.repository.repository import Repository
from dbmodule.repository.tables import FileEntry, TableReader


def chunks_of(size: int) -> int:
    """Pages or 8 kB chunks in a file of `size` bytes; the last chunk may be shorter."""
    return -(-size // PAGE_SIZE)


class ChainView:
    """The state of the data directory that `chain` (from the full down) describes."""

    def __init__(self, repository: Repository, chain: Sequence[Manifest]) -> None:
        self.chain = list(chain)
        self._tables: list[TableReader] = [repository.tables(manifest) for manifest in chain]
        self._effective: list[dict[str, FileEntry]] = []
        for tables in self._tables[:-1]:
            rows = {e.path: e for e in tables.files() if EntryFlag.UNCHANGED not in e.flags}
            self._effective.append(rows)
        entries = list(self._tables[-1].files())
        self.files: dict[str, FileEntry] = {e.path: e for e in entries}
        if len(self.files) < len(entries):
            raise CorruptObjectError(
                f"the file table of {self.chain[-1].backup_id} holds a path twice"
            )
        late = frozenset(self.chain[-1].late_unlogged)
        if late:
            self.files = {
                path: entry
                for path, entry in self.files.items()
                if not is_late_unlogged(path, late)
            }
        self._effective.append(self.files)
        self.packs: list[PackRef] = []
        """Pack table of the whole chain, which folded references point into."""
        self._pack_numbers: list[Any] = []
        numbers: dict[str, int] = {}
        for tables in self._tables:
            for ref in tables.packs:
                if ref.pack not in numbers:
                    numbers[ref.pack] = len(self.packs)
                    self.packs.append(ref)
            self._pack_numbers.append(np.array([numbers[ref.pack] for ref in tables.packs], "<u4"))

    def _layers(self, path: str) -> list[tuple[int, FileEntry]]:
        """The rows that make up `path`, oldest first."""
        layers: list[tuple[int, FileEntry]] = []
        for member in range(len(self.chain) - 1, -1, -1):
            entry = self._effective[member].get(path)
            if entry is None:
                continue
            if EntryFlag.UNCHANGED not in entry.flags:
                layers.append((member, entry))
            if EntryFlag.OVERLAY not in entry.flags:
                return layers[::-1]
        raise BrokenChainError(
            f"{path} has no beginning in the chain of {self.chain[-1].backup_id}",
            hint="Run `dbmodule verify`, and restore a backup of another chain.",
        )

    def page_map(self, path: str) -> PageMap:
        """Where the bytes of each block of `path` are; packs are rows of `packs`."""
        folded = PageMap.empty()
        for member, entry in self._layers(path):
            rows = self._tables[member].slice("extents", entry.first_extent, entry.extents).copy()
            stored = np.flatnonzero(rows["frame"] != ZERO_FRAME)
            try:
                rows["pack"][stored] = self._pack_numbers[member][rows["pack"][stored]]
                folded = folded.overlay(rows, chunks_of(entry.size), member)
            except (ValueError, IndexError) as error:
                raise CorruptObjectError(
                    f"page map of {path} in {self.chain[member].backup_id}: {error}"
                ) from error
        return folded

    def prints(self, path: str) -> Any:
        """Folded fingerprints of `path`: marks of a relation, hashes of any other file.

        Shape (blocks,), dtype `MARK` or `HASH`.
        """
        kind = self.files[path].kind
        table, dtype = ("marks", MARK) if kind is EntryKind.RELATION else ("hashes", HASH)
        folded = np.empty(0, dtype)
        for member, entry in self._layers(path):
            tables = self._tables[member]
            blocks, _ = expand(tables.slice("extents", entry.first_extent, entry.extents))
            rows = tables.slice(table, entry.first_print, entry.prints)
            values = rows if table == "marks" else rows["hash"]
            if len(values) != len(blocks):
                raise CorruptObjectError(f"registry of {path}: does not match its page map")
            folded = fold(folded, chunks_of(entry.size), blocks, values)
        return folded
