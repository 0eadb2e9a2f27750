"""WAL names, histories, and the walk over WAL that a small writer of our own lays out."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import SourceError
from dbmodule.ident import Lsn, Timeline
from dbmodule.wal import (
    Buffer,
    CreatedTablespace,
    DatabaseCopy,
    WalSummary,
    check_segments,
    history_name,
    lies_on_history,
    parse_history,
    parse_segment_name,
    segment_name,
    segment_of,
    segments_between,
)

SIZE = 1 << 20
PAGE = 8192
SYSTEM = 7_123_456_789_012_345_678
START = 5 * SIZE + 40


@dataclass
class WalWriter:
    """Appends records, headers in between, as the server does; starts a segment at `START`."""

    timeline: int = 1
    magic: int = 0xD118
    data: bytearray = field(default_factory=bytearray)
    previous: int = 0
    aborted: int = 0
    starts: list[int] = field(default_factory=list)

    @property
    def lsn(self) -> int:
        return 5 * SIZE + len(self.data)

    def page(self, remaining: int = 0, flags: int = 0) -> None:
        """The header of the page that starts here."""
        first = self.lsn % SIZE == 0
        flags |= 2 * first | (remaining > 0)
        self.data += struct.pack(
            "<HHIQII", self.magic, flags, self.timeline, self.lsn, remaining, 0
        )
        if first:
            self.data += struct.pack("<QII", SYSTEM, SIZE, PAGE)

    def put(self, data: bytes, cut: int | None = None) -> None:
        """Bytes of one record; with `cut`, the crash comes when the next page is due."""
        left = len(data)
        while left:
            if len(self.data) % PAGE == 0:
                if cut is not None and left != len(data):
                    return
                self.page(0 if left == len(data) else left)
            room = min(left, PAGE - len(self.data) % PAGE)
            self.data += data[len(data) - left :][:room]
            left -= room

    def record(
        self, body: bytes = b"", manager: int = 10, info: int = 0, *, cut: bool = False
    ) -> int:
        """A record and its padding; gives the LSN where it ends."""
        if len(self.data) % PAGE == 0:
            self.page()
        start = self.lsn
        head = struct.pack("<IIQBB2x", 24 + len(body), 7, self.previous, info, manager)
        self.put(head + struct.pack("<I", crc32c(head, crc32c(body))) + body, cut or None)
        if not cut:
            self.previous = start
            self.starts.append(start)
            self.data += bytes(-len(self.data) % 8)
        return self.lsn

    def main_data(self, data: bytes, manager: int, info: int) -> int:
        return self.record(bytes([255, len(data)]) + data, manager, info)

    def switch(self) -> int:
        self.record(manager=0, info=0x40)
        self.data += bytes(-len(self.data) % SIZE)
        return self.lsn

    def after_crash(self) -> int:
        """Go on at the page that the cut record could not reach."""
        lost = self.aborted
        self.page(flags=8)
        return self.main_data(struct.pack("<QQ", lost, 0), 0, 0xD0)

    def cut_record(self, body: bytes) -> None:
        self.aborted = self.lsn
        self.record(body, cut=True)

    def segments(self) -> list[tuple[str, bytes]]:
        data = bytes(self.data) + bytes(-len(self.data) % SIZE)
        return [
            (segment_name(self.timeline, 5 + at // SIZE, SIZE), data[at : at + SIZE])
            for at in range(0, len(data), SIZE)
        ]


def check(
    segments: Iterable[tuple[str, Buffer]], stop: int, start: int = START, timeline: int = 1
) -> WalSummary:
    return check_segments(
        segments,
        major=18,
        system_identifier=SYSTEM,
        timeline=timeline,
        segment_size=SIZE,
        start_lsn=start,
        stop_lsn=stop,
    )


def written(*lengths: int) -> tuple[WalWriter, int]:
    wal = WalWriter()
    stop = START
    for length in lengths:
        stop = wal.record(bytes(range(256)) * (length // 256 + 1))
    return wal, stop


@pytest.mark.parametrize(
    ("timeline", "number", "size", "name"),
    [
        (1, 1, 1 << 24, "000000010000000000000001"),
        (1, 256, 1 << 24, "000000010000000100000000"),
        (0x1F, 0x1234, 1 << 24, "0000001F0000001200000034"),
        (2, 4, 1 << 30, "000000020000000100000000"),
        (1, 0xFFF, 1 << 20, "000000010000000000000FFF"),
    ],
)
def test_segment_names(timeline: int, number: int, size: int, name: str) -> None:
    assert segment_name(timeline, number, size) == name
    assert parse_segment_name(name, size) == (timeline, number)


@given(
    st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(20, 30).map(lambda n: 1 << n)
)
def test_segment_names_are_read_back(timeline: int, lsn: int, size: int) -> None:
    number = segment_of(lsn, size)
    assert parse_segment_name(segment_name(timeline, number, size), size) == (timeline, number)


@pytest.mark.parametrize(
    "name",
    ["", "00000001000000000000001", "000000010000000000000100", "00000001000000000000000g",
     "000000010000000000000001.partial", "000000000000000000000001", "00000002.history"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="not the name"):
        parse_segment_name(name, 1 << 24)


def test_a_stop_on_a_boundary_belongs_to_the_segment_before() -> None:
    size = 1 << 24
    assert segments_between(1, size + 40, 2 * size, size) == [segment_name(1, 1, size)]
    assert len(segments_between(1, size + 40, 2 * size + 1, size)) == 2
    assert segments_between(3, 255 * size, 257 * size, size) == [
        "0000000300000000000000FF",
        "000000030000000100000000",
    ]


def test_histories() -> None:
    text = "1\t0/3000000\tno recovery target specified\n\n# note\n 2 1/A0 x\n"
    history = parse_history(text)
    assert history == [(1, 0x3000000), (2, 0x1_0000_00A0)]
    assert history_name(26) == "0000001A.history"
    assert parse_history("") == []


@pytest.mark.parametrize("text", ["1", "x\t0/1\ty", "1\t0-1", "2\t0/1\n1\t0/2", "1\t0/1\n1\t0/2"])
def test_bad_histories_are_refused(text: str) -> None:
    with pytest.raises(SourceError, match="history"):
        parse_history(text)


def test_what_lies_on_a_history() -> None:
    history = [(Timeline(1), Lsn(100)), (Timeline(3), Lsn(200))]
    assert lies_on_history(4, 10**9, 4, history)
    assert lies_on_history(1, 100, 4, history)
    assert not lies_on_history(1, 101, 4, history)
    assert lies_on_history(3, 150, 4, history)
    assert not lies_on_history(2, 1, 4, history)
    assert not lies_on_history(5, 1, 4, history)


@given(st.lists(st.integers(0, 30_000) | st.integers(0, 200), min_size=1, max_size=60))
def test_records_of_any_length_are_walked(lengths: list[int]) -> None:
    wal = WalWriter()
    for length in lengths:
        wal.record(bytes(length))
    stop = wal.lsn
    wal.record(b"not part of the range")
    summary = check(wal.segments()[: (stop - 1) // SIZE - 4], stop)
    assert summary == WalSummary(len(lengths), Lsn(stop), [])


def test_a_record_may_span_whole_segments() -> None:
    wal = WalWriter()
    wal.record(b"x" * 100)
    wal.record(bytes(3 * SIZE))
    stop = wal.record(b"y")
    assert len(wal.segments()) == 4
    assert check(wal.segments(), stop).records == 3


def test_every_record_is_a_place_to_start_and_to_stop() -> None:
    wal, _ = written(*([3000] * 700))
    starts = wal.starts
    for at in range(0, len(starts) - 40, 97):
        start, stop = starts[at], starts[at + 37]
        wanted = segments_between(1, start, stop, SIZE)
        segments = [item for item in wal.segments() if item[0] in wanted]
        assert check(segments, stop, start).records == 37


def test_a_record_may_end_with_its_page_and_its_segment() -> None:
    wal = WalWriter()
    wal.record(bytes(PAGE - 40 - 24))
    assert wal.lsn % PAGE == 0
    assert check(wal.segments(), wal.lsn).records == 1
    wal.record(bytes(SIZE - PAGE - 127 * 24 - 24))
    assert wal.lsn == 6 * SIZE
    assert check(wal.segments(), 6 * SIZE).records == 2
    stop = wal.record(b"z")
    assert check(wal.segments(), stop).records == 3


def test_a_segments_rest_after_a_switch_is_passed_over() -> None:
    wal, _ = written(100, 9000)
    boundary = wal.switch()
    stop = wal.record(b"next")
    assert check(wal.segments()[:1], boundary).records == 3
    assert check(wal.segments(), stop).records == 4


@pytest.mark.parametrize("before", [10, PAGE - 40 - 24 - 8, 5000])
@pytest.mark.parametrize("length", [PAGE, 3 * PAGE])
def test_a_record_cut_by_a_crash_is_passed_over(before: int, length: int) -> None:
    wal = WalWriter()
    wal.record(bytes(before))
    wal.cut_record(bytes(length))
    wal.after_crash()
    stop = wal.record(b"after")
    assert check(wal.segments(), stop).records == 3


def test_a_record_cut_at_a_segments_end_is_passed_over() -> None:
    wal = WalWriter()
    wal.record(bytes(SIZE - PAGE - 126 * 24))
    wal.cut_record(bytes(2 * PAGE))
    assert wal.lsn == 6 * SIZE
    wal.after_crash()
    stop = wal.record(b"after")
    assert check(wal.segments(), stop).records == 3


def test_a_cut_record_must_be_named_by_the_next_one() -> None:
    wal = WalWriter()
    wal.record(bytes(10))
    wal.cut_record(bytes(PAGE))
    wal.aborted += 8
    wal.after_crash()
    with pytest.raises(SourceError, match="cut short"):
        check(wal.segments(), wal.record())


def test_created_tablespaces_are_listed() -> None:
    wal = WalWriter()
    first, second = wal.lsn + 40, 0
    wal.main_data(struct.pack("<I", 16400) + b"/srv/fast\0", 5, 0)
    second = wal.lsn
    wal.main_data(struct.pack("<I", 16401) + b"\0", 5, 1)
    stop = wal.main_data(struct.pack("<I", 16400), 5, 0x10)
    assert check(wal.segments(), stop).created_tablespaces == [
        CreatedTablespace(16400, "/srv/fast", Lsn(first)),
        CreatedTablespace(16401, "", Lsn(second)),
    ]


def test_copies_of_databases_that_lose_their_source_are_listed() -> None:
    wal = WalWriter()
    copied = wal.lsn + 40
    wal.main_data(struct.pack("<IIII", 20, 1663, 16, 1664), 4, 0)
    wal.main_data(struct.pack("<IIII", 21, 1663, 4, 1663), 4, 0)  # its source stays
    moved = wal.lsn
    wal.main_data(struct.pack("<IIII", 30, 1665, 30, 1663), 4, 0)
    wal.main_data(struct.pack("<II", 22, 1663), 4, 0x10)  # through WAL: needs no source
    stop = wal.main_data(struct.pack("<IIII", 16, 2, 1663, 1664), 4, 0x20)
    assert check(wal.segments(), stop).lost_copies == (
        DatabaseCopy((1663, 30), (1665, 30), Lsn(moved)),
        DatabaseCopy((1664, 16), (1663, 20), Lsn(copied)),
    )


def test_init_forks_that_are_created_are_listed() -> None:
    wal = WalWriter()
    wal.main_data(struct.pack("<IIIi", 1663, 5, 16400, 0), 2, 0x10)
    wal.main_data(struct.pack("<IIIi", 1663, 5, 16401, 3), 2, 0x10)
    stop = wal.main_data(struct.pack("<IIIIi", 7, 1663, 5, 16402, 3), 2, 0x20)  # a truncation
    assert check(wal.segments(), stop).init_forks == ((1663, 5, 16401),)


@given(st.data())
def test_any_damaged_word_is_found(data: st.DataObject) -> None:
    wal, stop = written(*([200, 20_000] * 70))
    assert len(wal.segments()) == 2
    segments = [(name, bytearray(content)) for name, content in wal.segments()]
    word = data.draw(st.integers(START // 8, stop // 8 - 1)) * 8
    mask = data.draw(st.sampled_from([1, 2, 16, 128]))
    _, content = segments[word // SIZE - 5]
    for at in range(word % SIZE, word % SIZE + 8):
        content[at] ^= mask
    with pytest.raises(SourceError, match="WAL segment") as caught:
        check([(name, bytes(content)) for name, content in segments], stop)
    assert caught.value.hint


def test_missing_and_misplaced_segments_are_found() -> None:
    wal, stop = written(*([20_000] * 200))
    segments = wal.segments()
    assert check(segments, stop).records == 200
    views = [(name, memoryview(bytearray(content))) for name, content in segments]
    assert check(views, stop).records == 200
    with pytest.raises(SourceError, match=f"{segments[-1][0]} is missing"):
        check(segments[:-1], stop)
    with pytest.raises(SourceError, match=f"{segments[1][0]} expected"):
        check([segments[0], *segments[2:]], stop)
    with pytest.raises(SourceError, match="no more expected"):
        check([*segments, (segment_name(1, 5 + len(segments), SIZE), bytes(SIZE))], stop)
    with pytest.raises(SourceError, match="bytes instead of"):
        check([segments[0], (segments[1][0], segments[1][1][:-1]), *segments[2:]], stop)
    with pytest.raises(SourceError, match="bad page header"):
        check([segments[0], (segments[1][0], segments[2][1]), *segments[2:]], stop)


def test_another_clusters_wal_is_found() -> None:
    wal, stop = written(100)
    options = {"major": 18, "system_identifier": SYSTEM, "timeline": 1, "segment_size": SIZE}
    for changed, reason in [
        ({"system_identifier": SYSTEM + 1}, "belongs to the cluster"),
        ({"major": 17}, "expected D116"),
        ({"major": 14}, "not known"),
        ({"timeline": 2}, "expected, not"),
        ({"segment_size": 2 * SIZE}, "expected, not"),
    ]:
        with pytest.raises(SourceError, match=reason):
            check_segments(wal.segments(), start_lsn=START, stop_lsn=stop, **(options | changed))


def test_a_promoted_servers_first_page_may_be_its_parents() -> None:
    wal, _ = written(100, 100)
    wal.timeline = 2
    start = wal.lsn
    wal.record(bytes(20_000))
    stop = wal.record(b"x")
    assert check(wal.segments(), stop, start, timeline=2).records == 2
    wal.timeline = 1
    late = wal.record(bytes(20_000))
    wal.timeline = 2
    with pytest.raises(SourceError, match="timeline 1"):
        check(wal.segments(), late, start, timeline=2)


@pytest.mark.parametrize("offset", [-8, 8, 16, 2000])
def test_the_stop_must_be_the_end_of_a_record(offset: int) -> None:
    wal, stop = written(100, 1000)
    wal.record(bytes(5000))
    with pytest.raises(SourceError, match=r"no record ends here|bytes"):
        check(wal.segments(), stop + offset)


def test_a_range_must_not_be_empty() -> None:
    with pytest.raises(SourceError, match="no WAL between"):
        check([], START)


def test_stale_records_of_a_recycled_segment_are_found() -> None:
    wal, middle = written(100, 100)
    stop = wal.record(b"stale")
    data = bytearray(wal.segments()[0][1])
    other = WalWriter()
    other.record(bytes(356))
    other.previous = 4711
    other.record(bytes(356))
    stale = bytes(other.data)[other.starts[1] - 5 * SIZE :]
    at = wal.starts[1] - 5 * SIZE
    data[at : at + len(stale)] = stale
    with pytest.raises(SourceError, match="as the record before it"):
        check([(wal.segments()[0][0], bytes(data))], stop)
    assert middle < stop
