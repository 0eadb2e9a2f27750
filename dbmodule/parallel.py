"""Work on many files with several threads, in order, within a bound of what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

BATCH_BYTES = 8 << 20
BATCH_FILES = 256


def batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Items grouped so that one task is worth a thread's while; `size_of` gives bytes."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH_BYTES or len(batch) >= BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_order(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, name: str
) -> Generator[tuple[T, R], None, None]:
    """Each item with the result of `function`, in the order of `items`.

    At most twice as many items as `threads` are under way. When the function fails, or the caller
    closes the generator (as it must when it stops early), those that have not begun are dropped
    and the others waited for.
    """
    waiting = iter(items)
    window: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        try:
            for item in waiting:
                window.append((item, pool.submit(function, item)))
                if len(window) == 2 * threads:
                    first, future = window.popleft()
                    yield first, future.result()
            for first, future in window:
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
