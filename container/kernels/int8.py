"""Weights in int8 blocks, in the order in which the native operators read them, and back.

Owns: the order. Must not know: modules, models, how weights were quantized.
Invariant: `arrange` only moves bytes: `restore` gives back exactly what it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from container.kernels.block_weight import BLOCK, GROUP, ORDER, ArrangedBlocks, Kind
from container.kernels.blocks import filled_up, padded_bias, restored_halves, split_in_groups


def arrange(values: Tensor, scales: Tensor, bias: Tensor | None = None) -> ArrangedBlocks:
    """Return `values` (outputs, inputs) int8 and `scales` (outputs, inputs / 32) float16 in groups."""
    outputs, inputs = values.shape
    assert inputs % BLOCK == 0 and scales.shape == (outputs, inputs // BLOCK), "blocks of 32 inputs"
    assert values.dtype == torch.int8 and scales.dtype == torch.float16, "int8 blocks with half scales"
    laid = (
        filled_up(values).view(-1, GROUP, inputs // BLOCK, BLOCK // 4, 4)[:, ORDER, :].permute(0, 2, 3, 1, 4)
    )
    added = None if bias is None else padded_bias(bias)
    return ArrangedBlocks(outputs, inputs, laid.reshape(-1).numpy(), split_in_groups(scales), added)


def restore(weight: ArrangedBlocks) -> tuple[Tensor, Tensor]:
    """Return the values (outputs, inputs) and scales (outputs, inputs / 32) that were arranged."""
    assert weight.kind is Kind.INT8, "a weight in int8 blocks"
    groups, blocks = weight.padded_outputs // GROUP, weight.inputs // BLOCK
    laid = torch.from_numpy(weight.values).view(groups, blocks, BLOCK // 4, GROUP, 4)
    values = torch.empty_like(laid)
    values[:, :, :, ORDER] = laid
    flat = values.permute(0, 3, 1, 2, 4).reshape(groups * GROUP, weight.inputs)
    return flat[: weight.outputs], restored_halves(weight.scales, weight)
