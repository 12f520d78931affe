"""A weight in blocks of integers as the native operators read it.

Owns: its kinds, the order in which its values lie, what the library is handed. Must not know: torch, models.

    int8   stored    values (outputs, inputs) int8                 scales (outputs, inputs / 32)
           arranged  values (groups, inputs / 32, 8 quads, 8, 4)   scales (groups, inputs / 32, 8)
    int4   stored    values (outputs, inputs / 2) uint8            scales, lows (outputs, inputs / 32)
           arranged  values (groups, inputs / 32, 4, 8, 4)         scales, lows (groups, inputs / 32, 8)

    A group is 8 outputs; the last is filled up with zeros. A quad is four inputs of each; int8 has its
    outputs in ORDER, int4 in their own, one quad in the low halves of 32 bytes and the next in the high ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from container.kernels.operators import BlockWeight

BLOCK: Final = 32
GROUP: Final = 8
ORDER: Final = (0, 1, 4, 5, 2, 3, 6, 7)  # adding neighbours up leaves the outputs in their own order
ARRANGEMENT: Final = 1  # of the layouts above and of `blocks.join`: stored weights name it


class Kind(IntEnum):
    """How a block's values are held, as the library numbers it."""

    INT8 = 0
    INT4 = 1  # each block with a lowest value, too


def padded(outputs: int) -> int:
    """Return `outputs` with those that fill the last group."""
    return -(-outputs // GROUP) * GROUP


@dataclass(frozen=True, slots=True)
class ArrangedBlocks:
    """A weight of `outputs` rows and `inputs` columns; `values`, `scales` and `lows` are flat."""

    outputs: int  # without the rows that fill the last group
    inputs: int
    values: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    bias: npt.NDArray[np.float32] | None = None  # (padded outputs,)
    lows: npt.NDArray[np.float16] | None = None  # of int4 alone

    @property
    def kind(self) -> Kind:
        return Kind.INT8 if self.lows is None else Kind.INT4

    @property
    def padded_outputs(self) -> int:
        return padded(self.outputs)

    def arrays(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all its parts."""
        parts = (self.values, self.scales, self.lows, self.bias)
        yield from (part for part in parts if part is not None)

    @property
    def structure(self) -> BlockWeight:
        """Addresses for the library; this object must outlive every call that uses them."""
        return BlockWeight(
            self.padded_outputs,
            self.inputs,
            self.kind,
            self.values.ctypes.data,
            self.scales.ctypes.data,
            None if self.lows is None else self.lows.ctypes.data,
            None if self.bias is None else self.bias.ctypes.data,
        )
