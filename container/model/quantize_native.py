"""Weights in blocks of integers multiplied by the native operators, wherever they hang in a model.

Owns: laying packed weights out for the operators, the form that multiplies them.
Must not know: models, layers, which scheme was asked for.
Invariant: a weight exists in one layout at a time; nothing of it is lost: `unpack` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from container.kernels import blocks, int4, int8
from container.kernels.block_weight import ArrangedBlocks
from container.kernels.operators import Native
from container.model.quantize_blocks import Int4Block, Int8Block
from container.model.quantize_format import Multiplier
from container.model.quantize_modules import PackedWeight

LOW = "weight_low"


class NativeBlocks(Multiplier):
    """Multiplies by weights (outputs, inputs) in blocks that were arranged, quantizing activations too.

    The parts are those of the format it was packed in, in the order of container.kernels.block_weight.
    """

    def __init__(self, native: Native, packed_as: Int8Block | Int4Block, outputs: int, inputs: int) -> None:
        self._native = native
        self._packed_as = packed_as
        self._outputs = outputs
        self._inputs = inputs

    def arranged(self, parts: Mapping[str, Tensor]) -> ArrangedBlocks:
        lows = parts[LOW].numpy() if LOW in parts else None
        values, scales = parts["weight"].numpy(), parts["weight_scale"].numpy()
        return ArrangedBlocks(self._outputs, self._inputs, values, scales, lows=lows)

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self._multiply(x, parts, plain=False)

    def multiply_plain(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self._multiply(x, parts, plain=True)

    def _multiply(self, x: Tensor, parts: Mapping[str, Tensor], *, plain: bool) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self._outputs)
        return blocks.multiply(self._native, self.arranged(parts), x.float(), plain=plain).to(x.dtype)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        arranged = self.arranged(parts)
        restored = int8.restore(arranged) if arranged.lows is None else int4.restore(arranged)
        return self._packed_as.unpack(dict(zip(parts, restored, strict=True)))


def adopt(model: nn.Module, native: Native) -> int:
    """Arrange every weight of `model` in blocks for `native`, one after the other; return how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, PackedWeight) and isinstance(module.form, Int8Block | Int4Block):
            _arrange(module, module.form, native)
            count += 1
    return count


def parts_of(weight: ArrangedBlocks) -> dict[str, Tensor]:
    """Return the arranged values, scales and lows under the names that modules have for them."""
    lows = {} if weight.lows is None else {LOW: torch.from_numpy(weight.lows)}
    return {
        "weight": torch.from_numpy(weight.values),
        "weight_scale": torch.from_numpy(weight.scales),
        **lows,
    }


def _arrange(module: PackedWeight, form: Int8Block | Int4Block, native: Native) -> None:
    parts = module.parts()
    stacked = parts["weight"].dim() == 3
    arranged = [
        _arranged(module.parts(index)) for index in (range(len(parts["weight"])) if stacked else [None])
    ]
    laid = [parts_of(each) for each in arranged]
    made = {name: torch.stack([each[name] for each in laid]) for name in laid[0]} if stacked else laid[0]
    module.set_parts(NativeBlocks(native, form, arranged[0].outputs, arranged[0].inputs), made)


def _arranged(parts: Mapping[str, Tensor]) -> ArrangedBlocks:
    weight, scale = parts["weight"], parts["weight_scale"]
    return int4.arrange(weight, scale, parts[LOW]) if LOW in parts else int8.arrange(weight, scale)
