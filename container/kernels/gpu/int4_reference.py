"""Weights of 4 bits in plain torch: what the kernels are judged by, and what runs without Triton.

Owns: the format, written to be read. Must not know: Triton. Invariant: one number at a time has one value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def written_out(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight (outputs, inputs) float32 of `packed` (outputs, inputs / 2) and (outputs, groups)."""
    outputs, groups = scales.shape
    each = packed.view(outputs, groups, -1)
    numbers = torch.cat((each & 15, each >> 4), -1).float() - 8.0
    return (numbers * scales.float()[..., None]).view(outputs, -1)


def linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return `x` times the weight, float32."""
    return x.float() @ written_out(packed, scales).t()
