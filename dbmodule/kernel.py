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
    buffer: bytes | bytearray | memoryview, blocks: NDArray[np.uint32], out: NDArray[np.uint16]
) -> None:
    """Write the checksum of each page of `buffer` to `out`; `blocks` are their block numbers.

    Both arrays have one element per page and are contiguous. Releases the GIL. Only where
    `available`; `ValueError` when the sizes do not agree.
    """
    _kernel.page_checksums(buffer, blocks, out)
