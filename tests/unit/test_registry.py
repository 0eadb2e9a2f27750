"""Folded fingerprints against a dictionary, and when an identity may be recorded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.registry import HASH, MARK, fold, settled
from tests.unit.strategies import quick

mark = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1))
layer = st.tuples(st.integers(0, 12), st.dictionaries(st.integers(0, 11), mark))


@quick(200)
@given(st.lists(layer, max_size=5))
def test_fold_is_a_dictionary_cut_and_updated(
    layers: list[tuple[int, dict[int, tuple[int, int]]]],
) -> None:
    folded, model = np.empty(0, MARK), dict[int, tuple[int, int]]()
    for blocks, drawn in layers:
        new = {block: value for block, value in drawn.items() if block < blocks}
        numbers = np.array(sorted(new), np.int64)
        values = np.array([new[n] for n in sorted(new)], MARK)
        folded = fold(folded, blocks, numbers, values)
        model = {block: value for block, value in model.items() if block < blocks} | new
        assert folded.dtype == MARK
        assert folded.tolist() == [model.get(block, (0, 0)) for block in range(blocks)]


def test_fold_leaves_its_base_alone_and_keeps_hashes() -> None:
    base = np.frombuffer(b"a" * 16 + b"b" * 16, HASH)
    new = np.frombuffer(b"\0" * 15 + b"c", HASH)
    folded = fold(base, 3, np.array([2]), new)
    assert folded.tobytes() == base.tobytes() + new.tobytes()
    assert base.tobytes() == b"a" * 16 + b"b" * 16


@pytest.mark.parametrize(("before", "expected"), [(2_000_000_000, True), (1_999_999_999, False)])
def test_an_identity_needs_two_quiet_seconds(before: int, expected: bool) -> None:
    called = 1_700_000_000_000_000_000
    assert settled(called - before, called) is expected
