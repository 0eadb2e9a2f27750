"""Page vectors against scalar references, on pages of every shape."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dbmodule import kernel, page
from dbmodule.ident import PAGE_SIZE

SEEDS = [int(seed) for seed in page._LANE_SEEDS]


def scalar_checksum(data: bytes, block: int) -> int:
    """One page, one lane at a time, as the server's C source reads."""
    page_bytes = bytearray(data)
    page_bytes[8:10] = b"\0\0"
    folded = 0
    for lane in range(32):
        total = SEEDS[lane]
        words = [
            int.from_bytes(page_bytes[at : at + 4], "little")
            for at in range(4 * lane, PAGE_SIZE, 128)
        ]
        for word in [*words, 0, 0]:
            mixed = total ^ word
            total = (mixed * 16777619 & 0xFFFFFFFF) ^ (mixed >> 17)
        folded ^= total
    return (folded ^ block) % 65535 + 1


def make_page(
    *,
    lsn: int = 0x1_0000_2345,
    flags: int = 0,
    lower: int = 28,
    upper: int = 8000,
    special: int = 8192,
    version: int = 0x2004,
    filler: int = 0x5A,
) -> bytearray:
    header = np.zeros(1, dtype=page.PAGE_HEADER)
    header["xlogid"], header["xrecoff"] = lsn >> 32, lsn & 0xFFFFFFFF
    header["flags"], header["lower"], header["upper"] = flags, lower, upper
    header["special"], header["pagesize_version"] = special, version
    return bytearray((header.tobytes() + bytes([filler]) * PAGE_SIZE)[:PAGE_SIZE])


def sealed(pages: list[bytearray], first_block: int) -> bytearray:
    """The pages in one buffer, each with the checksum of its block number."""
    buffer = bytearray(b"".join(pages))
    view = page.headers(buffer)
    view["checksum"] = page.compute_checksums(buffer, first_block)
    return buffer


def random_pages(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_SIZE)


def test_header_is_24_packed_bytes() -> None:
    assert page.PAGE_HEADER.itemsize == 24


def test_headers_view_the_buffer_without_copying() -> None:
    buffer = bytearray(b"".join([make_page(lsn=7), make_page(lsn=0xABC_0000_0010)]))
    view = page.headers(buffer)
    assert view.shape == (2,)
    assert np.shares_memory(view, np.frombuffer(buffer, dtype=np.uint8))
    assert page.lsns(view).tolist() == [7, 0xABC_0000_0010]
    assert page.lsns(view).dtype == np.uint64


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_lsns_are_read_back(values: list[int]) -> None:
    buffer = b"".join(bytes(make_page(lsn=value)) for value in values)
    assert page.lsns(page.headers(buffer)).tolist() == values


@pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_partial_pages_are_refused(size: int) -> None:
    for function in (page.headers, page.all_zero):
        with pytest.raises(ValueError, match="whole pages"):
            function(bytes(size))
    with pytest.raises(ValueError, match="whole pages"):
        page.compute_checksums(bytes(size), 0)


def test_no_pages_give_empty_vectors() -> None:
    assert page.headers(b"").shape == (0,)
    assert page.all_zero(b"").shape == (0,)
    assert page.compute_checksums_numpy(b"", 0).shape == (0,)
    assert page.compute_checksums(b"", 0).shape == (0,)
    assert page.checksum_failures(b"", 0).shape == (0,)


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"flags": 7}, True),
        ({"flags": 8}, False),
        ({"version": 0x2003}, False),
        ({"version": 0x4004}, False),
        ({"lower": 24, "upper": 24, "special": 24}, True),
        ({"lower": 23}, False),
        ({"lower": 8001}, False),
        ({"upper": 8192, "special": 8192}, True),
        ({"upper": 8185, "special": 8184}, False),
        ({"special": 8193}, False),
        ({"lower": 0, "upper": 0, "special": 0, "version": 0}, False),
    ],
)
def test_looks_valid(fields: dict[str, int], valid: bool) -> None:
    assert page.looks_valid(page.headers(make_page(**fields))).tolist() == [valid]


@given(st.integers(0, PAGE_SIZE - 1), st.integers(1, 255))
def test_a_single_byte_makes_a_page_non_zero(position: int, value: int) -> None:
    buffer = bytearray(3 * PAGE_SIZE)
    buffer[PAGE_SIZE + position] = value
    assert page.all_zero(buffer).tolist() == [True, False, True]
    assert page.checksum_failures(buffer, 0).tolist() == ([1] if value else [])


