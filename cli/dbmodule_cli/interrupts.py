"""SIGINT and SIGTERM: the first asks for an orderly stop, the second exits at once.

Until a command calls `defer`, the first signal raises `KeyboardInterrupt` where the main thread
stands. After it, the signal only sets a flag that the library asks for between units of work, so
that a backup or restore stops at a point whose state is known and can be named.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_STDERR = 2


class Interrupts:
    """What the signals of this run have asked for so far."""

    def __init__(self, last_words: Callable[[signal.Signals], None]) -> None:
        """`last_words` is called before the exit that the second signal brings about: from a
        signal handler, so it writes to file descriptors only.
        """
        self.received: signal.Signals | None = None
        self._last_words = last_words
        self._stop: Callable[[], None] | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle both signals inside the block."""
        previous = [(n, signal.signal(n, self._handle)) for n in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in previous:
                signal.signal(number, handler)

    def requested(self) -> bool:
        """Has a stop been asked for? This is the library's `Cancelled`."""
        return self.received is not None

    def defer(self, stop: Callable[[], None] = lambda: None) -> None:
        """From now on the first signal sets the flag and calls `stop`, and raises nothing."""
        self._stop = stop

    @property
    def exit_code(self) -> int:
        """130 or 143, as a shell reports them; SIGINT where no signal was seen."""
        return 128 + (self.received or signal.SIGINT)

    @property
    def word(self) -> str:
        return "terminated" if self.received == signal.SIGTERM else "interrupted"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._last_words(signal.Signals(number))
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if self._stop is None:
            raise KeyboardInterrupt
        os.write(_STDERR, b"\nstopping in an orderly way; once more to exit at once\n")
        self._stop()
