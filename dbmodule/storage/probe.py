"""Does a store keep its word that of several writers of one name exactly one wins?

The commit of a backup rests on it, and there are servers that ignore the condition and say nothing.
"""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

from dbmodule.errors import ObjectExistsError, RepositoryError
from dbmodule.ports import ObjectStore

_WRITERS = 8


def check_exclusive(store: ObjectStore) -> None:
    """Let some threads race for a name that is removed again; raises `RepositoryError`."""
    name = f"probe/{secrets.token_hex(16)}"
    start = threading.Barrier(_WRITERS)

    def write(number: int) -> bool:
        start.wait()
        try:
            store.put_new(name, [b"%d" % number])
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(_WRITERS) as pool:
        winners = [number for number, won in enumerate(pool.map(write, range(_WRITERS))) if won]
    content = store.get(name)
    store.delete(name)
    if len(winners) != 1 or content != b"%d" % winners[0]:
        raise RepositoryError(
            f"{store.url} let {len(winners)} of {_WRITERS} writers create the same object",
            hint="Such a store can lose backups: use one that supports conditional writes"
            " (If-None-Match).",
        )
