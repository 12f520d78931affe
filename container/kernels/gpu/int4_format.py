"""Weights of 4 bits in groups, as accelerators keep them: the format, and packing. Needs no Triton.

Owns: the format. Must not know: how it is multiplied, modules, models.
Invariant: a number is (nibble - 8) times its group's scale, whichever way it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

GROUPS: Final = (32, 64, 128)
LARGEST: Final = 7  # -8 is left out, so that a group's range is symmetric
SMALLEST_SCALE: Final = 2.0**-24  # the least float16; a group of less counts as zeros


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A weight (outputs, inputs): `packed` (outputs, inputs / 2) uint8, `scales` (outputs, groups) half."""

    packed: Tensor
    scales: Tensor

    @property
    def outputs(self) -> int:
        return self.packed.shape[0]

    @property
    def inputs(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        return self.inputs // self.scales.shape[1]


def pack(weight: Tensor, group: int) -> Int4Weight:
    """Return `weight` (outputs, inputs) in 4 bits, to the nearest of 15 steps of its group.

    Raises ValueError for an unknown group or inputs that are no whole groups.
    """
    outputs, inputs = weight.shape
    if group not in GROUPS or inputs % group:
        raise ValueError(f"`group` is none of {GROUPS}, or inputs are no whole groups")
    grouped = weight.float().view(outputs, inputs // group, group)
    scales = (grouped.abs().amax(-1) / LARGEST).half()
    divisor = torch.where(scales < SMALLEST_SCALE, torch.ones_like(scales), scales).float()
    numbers = (grouped / divisor[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int16) + 8
    low, high = numbers.chunk(2, -1)
    packed = (low | (high << 4)).to(torch.uint8).view(outputs, inputs // 2)
    return Int4Weight(packed, scales)
