"""Write-ahead log: names of segments, timeline histories, and proof that stored WAL is sound.

`WalReader` walks every record between two LSNs as recovery will, one segment at a time, and
raises `SourceError` at the first byte that recovery would refuse: a page header of another
cluster, timeline, version or address, a record that does not follow its predecessor or does not
match its CRC, a segment that is missing. Bytes that recovery never looks at are not judged:
padding between records, and a segment's rest after a segment switch.

Page headers interrupt records. So the walk takes them out first: positions are offsets in a
*stream*, the page bodies of a segment one after another, in which every record is contiguous and
starts on a multiple of 8, as it does by LSN. Headers are checked as one vector. A record that a
segment's end cuts is carried over to the next stream; memory is bounded by that and one segment.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from dbmodule.errors import SourceError
from dbmodule.ident import Lsn, SystemId, Timeline, format_lsn

Buffer = bytes | bytearray | memoryview

PAGE_SIZE = 8192
"""Bytes per WAL page (``wal_block_size``); the long header of each segment repeats it."""

PAGE_MAGIC = {15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
"""``xlp_magic`` by major version of the server."""

_SEGMENT_NAME = re.compile(r"[0-9A-F]{24}")
_HISTORY_LINE = re.compile(r"\s*([0-9]{1,10})\s+([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})(?:\s.*)?")

_PAGE_HEADER = np.dtype(
    [
        ("magic", "<u2"),
        ("info", "<u2"),
        ("timeline", "<u4"),
        ("address", "<u8"),
        ("remaining", "<u4"),
        ("padding", "<u4"),
    ]
)
_SHORT_HEADER = _PAGE_HEADER.itemsize
# What the first page of a segment adds: system identifier, segment size, page size.
_LONG_HEADER_TAIL = struct.Struct("<QII")
_LONG_HEADER = _SHORT_HEADER + _LONG_HEADER_TAIL.size
_BODY = PAGE_SIZE - _SHORT_HEADER
_FIRST_BODY = PAGE_SIZE - _LONG_HEADER
_LONGER = _LONG_HEADER - _SHORT_HEADER

_IS_CONTINUATION = 0x0001
_HAS_LONG_HEADER = 0x0002
_IS_OVERWRITE = 0x0008
_KNOWN_FLAGS = 0x000F

# xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, xl_crc; the CRC covers what follows it, then
# what precedes it.
_RECORD = struct.Struct("<IIQBB2xI")
_HEADER = _RECORD.size
_RECORD_LIMIT = 1020 * 1024 * 1024
_CRC_AT = 20
_XLOG, _SMGR, _DATABASE, _TABLESPACE = 0, 2, 4, 5
_OPERATION = 0xF0
_SWITCH, _OVERWRITE_CONTRECORD = 0x40, 0xD0
_CREATE_TABLESPACE = 0x00
_CREATE_FORK = 0x10
_INIT_FORK = 3
_COPY_DATABASE, _DROP_DATABASE = 0x00, 0x20
_OID = struct.Struct("<I")
# OIDs of tablespace and database, relfilenode, fork.
_FORK = struct.Struct("<IIIi")
_LSN = struct.Struct("<Q")
# OIDs of a new database, of its tablespace, of its source, and of that one's tablespace.
_DATABASE_COPY = struct.Struct("<IIII")
# OID of a database, and the number of OIDs of tablespaces that follow.
_DATABASE_DROP = struct.Struct("<II")

_HINT = "This WAL cannot be replayed: take another backup, and check the disk it came from."


def segment_name(timeline: int, number: int, segment_size: int) -> str:
    """File name of a segment: ``000000010000000000000003``."""
    per_id = (1 << 32) // segment_size
    return f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"


def parse_segment_name(name: str, segment_size: int) -> tuple[Timeline, int]:
    """Timeline and number of the segment of that name; `SourceError` when it is none."""
    if _SEGMENT_NAME.fullmatch(name):
        per_id = (1 << 32) // segment_size
        timeline, high, low = (int(name[at : at + 8], 16) for at in (0, 8, 16))
        if timeline and low < per_id:
            return Timeline(timeline), high * per_id + low
    raise SourceError(
        f"not the name of a WAL segment of {segment_size} bytes: {name!r}",
        hint="Names of segments have 24 hexadecimal digits: timeline and number.",
    )


def segment_of(lsn: int, segment_size: int) -> int:
    """Number of the segment that holds the byte at `lsn`."""
    return lsn // segment_size


def segments_between(timeline: int, start: int, stop: int, segment_size: int) -> list[str]:
    """Names of the segments that hold the bytes from `start` up to, not including, `stop`."""
    numbers = range(segment_of(start, segment_size), segment_of(stop - 1, segment_size) + 1)
    return [segment_name(timeline, number, segment_size) for number in numbers]


def history_name(timeline: int) -> str:
    """File name of a timeline's history: ``00000002.history``; timeline 1 has none."""
    return f"{timeline:08X}.history"


