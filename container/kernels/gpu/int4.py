"""Weights of 4 bits in groups on an accelerator: multiplied, written out for many rows.

Owns: the choice between the two products, the launches. Must not know: modules, models.
Invariant: both give what `int4_format` says a number is.

Few rows are bound by the bytes of the weight: a quarter of bfloat16's. Many are bound by the product, where a
plain one of the written-out weight is faster (engine specification, section 9.3); the border is ROWS until
a device was measured.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from container.kernels.gpu import int4_kernel
from container.kernels.gpu.int4_format import GROUPS, LARGEST, Int4Weight, pack

__all__ = ["GROUPS", "LARGEST", "Int4Weight", "linear", "pack", "written_out"]

ROWS: Final = 32  # most rows that are multiplied without writing the weight out
PROGRAMS: Final = 264  # two per multiprocessor of the largest device so far
BLOCK_OUTPUTS: Final = 64


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
