"""Page maps against a naive model: a dictionary of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.delta import EXTENT, ZERO_FRAME, PageMap, expand, to_extents, zero_refs
from tests.unit.strategies import block_refs, quick, refs_of

Blocks = tuple[list[int], list[tuple[int, int, int]]]


def extents_of(drawn: Blocks) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    blocks, triples = drawn
    extents: np.ndarray[tuple[int], np.dtype[np.void]] = to_extents(
        np.array(blocks, np.uint32), refs_of(triples)
    )
    return extents


@quick(200)
@given(block_refs())
def test_expand_is_the_inverse_of_to_extents(drawn: Blocks) -> None:
    blocks, triples = drawn
    numbers, refs = expand(extents_of(drawn))
    assert numbers.tolist() == blocks
    assert refs.tolist() == triples


@quick(200)
@given(block_refs())
def test_extents_are_as_few_as_can_be(drawn: Blocks) -> None:
    blocks, triples = drawn
    breaks = 0
    for at in range(1, len(blocks)):
        (pack, frame, slot), (pack0, frame0, slot0) = triples[at], triples[at - 1]
        follows = slot == slot0 + 1 or frame == ZERO_FRAME
        joined = (pack, frame) == (pack0, frame0) and follows and blocks[at] == blocks[at - 1] + 1
        breaks += not joined
    assert len(extents_of(drawn)) == breaks + bool(blocks)


def test_a_whole_segment_of_zero_pages_is_one_extent() -> None:
    count = 131072
    extents = to_extents(np.arange(count, dtype=np.uint32), zero_refs(count))
    assert extents.tolist() == [(0, count, 0, ZERO_FRAME, 0)]
    assert expand(extents)[1].tolist() == zero_refs(count).tolist()


def test_the_last_block_number_is_kept() -> None:
    blocks = np.array([0xFFFFFFFD, 0xFFFFFFFE], np.uint32)
    extents = to_extents(blocks, refs_of([(1, 2, 30), (1, 2, 31)]))
    assert extents.tolist() == [(0xFFFFFFFD, 2, 1, 2, 30)]
    assert expand(extents)[0].tolist() == blocks.tolist()


@quick(200)
@given(st.lists(st.tuples(st.integers(0, 60), block_refs()), max_size=6))
def test_overlay_is_a_dictionary_cut_and_updated(layers: list[tuple[int, Blocks]]) -> None:
    folded, model, length = PageMap.empty(), dict[int, tuple[tuple[int, int, int], int]](), 0
    for origin, (blocks, drawn) in enumerate(layers):
        expected = {block: value for block, value in model.items() if block < blocks}
        expected.update({b: (triple, origin) for b, triple in zip(*drawn, strict=True)})
        extents = extents_of(drawn)
        if sorted(expected) != list(range(blocks)):
            with pytest.raises(ValueError, match="block"):
                folded.overlay(extents, blocks, origin)
            continue
        folded = folded.overlay(extents, blocks, origin)
        model, length = expected, blocks
        assert len(folded.refs) == len(folded.origin) == length
        assert [
            (tuple(ref), member)
            for ref, member in zip(folded.refs.tolist(), folded.origin.tolist(), strict=True)
        ] == [model[block] for block in range(length)]


def one(block: int, count: int, frame: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.array([(block, count, 0, frame, 0)], EXTENT)


def test_what_was_cut_off_does_not_come_back_when_the_file_grows_again() -> None:
    full = PageMap.empty().overlay(one(0, 4, 1), 4, 0)
    short = full.overlay(np.empty(0, EXTENT), 1, 1)
    with pytest.raises(ValueError, match="no bytes are stored for block 1"):
        short.overlay(one(3, 1, 2), 4, 2)
    grown = short.overlay(one(1, 3, 2), 4, 2)
    assert grown.origin.tolist() == [0, 2, 2, 2]
    assert grown.refs["frame"].tolist() == [1, 2, 2, 2]


def test_a_block_beyond_the_file_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the file's 2 blocks"):
        PageMap.empty().overlay(one(0, 3, 1), 2, 0)


def test_an_overlay_leaves_the_map_below_alone() -> None:
    below = PageMap.empty().overlay(one(0, 2, 1), 2, 0)
    below.overlay(one(0, 2, 9), 2, 1)
    assert below.refs["frame"].tolist() == [1, 1]
    assert below.origin.tolist() == [0, 0]
