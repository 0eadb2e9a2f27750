"""What a caller gives to be stored, told apart from the store that it is given to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dbmodule.ports import Buffer


class Source:
    """The caller's chunks; remembers whether it was they that failed, and how long they were."""

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks = chunks
        self.failed = False
        self.size = 0

    def __iter__(self) -> Iterator[Buffer]:
        self.failed = True
        for chunk in self._chunks:
            self.failed = False
            self.size += memoryview(chunk).nbytes
            yield chunk
            self.failed = True
        self.failed = False
