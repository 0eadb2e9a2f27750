"""Which pages changed: the vectors against a rule that looks at one page at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.detect import compare_hashes, compare_marks, observe
from dbmodule.ident import PAGE_SIZE, Lsn
from dbmodule.registry import HASH, MARK, UNKNOWN_LSN
from tests.unit.strategies import WAL_SEGMENT, quick, relation_page

START = Lsn(0x5000028)
ZERO = bytes(PAGE_SIZE)


@dataclass(frozen=True)
class Drawn:
    """A page as the test knows it."""

    data: bytes
    lsn: int
    checksum: int
    zero: bool = False
    header: bool = True


def drawn(lsn: int, checksum: int = 7) -> Drawn:
    return Drawn(relation_page(lsn, checksum), lsn, checksum)


NOTHING = Drawn(ZERO, 0, 0, zero=True)
lsns = st.sampled_from(
    [
        *(0, 1, WAL_SEGMENT - 1, WAL_SEGMENT, START - 1, START, START + 1),
        *(1 << 32, (1 << 40) + 5, UNKNOWN_LSN - 1, UNKNOWN_LSN),
    ]
)
pages = st.one_of(
    st.builds(drawn, lsns, st.integers(0, 3)),
    st.just(NOTHING),
    # Zero but for its last byte, and a header that no server would write.
    st.just(Drawn(ZERO[:-1] + b"\1", 0, 0, header=False)),
    st.builds(
        lambda lsn: Drawn(
            relation_page(lsn, 7)[:18] + b"\x04\x10" + relation_page(lsn, 7)[20:],
            lsn,
            7,
            header=False,
        ),
        lsns,
    ),
)
marks = st.tuples(lsns, st.integers(0, 3)) | st.just((0, 0)) | st.just((UNKNOWN_LSN, 7))


@quick(300)
@given(st.lists(pages, max_size=8), st.lists(marks, max_size=10), st.booleans())
def test_a_stretch_is_judged_page_by_page(
    stretch: list[Drawn], remembered: list[tuple[int, int]], alike: bool
) -> None:
    if alike:  # mostly equal marks, as in life
        remembered = [(p.lsn, p.checksum) for p in stretch][: len(remembered)]
    seen = observe(b"".join(p.data for p in stretch), WAL_SEGMENT)
    found = compare_marks(seen, np.array(remembered, MARK), START)
    for at, page in enumerate(stretch):
        odd = not page.zero and (not page.header or page.lsn < WAL_SEGMENT)
        assert seen.odd[at] == odd
        assert seen.zero[at] == page.zero
        assert seen.marks[at].tolist() == (page.lsn, page.checksum)
        known = at < len(remembered)
        equal = known and remembered[at] == (page.lsn, page.checksum)
        unchanged = equal and not odd and page.lsn < START
        assert found.changed[at] == (not unchanged)
        divergent = known and not equal and not odd and not page.zero and page.lsn < START
        assert found.divergent[at] == divergent


def changed(page: Drawn, mark: tuple[int, int], start: Lsn = START) -> bool:
    seen = observe(page.data, WAL_SEGMENT)
    return bool(compare_marks(seen, np.array([mark], MARK), start).changed[0])


def test_equal_and_older_than_the_baseline_is_the_only_proof() -> None:
    old, at_start = drawn(START - 1), drawn(START)
    assert not changed(old, (START - 1, 7))
    assert changed(old, (START - 1, 8))
    assert changed(old, (START - 2, 7))
    assert changed(at_start, (START, 7))  # may have been torn when the baseline read it


def test_a_page_that_was_corrupt_when_stored_is_never_unchanged() -> None:
    for start in (START, Lsn(UNKNOWN_LSN)):
        assert changed(drawn(START - 1), (UNKNOWN_LSN, 7), start)
        # Not even if a page really says so: no LSN lies below the highest.
        assert changed(drawn(UNKNOWN_LSN), (UNKNOWN_LSN, 7), start)


def test_a_zero_page_is_unchanged_only_if_it_was_zero() -> None:
    assert not changed(NOTHING, (0, 0))
    assert changed(NOTHING, (START - 1, 7))
    assert changed(drawn(START - 1), (0, 0))


def test_becoming_all_visible_is_a_change_of_the_same_lsn() -> None:
    visible = bytearray(drawn(START - 1).data)
    visible[10] ^= 4
    seen = observe(visible, WAL_SEGMENT)
    found = compare_marks(seen, np.array([(START - 1, 7)], MARK), START)
    assert found.changed[0]
    assert found.hints[0]
    assert not compare_marks(seen, seen.marks, START).changed[0]


def test_a_page_without_a_real_lsn_proves_nothing() -> None:
    for lsn in (0, 1, WAL_SEGMENT - 1):
        assert changed(drawn(lsn), (lsn, 7))
        assert observe(drawn(lsn).data, WAL_SEGMENT).odd.all()
        assert observe(drawn(lsn).data, WAL_SEGMENT).unlogged.all()
    assert not observe(drawn(WAL_SEGMENT).data, WAL_SEGMENT).odd.any()


def test_nothing_observed_is_nothing_changed() -> None:
    found = compare_marks(observe(b"", WAL_SEGMENT), np.zeros(5, MARK), START)
    assert found.changed.tolist() == found.divergent.tolist() == []


def test_half_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="not whole pages"):
        observe(bytes(PAGE_SIZE + 1), WAL_SEGMENT)


digests = st.binary(min_size=16, max_size=16) | st.sampled_from(
    [bytes(16), b"\0" * 15 + b"\1", b"\1" + bytes(15), b"\0" * 8 + b"\1" + bytes(7)]
)


@quick(200)
@given(st.lists(digests, max_size=8), st.lists(digests, max_size=8), st.booleans())
def test_hashes_are_compared_place_by_place(
    now: list[bytes], before: list[bytes], alike: bool
) -> None:
    if alike:
        before = now[: len(before)]
    found = compare_hashes(
        np.frombuffer(b"".join(now), HASH), np.frombuffer(b"".join(before), HASH)
    )
    expected = [at >= len(before) or digest != before[at] for at, digest in enumerate(now)]
    assert found.tolist() == expected


def test_hashes_may_lie_apart_in_memory() -> None:
    rows = np.zeros(4, np.dtype([("other", "<u4"), ("hash", HASH)]))
    rows["hash"][2] = b"x" * 16
    assert compare_hashes(rows["hash"], np.zeros(4, HASH)).tolist() == [False, False, True, False]
