"""The compiled kernel and its numpy twin give the same checksums; skipped where none is built."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule import kernel, page
from dbmodule.ident import PAGE_SIZE

built = pytest.mark.skipif(not kernel.available, reason="the kernel is not built here")


def test_the_name_says_which_one_is_in_use() -> None:
    assert kernel.name == ("c" if kernel.available else "numpy")


@built
@given(
    count=st.integers(0, 5),
    scattered=st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    shift=st.integers(0, 7),
)
def test_both_give_the_same(count: int, scattered: list[int], seed: int, shift: int) -> None:
    data = np.random.default_rng(seed).bytes(count * PAGE_SIZE + shift)
    pages = memoryview(data)[shift:]
    out = np.empty(count, dtype=np.uint16)
    blocks = np.array(scattered[:count], dtype=np.uint32)
    kernel.page_checksums(pages, blocks, out)
    assert (out == page.compute_checksums_numpy(pages, blocks)).all()


@built
@given(st.binary(min_size=64, max_size=64), st.integers(0, PAGE_SIZE - 64))
def test_both_give_the_same_on_sparse_pages(content: bytes, at: int) -> None:
    pages = bytearray(PAGE_SIZE)
    pages[at : at + 64] = content
    out = np.empty(1, dtype=np.uint16)
    kernel.page_checksums(pages, np.zeros(1, dtype=np.uint32), out)
    assert out.tolist() == page.compute_checksums_numpy(pages, 0).tolist()


@built
@pytest.mark.parametrize(
    ("size", "numbers", "elements"),
    [
        (PAGE_SIZE - 1, 0, 0),
        (PAGE_SIZE + 1, 1, 1),
        (PAGE_SIZE, 1, 0),
        (PAGE_SIZE, 0, 1),
        (PAGE_SIZE, 2, 1),
        (PAGE_SIZE, 1, 2),
        (0, 0, 1),
    ],
)
def test_sizes_must_agree(size: int, numbers: int, elements: int) -> None:
    blocks = np.zeros(numbers, dtype=np.uint32)
    with pytest.raises(ValueError, match="each whole page needs"):
        kernel.page_checksums(bytes(size), blocks, np.empty(elements, dtype=np.uint16))


@built
def test_the_result_must_be_writable() -> None:
    out = np.zeros(1, dtype=np.uint16)
    out.flags.writeable = False
    with pytest.raises((BufferError, TypeError, ValueError)):
        kernel.page_checksums(bytes(PAGE_SIZE), np.zeros(1, dtype=np.uint32), out)
