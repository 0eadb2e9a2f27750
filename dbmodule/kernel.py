"""The compiled kernel, if this installation has one: a compiler is not a requirement.

Callers ask `available` and otherwise use the numpy twin in `dbmodule.page`; both give the same
results, so that which one runs is a question of speed only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

try:
    from dbmodule import _kernel
except ImportError:
    available = False
else:
    available = True

name = "c" if available else "numpy"
"""Which of the two computes page checksums here."""


def page_checksums(
    buffer: bytes | bytearray | memoryview, first_block: int, out: NDArray[np.uint16]
) -> None:
    """Write the checksum of each page of `buffer` to `out`, which has one element per page.

    Releases the GIL. Only where `available`; `ValueError` when the two sizes do not agree.
    """
    _kernel.page_checksums(buffer, first_block, out)
