"""Whole numbers as few bytes: the narrowest unsigned type, its bytes transposed, then deflated.

Transposing puts all high bytes beside each other, where they repeat, so that deflate finds them.
The first byte of a packed array is the item size, so it can be read alone.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVEL = 6


def pack(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack a one-dimensional array of non-negative integers.

    Raises:
        ValueError: a value is negative.
    """
    if values.size and int(values.min()) < 0:
        raise ValueError(f"cannot pack {int(values.min())}; 0 or more is allowed")
    narrow = values.astype(np.min_scalar_type(int(values.max()) if values.size else 0))
    planes = narrow[:, None].view(np.uint8).T
    data = zlib.compress(np.ascontiguousarray(planes).tobytes(), _LEVEL)
    return np.frombuffer(bytes([narrow.itemsize]) + data, dtype=np.uint8)


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return what `pack` was given.

    Raises:
        ValueError: the bytes were not packed by `pack`.
    """
    size = int(packed[0]) if packed.size else 0
    if size not in (1, 2, 4, 8):
        raise ValueError(f"item size {size}; 1, 2, 4 or 8 is allowed")
    try:
        planes = np.frombuffer(zlib.decompress(packed[1:].tobytes()), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    items = np.ascontiguousarray(planes.reshape(size, -1).T)
    return items.view(f"<u{size}")[:, 0].astype(np.int64)
