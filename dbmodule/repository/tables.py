"""Tables: the file table, page maps, registry and changed relations of a backup, in frames.

A table is cut into groups of a fixed number of rows; a group is one frame that holds its columns
one after the other (of relations, which are for people, it is JSON). So a slice of a huge table is
read at the cost of the groups it touches, and a group that is equal to one of an earlier backup is
stored once. The *root* frame, JSON, lists every table's groups and the pack table that all
references of the backup are relative to.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule import datafile
from dbmodule.delta import EXTENT, ZERO_FRAME
from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.registry import HASH, MARK, EntryFlag, EntryKind, FileIdentity, RelationRow
from dbmodule.repository.document import FORMAT
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import PackId
from dbmodule.repository.writer import FrameWriter

FILE = np.dtype(
    [
        ("kind", "u1"),
        ("flags", "u1"),
        ("mode", "<u2"),
        ("size", "<u8"),
        ("mtime", "<i8"),
        ("ctime", "<i8"),
        ("inode", "<u8"),
        ("device", "<u8"),
        ("first_extent", "<u8"),
        ("extents", "<u4"),
        ("first_print", "<u8"),
        ("prints", "<u4"),
    ]
)
"""Fixed columns of the file table; path and link target follow as text."""

GROUP_ROWS = {"files": 4096, "extents": 16384, "marks": 16384, "hashes": 16384, "relations": 4096}
OPTIONAL = frozenset({"relations"})
"""Tables that a backup may lack: what they tell can be found out, less well, from the others."""
DTYPES = {
    "extents": EXTENT,
    "marks": MARK,
    "hashes": np.dtype([("hash", HASH)]),
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A row of the file table: one file, directory or link of the data directory."""

    path: str
    kind: EntryKind
    flags: EntryFlag
    mode: int
    size: int
    identity: FileIdentity
    target: str = ""
    """Of a symbolic link."""
    first_extent: int = 0
    extents: int = 0
    first_print: int = 0
    """Row of the marks (RELATION) or hashes (CONTENT) of the blocks in the extents."""
    prints: int = 0


def _columns(rows: NDArray[Any]) -> bytes:
    """Structured rows as columns, one after the other."""
    names = rows.dtype.names or ()
    return b"".join([np.ascontiguousarray(rows[name]).tobytes() for name in names])