def parse_history(text: str) -> list[tuple[Timeline, Lsn]]:
    """The ancestors of a timeline, oldest first, each with the LSN at which it was left."""
    history: list[tuple[Timeline, Lsn]] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HISTORY_LINE.fullmatch(line)
        if match is None or (history and int(match[1]) <= history[-1][0]):
            raise SourceError(
                f"bad line in a timeline history: {line!r}",
                hint="Fetch the history file again from the WAL archive or the server.",
            )
        history.append((Timeline(int(match[1])), Lsn(int(match[2], 16) << 32 | int(match[3], 16))))
    return history


def lies_on_history(
    timeline: int,
    lsn: int,
    current_timeline: int,
    history: Sequence[tuple[Timeline, Lsn]],
) -> bool:
    """Whether WAL of `timeline` that ends at `lsn` is in the past of `current_timeline`.

    `history` is that of the current timeline. Equal numbers do not prove equal branches: two
    servers promoted from one parent can both be on timeline 2.
    """
    if timeline == current_timeline:
        return True
    return any(ancestor == timeline and lsn <= switch for ancestor, switch in history)


@dataclass(frozen=True, slots=True)
class CreatedTablespace:
    """A CREATE TABLESPACE that replay will repeat, at this very place."""

    oid: int
    path: str
    """Absolute, or empty for an in-place tablespace."""
    lsn: Lsn


@dataclass(frozen=True, slots=True)
class DatabaseCopy:
    """A database copied or moved file by file, which replay repeats from the source's directory.

    Directories are (OID of the tablespace, OID of the database).
    """

    source: tuple[int, int]
    copy: tuple[int, int]
    lsn: Lsn


@dataclass(frozen=True, slots=True)
class WalSummary:
    """What a completed walk has seen."""

    records: int
    end_lsn: Lsn
    created_tablespaces: list[CreatedTablespace]
    lost_copies: tuple[DatabaseCopy, ...] = ()
    """Those whose source was removed afterwards: a backup taken meanwhile may hold a part of it."""
    init_forks: tuple[tuple[int, int, int], ...] = ()
    """(Tablespace, database, relfilenode) of init forks that were created: what else is there of
    such a relation is unlogged, although at first nothing told so."""


def check_segments(
    segments: Iterable[tuple[str, Buffer]],
    *,
    major: int,
    system_identifier: int,
    timeline: int,
    segment_size: int,
    start_lsn: int,
    stop_lsn: int,
) -> WalSummary:
    """Walk segments, as (name, bytes) in order, from `start_lsn` to `stop_lsn`: see `WalReader`."""
    reader = WalReader(
        major=major,
        system_identifier=SystemId(system_identifier),
        timeline=Timeline(timeline),
        segment_size=segment_size,
        start_lsn=Lsn(start_lsn),
        stop_lsn=Lsn(stop_lsn),
    )
    for name, data in segments:
        reader.feed(name, data)
    return reader.finish()


@dataclass(frozen=True, slots=True)
class _Segment:
    """One segment under the reader's eyes."""

    base: int
    """LSN of its first byte."""
    headers: NDArray[np.void]
    sound: int
    """Pages from this one on may not be walked; see `WalReader._sound_pages`."""


