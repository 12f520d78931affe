"""Host memory as the library reads it: numpy arrays that begin on a cache line.

Owns: alignment. Must not know: torch, what the arrays hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ALIGNMENT: Final = 64  # bytes, a cache line: threads that write neighbouring rows do not share one

Floats = npt.NDArray[np.float32]


def empty(shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Return an array of `shape` whose values are whatever was there."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + count].view(dtype).reshape(shape)


def readable(array: npt.NDArray[Any], shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> bool:
    """Return whether the library may read `array` as `shape` values of `dtype` side by side."""
    return array.dtype == dtype and array.flags.c_contiguous and array.shape == tuple(shape)
