import numpy as np
from numpy.typing import NDArray

def page_checksums(
    buffer: bytes | bytearray | memoryview,
    blocks: NDArray[np.uint32],
    out: NDArray[np.uint16],
    /,
) -> None: ...