class WalReader:
    """Checks WAL from the start of a record to the end of one, fed segment by segment.

    `start_lsn` is where a record starts (a backup's start LSN); `stop_lsn` is where one ends
    (its stop LSN). `feed` every segment of `segments_between`, in order, whole; then `finish`.
    Both raise `SourceError`. After an error the reader is of no more use.
    """

    def __init__(
        self,
        *,
        major: int,
        system_identifier: SystemId,
        timeline: Timeline,
        segment_size: int,
        start_lsn: Lsn,
        stop_lsn: Lsn,
    ) -> None:
        if major not in PAGE_MAGIC:
            raise SourceError(
                f"the WAL of PostgreSQL {major} is not known",
                hint=f"Versions {min(PAGE_MAGIC)} to {max(PAGE_MAGIC)} are.",
            )
        if not start_lsn < stop_lsn:
            raise SourceError(
                f"no WAL between {format_lsn(start_lsn)} and {format_lsn(stop_lsn)}",
                hint="The stop LSN of a backup is always later than its start LSN.",
            )
        self._magic = PAGE_MAGIC[major]
        self._system_identifier = system_identifier
        self._timeline = timeline
        self._segment_size = segment_size
        self._start = start_lsn
        self._stop = stop_lsn
        self._next = segment_of(start_lsn, segment_size)
        self._last = segment_of(stop_lsn - 1, segment_size)
        self._name = ""
        self._records = 0
        self._created: list[CreatedTablespace] = []
        self._copies: list[DatabaseCopy] = []
        self._lost: list[DatabaseCopy] = []
        self._init_forks: list[tuple[int, int, int]] = []
        # State between records: where the last one started (None before the first), the part of
        # an unfinished one and where it starts, and one whose rest was lost in a crash.
        self._previous: int | None = None
        self._carried = b""
        self._carried_lsn = 0
        self._aborted: int | None = None
        # Where the body of each page starts in a segment's stream, and how long that is.
        pages = segment_size // PAGE_SIZE
        self._bodies = np.arange(pages, dtype=np.int64) * _BODY - _LONGER
        self._bodies[0] = 0
        self._usable = pages * _BODY - _LONGER

    def feed(self, name: str, data: Buffer) -> None:
        """Check the next segment, whose file is called `name` and holds `data`."""
        expected = segment_name(self._timeline, self._next, self._segment_size)
        self._name = name
        if self._next > self._last or name != expected:
            wanted = expected if self._next <= self._last else "no more"
            raise SourceError(f"WAL segment {wanted} expected, not {name}", hint=_HINT)
        base = self._next * self._segment_size
        if len(data) != self._segment_size:
            raise self._damage(base, f"{len(data)} bytes instead of {self._segment_size}")
        self._check_long_header(data, base)
        headers = np.ndarray(
            shape=(len(self._bodies),), dtype=_PAGE_HEADER, buffer=data, strides=(PAGE_SIZE,)
        )
        self._walk(_Segment(base, headers, self._sound_pages(headers, base)), data)
        self._next += 1

    def finish(self) -> WalSummary:
        """What was seen; raises `SourceError` unless the walk has reached the stop LSN."""
        if self._next <= self._last:
            missing = segment_name(self._timeline, self._next, self._segment_size)
            raise SourceError(
                f"WAL segment {missing} is missing: the backup needs WAL up to "
                f"{format_lsn(self._stop)}",
                hint="Keep WAL longer (a replication slot, or an archive), and take another.",
            )
        return WalSummary(
            self._records,
            self._stop,
            self._created,
            tuple(self._lost),
            tuple(self._init_forks),
        )

    def _check_long_header(self, data: Buffer, base: int) -> None:
        system_identifier, segment_size, page_size = _LONG_HEADER_TAIL.unpack_from(
            data, _SHORT_HEADER
        )
        if system_identifier != self._system_identifier:
            raise self._damage(
                base,
                f"it belongs to the cluster {system_identifier}, not {self._system_identifier}",
            )
        if (segment_size, page_size) != (self._segment_size, PAGE_SIZE):
            raise self._damage(base, f"segment size {segment_size}, page size {page_size}")

    def _sound_pages(self, headers: NDArray[np.void], base: int) -> int:
        """Number of the first page, of those that matter, whose header is not as it must be.

        What lies before `start_lsn` does not matter, but for the segment's first header. Those
        up to the page of `start_lsn` may be of an earlier timeline: promotion copies them.
        """
        pages = len(headers)
        long = np.zeros(pages, dtype=np.uint16)
        long[0] = _HAS_LONG_HEADER
        addresses = np.arange(base, base + self._segment_size, PAGE_SIZE, dtype=np.uint64)
        inherited = (headers["timeline"] < self._timeline) & (addresses <= self._start)
        sound: NDArray[np.bool_] = headers["magic"] == self._magic
        sound &= (headers["info"] & ~np.uint16(_KNOWN_FLAGS)) == 0
        sound &= (headers["info"] & np.uint16(_HAS_LONG_HEADER)) == long
        sound &= headers["address"] == addresses
        sound &= (headers["timeline"] == self._timeline) | inherited
        sound[1 : max(self._start - base, 0) // PAGE_SIZE] = True
        return int(np.argmin(sound)) if not sound.all() else pages

    def _require_page(self, segment: _Segment, page: int) -> None:
        """Raise unless the walk may enter this page."""
        if page < segment.sound:
            return
        header = segment.headers[segment.sound]
        raise self._damage(
            segment.base + segment.sound * PAGE_SIZE,
            f"bad page header: magic {int(header['magic']):04X} (expected {self._magic:04X}), "
            f"flags {int(header['info']):04X}, timeline {int(header['timeline'])} "
            f"(expected {self._timeline}), address {format_lsn(int(header['address']))}",
        )

    def _walk(self, segment: _Segment, data: Buffer) -> None:
        """Check the records that end in this segment, up to the stop LSN, and carry the rest."""
        carried = len(self._carried)
        stream = self._stream(data)
        view = memoryview(stream)
        size = carried + self._usable
        position, stop = 0, size
        if self._start >= segment.base:
            position = self._position(self._start - segment.base)
        if self._next == self._last:
            stop = carried + self._position(self._stop - segment.base)
        entered = self._page_of(position)
        remaining = np.zeros(len(self._bodies), dtype=np.int64)
        overwritten = np.zeros(len(self._bodies), dtype=np.bool_)
        # What is carried over counts as a page of its own, before the segment's first.
        page_end, to_lsn = carried, self._carried_lsn
        seen = position
        unpack, checksum = _RECORD.unpack_from, crc32c
        records, previous = self._records, self._previous
        self._carried = b""

        while position < stop:
            if position >= page_end:
                page = self._page_of(position - carried)
                self._require_page(segment, page)
                page_end = min(carried + (page + 1) * _BODY - _LONGER, size)
                to_lsn = segment.base + (page + 1) * PAGE_SIZE - page_end
            length, _, prev, info, manager, crc = unpack(stream, position)
            lsn = position + to_lsn
            end = position + length
            if length < _HEADER or length > _RECORD_LIMIT:
                raise self._damage(lsn, f"a record of {length} bytes")
            if end > page_end:
                first = self._page_of(page_end - carried)
                past = self._page_of(min(end, size) - 1 - carried) + 1
                lost = self._overwritten_page(segment, first, past)
                reached = past if lost is None else lost
                remaining[first:reached] = end - carried - self._bodies[first:reached]
                if lost is not None:
                    self._aborted = lsn
                    overwritten[lost] = True
                    position = carried + int(self._bodies[lost])
                    continue
                self._require_page(segment, past - 1)
                if end > size:
                    self._carried, self._carried_lsn = bytes(view[position:size]), lsn
                    seen = size
                    break
            if prev != previous and previous is not None:
                raise self._damage(lsn, f"it names {format_lsn(prev)} as the record before it")
            body_crc = checksum(view[position + _HEADER : end])
            if checksum(view[position : position + _CRC_AT], body_crc) != crc:
                raise self._damage(lsn, "the record does not match its CRC")
            if self._aborted is not None:
                self._check_overwrite(manager, info, view[position:end], lsn)
            records += 1
            previous, seen = lsn, end
            if manager == _XLOG and info & _OPERATION == _SWITCH:
                position = size
                continue
            if manager == _TABLESPACE and info & _OPERATION == _CREATE_TABLESPACE:
                self._created.append(_created_tablespace(bytes(view[position:end]), lsn))
            elif manager == _SMGR and info & _OPERATION == _CREATE_FORK:
                *relation, fork = _FORK.unpack_from(_main_data(bytes(view[position:end])))
                if fork == _INIT_FORK:
                    self._init_forks.append((relation[0], relation[1], relation[2]))
            elif manager == _DATABASE:
                self._see_database(info, _main_data(bytes(view[position:end])), Lsn(lsn))
            position = end + 7 & ~7

        self._records, self._previous = records, previous
        walked = slice(
            entered + (self._start >= segment.base), self._page_of(seen - 1 - carried) + 1
        )
        self._check_continuations(segment, walked, remaining, overwritten)
        if self._next == self._last and (position != stop or self._aborted is not None):
            raise self._damage(self._stop, "no record ends here, where the backup stopped")

    def _see_database(self, info: int, data: bytes, lsn: Lsn) -> None:
        """Remember copies of databases, and which of them lose their source."""
        if info & _OPERATION == _COPY_DATABASE:
            database, tablespace, source, source_tablespace = _DATABASE_COPY.unpack_from(data)
            copy = DatabaseCopy((source_tablespace, source), (tablespace, database), lsn)
            # A move removes its source before it says so, perhaps beyond the stop LSN.
            (self._lost if source == database else self._copies).append(copy)
        elif info & _OPERATION == _DROP_DATABASE:
            database, count = _DATABASE_DROP.unpack_from(data)
            places = struct.unpack_from(f"<{count}I", data, _DATABASE_DROP.size)
            gone = {(tablespace, database) for tablespace in places}
            self._lost += [copy for copy in self._copies if copy.source in gone]
            self._copies = [copy for copy in self._copies if copy.source not in gone]

    def _stream(self, data: Buffer) -> bytearray:
        """What is carried over, then the bodies of the segment's pages, then a header's length.

        The zeroes at the end let a record's header be unpacked where the segment cuts it.
        """
        carried = len(self._carried)
        stream = bytearray(carried + self._usable + _HEADER)
        stream[:carried] = self._carried
        stream[carried : carried + _FIRST_BODY] = data[_LONG_HEADER:PAGE_SIZE]
        others = np.frombuffer(stream, np.uint8)[carried + _FIRST_BODY : carried + self._usable]
        pages = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        others.reshape(-1, _BODY)[:] = pages[1:, _SHORT_HEADER:]
        return stream

    @staticmethod
    def _page_of(position: int) -> int:
        """Page whose body holds this position of a segment's stream."""
        return (position + _LONGER) // _BODY

    def _position(self, offset: int) -> int:
        """Position in the stream of a byte offset of the segment; a header counts as its end."""
        page, inside = divmod(offset, PAGE_SIZE)
        if page == len(self._bodies):
            return self._usable
        header = _SHORT_HEADER if page else _LONG_HEADER
        return int(self._bodies[page]) + max(inside - header, 0)

    @staticmethod
    def _overwritten_page(segment: _Segment, first: int, past: int) -> int | None:
        """The page that says, of a record reaching into pages `first` to `past`, that it is lost.

        The server crashed before it had written all of the record, and went on at that page.
        """
        info = segment.headers["info"][first : min(past, segment.sound)]
        lost = np.flatnonzero(info & np.uint16(_IS_OVERWRITE))
        return first + int(lost[0]) if lost.size else None

    def _check_overwrite(self, manager: int, info: int, record: memoryview, lsn: int) -> None:
        """The record after a lost one must name that one; otherwise a flag was damaged."""
        data = _main_data(bytes(record))
        if (manager, info & _OPERATION) != (_XLOG, _OVERWRITE_CONTRECORD) or (
            _LSN.unpack_from(data) != (self._aborted,)
        ):
            raise self._damage(lsn, "the record before it was cut short, and it does not say so")
        self._aborted = None

    def _check_continuations(
        self,
        segment: _Segment,
        walked: slice,
        remaining: NDArray[np.int64],
        overwritten: NDArray[np.bool_],
    ) -> None:
        """What the page headers say of records that reach into them must be what was seen."""
        flags = np.where(remaining > 0, _IS_CONTINUATION, 0)
        flags |= np.where(overwritten, _IS_OVERWRITE, 0)
        stated = segment.headers["info"] & np.uint16(_IS_CONTINUATION | _IS_OVERWRITE)
        wrong = (stated != flags) | (segment.headers["remaining"] != remaining)
        pages = np.flatnonzero(wrong[walked])
        if pages.size:
            page = walked.start + int(pages[0])
            raise self._damage(
                segment.base + page * PAGE_SIZE,
                f"the page says that {int(segment.headers['remaining'][page])} bytes of an "
                f"earlier record are to come, and {int(remaining[page])} are",
            )

    def _damage(self, lsn: int, reason: str) -> SourceError:
        return SourceError(
            f"WAL segment {self._name} is damaged at {format_lsn(lsn)}: {reason}", hint=_HINT
        )


def _main_data(record: bytes) -> bytes:
    """The main data of a record without block references; empty when it has none."""
    at = _HEADER
    while at < len(record):
        match record[at]:
            case 255:  # short: one byte of length
                return record[at + 2 : at + 2 + record[at + 1]]
            case 254:  # long: four bytes of length, at the record's end
                return record[at + 5 :]
            case 253:  # replication origin
                at += 3
            case 252:  # top-level transaction
                at += 5
            case _:
                break
    return b""


def _created_tablespace(record: bytes, lsn: int) -> CreatedTablespace:
    data = _main_data(record)
    (oid,) = _OID.unpack_from(data)
    path = data[_OID.size :].split(b"\0", 1)[0]
    return CreatedTablespace(oid, os.fsdecode(path), Lsn(lsn))
