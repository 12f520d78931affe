"""Weights in int4 blocks, in the order in which the native operators read them, and back.

Owns: the order. Must not know: modules, models, how weights were quantized.
Invariant: `arrange` only moves bits: `restore` gives back exactly what it was given.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from container.kernels.block_weight import BLOCK, GROUP, ArrangedBlocks, Kind
from container.kernels.blocks import filled_up, padded_bias, restored_halves, split_in_groups

PAIRS: Final = BLOCK // 8  # of quads in a block


def arrange(values: Tensor, scales: Tensor, lows: Tensor, bias: Tensor | None = None) -> ArrangedBlocks:
    """Return `values` (outputs, inputs / 2) uint8, even columns in low halves, and the rest in groups.

    `scales` and `lows` are (outputs, inputs / 32) float16.
    """
    outputs, inputs = values.shape[0], 2 * values.shape[1]
    blocks = (outputs, inputs // BLOCK)
    assert inputs % BLOCK == 0 and scales.shape == lows.shape == blocks, "blocks of 32 inputs"
    halves = scales.dtype == lows.dtype == torch.float16
    assert values.dtype == torch.uint8 and halves, "int4 blocks with half scales and lows"
    columns = filled_up(values).view(-1, GROUP, inputs // BLOCK, PAIRS, 2, 2)  # ..., quad, two columns each
    each = torch.stack((columns & 15, columns >> 4), dim=-1).flatten(-2)  # ..., quad, 4
    laid = (each[..., 0, :] | each[..., 1, :] << 4).permute(0, 2, 3, 1, 4)
    added = None if bias is None else padded_bias(bias)
    packed, lowest = laid.reshape(-1).numpy(), split_in_groups(lows)
    return ArrangedBlocks(outputs, inputs, packed, split_in_groups(scales), added, lowest)


def restore(weight: ArrangedBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values (outputs, inputs / 2), scales and lows (outputs, inputs / 32) that were arranged."""
    assert weight.kind is Kind.INT4 and weight.lows is not None, "a weight in int4 blocks"
    groups, blocks = weight.padded_outputs // GROUP, weight.inputs // BLOCK
    laid = torch.from_numpy(weight.values).view(groups, blocks, PAIRS, GROUP, 4)
    each = torch.stack((laid & 15, laid >> 4), dim=-2)  # ..., quad, 4
    columns = (each[..., ::2] | each[..., 1::2] << 4).permute(0, 3, 1, 2, 4, 5)
    flat = columns.reshape(groups * GROUP, weight.inputs // 2)
    scales, lows = (restored_halves(part, weight) for part in (weight.scales, weight.lows))
    return flat[: weight.outputs], scales, lows