@given(st.integers(0, 2**32 - 3), st.integers(0, 2**32 - 1))
def test_checksums_are_the_servers(first_block: int, seed: int) -> None:
    buffer = random_pages(2, seed)
    expected = [
        scalar_checksum(buffer[:PAGE_SIZE], first_block),
        scalar_checksum(buffer[PAGE_SIZE:], first_block + 1),
    ]
    assert page.compute_checksums_numpy(buffer, first_block).tolist() == expected
    assert page.compute_checksums(buffer, first_block).tolist() == expected


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_batches_join_without_a_seam(count: int) -> None:
    buffer = random_pages(count, count)
    together = page.compute_checksums_numpy(buffer, 131072)
    singly = [
        int(page.compute_checksums_numpy(buffer[at : at + PAGE_SIZE], 131072 + at // PAGE_SIZE)[0])
        for at in range(0, len(buffer), PAGE_SIZE)
    ]
    assert together.tolist() == singly


def test_the_stored_checksum_does_not_count_and_the_buffer_is_not_touched() -> None:
    buffer = bytearray(random_pages(2, 1))
    before = page.compute_checksums(buffer, 9)
    buffer[8:10] = b"\xff\xff"
    copy = bytes(buffer)
    assert (page.compute_checksums(buffer, 9) == before).all()
    assert (page.compute_checksums_numpy(buffer, 9) == before).all()
    assert buffer == copy


def test_read_only_and_misaligned_buffers() -> None:
    data = random_pages(2, 3)
    shifted = memoryview(b"x" + data)[1:]
    expected = page.compute_checksums_numpy(data, 0).tolist()
    assert page.compute_checksums_numpy(shifted, 0).tolist() == expected
    assert page.compute_checksums(shifted, 0).tolist() == expected
    assert page.lsns(page.headers(shifted)).tolist() == page.lsns(page.headers(data)).tolist()


@given(st.integers(0, 2**32 - 5), st.integers(0, 3), st.integers(0, PAGE_SIZE * 8 - 1))
def test_exactly_the_page_with_a_flipped_bit_fails(first: int, victim: int, bit: int) -> None:
    buffer = sealed([make_page(lsn=n, filler=n) for n in range(1, 5)], first)
    assert page.checksum_failures(buffer, first).size == 0
    buffer[victim * PAGE_SIZE + bit // 8] ^= 1 << bit % 8
    assert page.checksum_failures(buffer, first).tolist() == [victim]


def test_scattered_pages_have_block_numbers_of_their_own() -> None:
    buffer = random_pages(5, 11)
    blocks = np.array([7, 3, 131072, 2**32 - 1, 0], dtype=np.uint32)
    singly = [
        int(page.compute_checksums(buffer[at * PAGE_SIZE : (at + 1) * PAGE_SIZE], int(block))[0])
        for at, block in enumerate(blocks)
    ]
    assert page.compute_checksums(buffer, blocks).tolist() == singly
    assert page.compute_checksums_numpy(buffer, blocks).tolist() == singly


def test_a_page_of_another_block_fails() -> None:
    buffer = sealed([make_page(), make_page(filler=0x11)], 0)
    assert page.checksum_failures(buffer, 131072).tolist() == [0, 1]


def test_new_pages_pass_and_pages_that_pose_as_new_fail() -> None:
    posing = make_page(upper=0, lower=0)
    buffer = sealed([bytearray(PAGE_SIZE), posing, make_page()], 0)
    buffer[:PAGE_SIZE] = bytes(PAGE_SIZE)
    assert page.checksum_failures(buffer, 0).tolist() == [1]


@pytest.mark.parametrize("function", [page.compute_checksums, page.compute_checksums_numpy])
def test_threads_may_share_a_buffer(function: object) -> None:
    assert callable(function)
    buffer = random_pages(256, 4)
    expected = page.compute_checksums_numpy(buffer, 0)
    results: list[NDArray[np.uint16]] = []
    threads = [
        threading.Thread(target=lambda: results.append(function(buffer, 0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all((result == expected).all() for result in results)


def test_the_twin_serves_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", False)
    buffer = random_pages(1, 5)
    assert page.compute_checksums(buffer, 1).tolist() == [scalar_checksum(buffer, 1)]
