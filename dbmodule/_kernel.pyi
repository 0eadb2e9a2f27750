import numpy as np
from numpy.typing import NDArray

def page_checksums(
    buffer: bytes | bytearray | memoryview, first_block: int, out: NDArray[np.uint16], /
) -> None: ...
