"""Weights of 4 bits in groups on an accelerator: packed, multiplied, written out for many rows.

Owns: the format, the choice between its two products, the launches. Must not know: modules, models.
Invariant: a number is (nibble - 8) times its group's scale, whichever way it is multiplied.

Few rows are bound by the bytes of the weight: a quarter of bfloat16's. Many are bound by the product, where a
plain one of the written-out weight is faster (engine specification, section 9.3); the border is ROWS until
a device was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from container.kernels.gpu import int4_kernel

GROUPS: Final = (32, 64, 128)
LARGEST: Final = 7  # -8 is left out, so that a group's range is symmetric
ROWS: Final = 32  # most rows that are multiplied without writing the weight out
PROGRAMS: Final = 264  # two per multiprocessor of the largest device so far
BLOCK_OUTPUTS: Final = 64
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


def linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """Return `x` (rows, inputs) times the weight, (rows, outputs) in the dtype of `x`."""
    rows = x.shape[0]
    assert x.shape == (rows, weight.inputs) and x.stride(1) == 1, "columns lie side by side"
    if rows > ROWS:
        return torch.nn.functional.linear(x, written_out(weight, x.dtype))
    return _multiply(x, weight)


def written_out(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight (outputs, inputs) in `dtype`."""
    out = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device=weight.packed.device)
    block = min(1024, 1 << (weight.packed.shape[1] - 1).bit_length())
    kernel: Any = int4_kernel.write_out
    grid = (weight.outputs, -(-weight.packed.shape[1] // block))
    kernel[grid](
        weight.packed, weight.scales, out, INPUTS=weight.inputs, GROUP=weight.group, BLOCK=block, num_warps=4
    )
    return out


def _multiply(x: Tensor, weight: Int4Weight) -> Tensor:
    rows, outputs = x.shape[0], weight.outputs
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    block_rows = 16 if rows <= 16 else 32
    splits = _splits(weight)
    target = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    kernel: Any = int4_kernel.multiply
    kernel[(-(-rows // block_rows), -(-outputs // BLOCK_OUTPUTS), splits)](
        x,
        weight.packed,
        weight.scales,
        target,
        rows,
        x.stride(0),
        INPUTS=weight.inputs,
        OUTPUTS=outputs,
        GROUP=weight.group,
        BLOCK_M=block_rows,
        BLOCK_N=BLOCK_OUTPUTS,
        SPLITS=splits,
        WIDE=x.device.type == "cpu" and x.dtype is torch.bfloat16,
        num_warps=4,
    )
    return out if splits == 1 else target.sum(0).to(x.dtype)


def _splits(weight: Int4Weight) -> int:
    """Return into how many parts inputs are cut, a power of two: small weights fill the device too."""
    programs, groups = -(-weight.outputs // BLOCK_OUTPUTS), weight.scales.shape[1]
    splits = 1
    while 2 * splits * programs <= PROGRAMS and 2 * splits <= groups:
        splits *= 2
    return splits