def _rows(data: bytes, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if count < 0 or len(data) < count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes do not hold {count} rows")
    out = np.empty(count, dtype)
    offset = 0
    for name in dtype.names or ():
        column = np.frombuffer(data, dtype[name], count, offset)
        out[name] = column
        offset += column.nbytes
    return out


def _encode_files(entries: Sequence[FileEntry]) -> bytes:
    rows = np.array(
        [
            (
                e.kind,
                e.flags,
                e.mode,
                e.size,
                e.identity.mtime_ns,
                e.identity.ctime_ns,
                e.identity.inode,
                e.identity.device,
                e.first_extent,
                e.extents,
                e.first_print,
                e.prints,
            )
            for e in entries
        ],
        FILE,
    )
    texts = [e.path.encode("utf-8", "surrogateescape") for e in entries]
    texts += [e.target.encode("utf-8", "surrogateescape") for e in entries]
    lengths = np.array([len(text) for text in texts], "<u4")
    return _columns(rows) + lengths.tobytes() + b"".join(texts)


_KINDS = list(EntryKind)
_FLAGS = [EntryFlag(number) for number in range(2 * max(EntryFlag))]


def _decode_files(data: bytes, count: int) -> list[FileEntry]:
    rows = _rows(data, FILE, count).tolist()
    start = count * FILE.itemsize
    lengths = np.frombuffer(data, "<u4", 2 * count, start)
    ends = start + lengths.nbytes + np.cumsum(lengths, dtype=np.int64)
    if count and int(ends[-1]) != len(data):
        raise ValueError("paths and targets do not fill the group")
    texts = [
        data[end - length : end].decode("utf-8", "surrogateescape")
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    return [
        FileEntry(
            path,
            _KINDS[row[0]],
            _FLAGS[row[1]],
            row[2],
            row[3],
            FileIdentity(row[3], row[4], row[5], row[6], row[7]),
            target,
            *row[8:],
        )
        for row, path, target in zip(rows, texts[:count], texts[count:], strict=True)
    ]


_columns_of = attrgetter(*(field.name for field in fields(RelationRow)))


def _encode_relations(rows: Sequence[RelationRow]) -> bytes:
    return json.dumps([_columns_of(row) for row in rows], separators=(",", ":")).encode()


def _decode_relations(data: bytes) -> list[RelationRow]:
    rows = [RelationRow(*row) for row in json.loads(data)]
    for row in rows:
        numbers = (row.tablespace, row.database, row.relfilenode, row.pages_changed)
        names = (row.database_name, row.relation_name, row.table_name)
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{numbers} are not numbers of a relation")
        if not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"{names} are not names of a relation")
    return rows


def _relations_of(files: Iterable[FileEntry]) -> list[RelationRow]:
    """Changed pages per fork of a relation, all segments together, as the file table tells them."""
    pages: Counter[tuple[int, int, int, str]] = Counter()
    for entry in files:
        relation = datafile.relation(entry.path)
        if relation is not None and entry.prints:
            key = relation.tablespace, relation.database, relation.relfilenode, relation.fork
            pages[key] += entry.prints
    return [RelationRow(*key, count) for key, count in pages.most_common()]


class TableWriter:
    """Collects a backup's rows and stores each group as soon as it is full."""

    def __init__(self, frames: FrameWriter) -> None:
        self._frames = frames
        self._files: list[FileEntry] = []
        self._pending: dict[str, list[NDArray[Any]]] = {name: [] for name in DTYPES}
        self._waiting = dict.fromkeys(DTYPES, 0)
        self._groups: dict[str, list[tuple[int, int]]] = {name: [] for name in GROUP_ROWS}
        self.rows = dict.fromkeys(GROUP_ROWS, 0)

    def add_file(self, entry: FileEntry) -> None:
        self._files.append(entry)
        self.rows["files"] += 1
        if len(self._files) == GROUP_ROWS["files"]:
            self._flush_files()

    def add(self, table: str, rows: NDArray[Any]) -> int:
        """Append rows to a table and give the number of the first of them."""
        first = self.rows[table]
        if len(rows):
            self._pending[table].append(rows.view(DTYPES[table]))
            self._waiting[table] += len(rows)
            self.rows[table] += len(rows)
            self._flush(table, whole_groups=True)
        return first

    def _flush_files(self) -> None:
        if self._files:
            self._groups["files"].append(self._frames.store_frame(_encode_files(self._files)))
            self._files = []

    def _flush(self, table: str, *, whole_groups: bool) -> None:
        size = GROUP_ROWS[table]
        if self._waiting[table] < (size if whole_groups else 1):
            return
        rows = np.concatenate(self._pending[table])
        stop = len(rows) - len(rows) % size if whole_groups else len(rows)
        for start in range(0, stop, size):
            group = _columns(rows[start : min(start + size, stop)])
            self._groups[table].append(self._frames.store_frame(group))
        self._pending[table] = [rows[stop:]]
        self._waiting[table] = len(rows) - stop

    def add_relations(self, relations: Sequence[RelationRow]) -> None:
        """Store the changed relations of a backup, most changed pages first; to be called once."""
        self.rows["relations"] = len(relations)
        for start in range(0, len(relations), GROUP_ROWS["relations"]):
            part = relations[start : start + GROUP_ROWS["relations"]]
            self._groups["relations"].append(self._frames.store_frame(_encode_relations(part)))

    def finish(self) -> dict[str, Any]:
        """Store what is left and give the root's description of all tables."""
        self._flush_files()
        for table in DTYPES:
            self._flush(table, whole_groups=False)
        return {
            name: {
                "rows": self.rows[name],
                "group_rows": GROUP_ROWS[name],
                "groups": self._groups[name],
            }
            for name in GROUP_ROWS
        }


def encode_root(tables: dict[str, Any], packs: Sequence[PackRef]) -> bytes:
    """The root frame: tables and pack table, JSON."""
    body = {
        "format": FORMAT,
        "tables": tables,
        "packs": [[p.pack, p.size, p.footer] for p in packs],
    }
    return json.dumps(body, separators=(",", ":")).encode()


@contextmanager
def _well_formed(what: str) -> Iterator[None]:
    """Bytes that match their hash can still be nonsense, if whoever wrote them meant it so."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptObjectError(f"{what} makes no sense: {error}") from error


class TableReader:
    """The tables of one committed backup. Safe for threads; caches a bounded number of groups."""

    GROUPS = 64

    def __init__(self, frames: FrameReader, root: PackRef) -> None:
        self._frames = frames
        data = frames.frame(root, 0)
        with _well_formed("the root of a backup's tables"):
            body = json.loads(data)
            if body.get("format") != FORMAT:
                raise FormatVersionError(f"table format {body.get('format')!r} is not known")
            self.packs = [
                PackRef(PackId(str(p)), int(size), int(footer)) for p, size, footer in body["packs"]
            ]
            self._tables: dict[str, dict[str, Any]] = {
                name: {
                    "rows": int(body["tables"][name]["rows"]),
                    "group_rows": max(1, int(body["tables"][name]["group_rows"])),
                    "groups": [(int(p), int(f)) for p, f in body["tables"][name]["groups"]],
                }
                for name in GROUP_ROWS
                if name in body["tables"] or name not in OPTIONAL
            }
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, table: str) -> int:
        return int(self._tables[table]["rows"])

    def frames_in_use(self) -> dict[int, NDArray[np.int64]]:
        """Frames that the tables consist of or refer to: pack number → ascending numbers.

        What a baseline's tables refer to is not among them.
        """
        own = [place for table in self._tables.values() for place in table["groups"]]
        found = [np.array([pack << 32 | frame for pack, frame in own], np.uint64)]
        size = int(self._tables["extents"]["group_rows"])
        for first in range(0, self.rows("extents"), size):
            rows = self.slice("extents", first, min(size, self.rows("extents") - first))
            stored = rows[rows["frame"] != ZERO_FRAME]
            found.append(np.unique(stored["pack"].astype(np.uint64) << 32 | stored["frame"]))
        places = np.unique(np.concatenate(found))
        packs, starts = np.unique(places >> np.uint64(32), return_index=True)
        parts = np.split((places & np.uint64(0xFFFFFFFF)).astype(np.int64), starts[1:])
        return dict(zip(packs.tolist(), parts, strict=True)) if len(packs) else {}

    def _group_bytes(self, table: str, group: int) -> bytes:
        with _well_formed(f"table {table}"):
            pack, frame = self._tables[table]["groups"][group]
            ref = self.packs[pack]
        return self._frames.frame(ref, frame)

    def files(self) -> Iterator[FileEntry]:
        """All rows of the file table, in order."""
        left = self.rows("files")
        size = int(self._tables["files"]["group_rows"])
        for group in range(len(self._tables["files"]["groups"])):
            count = min(size, left)
            data = self._group_bytes("files", group)
            with _well_formed("the file table"):
                entries = _decode_files(data, count)
            yield from entries
            left -= count
        if left:
            raise CorruptObjectError("the file table has fewer rows than it states")

    def relations(self) -> Iterator[RelationRow]:
        """What changed of each relation, most pages first; without names where none were kept."""
        if "relations" not in self._tables:
            yield from _relations_of(self.files())
            return
        found = 0
        for group in range(len(self._tables["relations"]["groups"])):
            data = self._group_bytes("relations", group)
            with _well_formed("the table of changed relations"):
                rows = _decode_relations(data)
            found += len(rows)
            yield from rows
        if found != self.rows("relations"):
            raise CorruptObjectError("the table of changed relations is not as long as it states")

    def _group(self, table: str, group: int) -> NDArray[Any]:
        with self._lock:
            found = self._cache.get((table, group))
            if found is not None:
                self._cache.move_to_end((table, group))
                return found
        size = int(self._tables[table]["group_rows"])
        count = min(size, self.rows(table) - group * size)
        data = self._group_bytes(table, group)
        with _well_formed(f"table {table}"):
            rows = _rows(data, DTYPES[table], count)
        with self._lock:
            self._cache[table, group] = rows
            while len(self._cache) > self.GROUPS:
                self._cache.popitem(last=False)
        return rows

    def slice(self, table: str, first: int, count: int) -> NDArray[Any]:
        """Rows ``[first, first + count)`` of a table."""
        if count == 0:
            return np.empty(0, DTYPES[table])
        if first + count > self.rows(table):
            raise CorruptObjectError(f"table {table} has no row {first + count - 1}")
        size = int(self._tables[table]["group_rows"])
        parts = []
        for group in range(first // size, (first + count - 1) // size + 1):
            start = group * size
            rows = self._group(table, group)
            parts.append(rows[max(first - start, 0) : first + count - start])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
