"""int8-block weights multiplied by the native operators, wherever they hang in a model.

Owns: laying packed weights out for the operators, the form that multiplies them.
Must not know: models, layers, which scheme was asked for.
Invariant: a weight exists in one layout at a time; nothing of it is lost: `unpack` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from container.kernels import int8
from container.kernels.int8 import ArrangedInt8
from container.kernels.operators import Native
from container.model.quantize_blocks import Int8Block
from container.model.quantize_format import Multiplier
from container.model.quantize_modules import PackedWeight


class NativeInt8(Multiplier):
    """Multiplies by int8-block weights (outputs, inputs) that were arranged; otherwise as Int8Block.

    The parts are the same two, in the order of container.kernels.int8.
    """

    def __init__(self, native: Native, outputs: int, inputs: int) -> None:
        self._native = native
        self._outputs = outputs
        self._inputs = inputs

    def arranged(self, parts: Mapping[str, Tensor]) -> ArrangedInt8:
        return ArrangedInt8(self._outputs, self._inputs, parts["weight"], parts["weight_scale"])

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self._multiply(x, parts, plain=False)

    def multiply_plain(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self._multiply(x, parts, plain=True)

    def _multiply(self, x: Tensor, parts: Mapping[str, Tensor], *, plain: bool) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self._outputs)
        return int8.multiply(self._native, self.arranged(parts), x.float(), plain=plain).to(x.dtype)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        values, scales = int8.restore(self.arranged(parts))
        return Int8Block().unpack({"weight": values, "weight_scale": scales})


def adopt(model: nn.Module, native: Native) -> int:
    """Arrange every int8-block weight of `model` for `native`, one after the other; return how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, PackedWeight) and isinstance(module.form, Int8Block):
            _arrange(module, native)
            count += 1
    return count


def _arrange(module: PackedWeight, native: Native) -> None:
    parts = module.parts()
    stacked = parts["weight"].dim() == 3
    outputs, inputs = parts["weight"].shape[-2:]
    matrices = range(len(parts["weight"])) if stacked else [None]
    arranged = [int8.arrange(*_pair(module.parts(index))) for index in matrices]
    values, scales = [each.values for each in arranged], [each.scales for each in arranged]
    module.set_parts(
        NativeInt8(native, outputs, inputs),
        {
            "weight": torch.stack(values) if stacked else values[0],
            "weight_scale": torch.stack(scales) if stacked else scales[0],
        },
    )


def _pair(parts: dict[str, Tensor]) -> tuple[Any, Any]:
    return parts["weight"], parts["weight_scale"]
