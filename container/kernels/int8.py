"""Products with weights in int8 blocks: the native operator's layout, its checked call, its plain reference.

Owns: the order in which packed weights lie, and what the native operator is handed.
Must not know: modules, models, how weights were quantized.
Invariant: `arrange` only moves bytes: `restore` gives back exactly what it was given.

    stored    values (outputs, inputs)                          scales (outputs, inputs / 32)
    arranged  values (groups, inputs / 32, 8 quads, 8, 4)       scales (groups, inputs / 32, 8)
              a group is 8 outputs; the last is filled up with zeros; values come in ORDER
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from container.kernels.operators import Activations, Int8Weight, Native

BLOCK: Final = 32
GROUP: Final = 8
ORDER: Final = (0, 1, 4, 5, 2, 3, 6, 7)  # adding neighbours up leaves the outputs in their own order


@dataclass(frozen=True, slots=True)
class ArrangedInt8:
    """A weight as the native operators read it. `values` is int8, `scales` float16, both flat."""

    outputs: int  # without the rows that fill the last group
    inputs: int
    values: Tensor
    scales: Tensor
    bias: Tensor | None = None  # (padded outputs,) float32

    @property
    def padded_outputs(self) -> int:
        return -(-self.outputs // GROUP) * GROUP

    @property
    def structure(self) -> Int8Weight:
        """Addresses for the library; this object must outlive every call that uses them."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return Int8Weight(
            self.padded_outputs, self.inputs, self.values.data_ptr(), self.scales.data_ptr(), bias
        )


def arrange(values: Tensor, scales: Tensor, bias: Tensor | None = None) -> ArrangedInt8:
    """Return `values` (outputs, inputs) int8 and `scales` (outputs, inputs / 32) float16 in groups."""
    outputs, inputs = values.shape
    assert inputs % BLOCK == 0 and scales.shape == (outputs, inputs // BLOCK), "blocks of 32 inputs"
    assert values.dtype == torch.int8 and scales.dtype == torch.float16, "int8 blocks with half scales"
    groups = -(-outputs // GROUP)
    blocks = inputs // BLOCK
    laid = (
        _padded(values, groups * GROUP)
        .view(groups, GROUP, blocks, BLOCK // 4, 4)[:, ORDER, :]
        .permute(0, 2, 3, 1, 4)
    )
    halves = _padded(scales, groups * GROUP).view(groups, GROUP, blocks).transpose(1, 2)
    padded = None if bias is None else padded_bias(bias)
    return ArrangedInt8(outputs, inputs, laid.reshape(-1), halves.reshape(-1), padded)


def restore(weight: ArrangedInt8) -> tuple[Tensor, Tensor]:
    """Return the values (outputs, inputs) and scales (outputs, inputs / 32) that were arranged."""
    groups, blocks = weight.padded_outputs // GROUP, weight.inputs // BLOCK
    laid = weight.values.view(groups, blocks, BLOCK // 4, GROUP, 4)
    values = torch.empty_like(laid)
    values[:, :, :, ORDER] = laid
    values = values.permute(0, 3, 1, 2, 4)
    scales = weight.scales.view(groups, blocks, GROUP).transpose(1, 2)
    flat = values.reshape(groups * GROUP, weight.inputs)
    return flat[: weight.outputs], scales.reshape(groups * GROUP, blocks)[: weight.outputs]


def join(weights: Sequence[ArrangedInt8], *, interleaved: bool = False) -> ArrangedInt8:
    """Return weights of the same inputs as one, whose outputs are theirs in turn, or their groups in turn.

    All have whole groups of outputs, but for the last when they are not `interleaved`.
    """
    inputs = weights[0].inputs
    whole = weights if interleaved else weights[:-1]
    assert all(each.outputs % GROUP == 0 for each in whole), "only the last may have a group to fill up"
    assert all(each.inputs == inputs for each in weights), "products of the same input"
    bias = None
    if any(each.bias is not None for each in weights):
        each_bias = [torch.zeros(w.padded_outputs) if w.bias is None else w.bias for w in weights]
        bias = _joined(each_bias, [w.padded_outputs for w in weights], interleaved)
    counts = [w.padded_outputs for w in weights]
    return ArrangedInt8(
        sum(each.outputs for each in weights),
        inputs,
        _joined([each.values for each in weights], counts, interleaved),
        _joined([each.scales for each in weights], counts, interleaved),
        bias,
    )


def _joined(parts: Sequence[Tensor], counts: Sequence[int], interleaved: bool) -> Tensor:
    if not interleaved:
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    assert len(set(counts)) == 1, "groups in turn need as many of each"
    return torch.stack([part.view(counts[0] // GROUP, -1) for part in parts], dim=1).flatten()


def split(joined: Tensor, outputs: Sequence[int], *, interleaved: bool = False) -> list[Tensor]:
    """Return what `join` made of several flat `values` or `scales` as the several again."""
    groups = [-(-count // GROUP) for count in outputs]
    laid = joined.view(sum(groups), -1)
    if interleaved:
        return [laid[at :: len(outputs)].flatten() for at in range(len(outputs))]
    return [part.flatten() for part in torch.split(laid, groups)]


def padded_bias(bias: Tensor) -> Tensor:
    """Return `bias` (outputs,) as float32 (padded outputs,)."""
    outputs = bias.shape[0]
    return _padded(bias.detach().float().reshape(-1, 1), -(-outputs // GROUP) * GROUP).flatten()


def _padded(rows: Tensor, wanted: int) -> Tensor:
    rows = rows.contiguous()
    if len(rows) == wanted:
        return rows
    return torch.cat((rows, rows.new_zeros(wanted - len(rows), *rows.shape[1:])))


def multiply(native: Native, weight: ArrangedInt8, x: Tensor, *, plain: bool = False) -> Tensor:
    """Return `x` (tokens, inputs) float32 times the weight transposed, plus its bias: (tokens, outputs).

    `plain` leaves activations as they are; otherwise they are quantized in blocks of 32.
    """
    assert x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == weight.inputs, "rows of inputs"
    x = x.contiguous()
    tokens, stride = x.shape[0], weight.padded_outputs
    y = torch.empty(tokens, stride)
    shape = (ctypes.c_int32(tokens), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(stride))
    structure = weight.structure
    if plain:
        source = ctypes.c_void_p(x.data_ptr())
        native.call("strongroom_multiply_plain", ctypes.byref(structure), source, *shape)
    else:
        values, scales = quantize(native, x)
        held = Activations(values.data_ptr(), scales.data_ptr())
        native.call("strongroom_multiply_int8", ctypes.byref(structure), held, *shape)
    return y[:, : weight.outputs]


def quantize(native: Native, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` (tokens, inputs) float32 as -127..127 in int16, and scales (tokens, inputs / 32)."""
    assert x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] % BLOCK == 0, "rows in blocks"
    tokens, inputs = x.shape
    values = torch.empty(tokens, inputs, dtype=torch.int16)
    scales = torch.empty(tokens, inputs // BLOCK)
    native.call(
        "strongroom_quantize",
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int32(tokens),
        ctypes.c_int32(inputs),
        Activations(values.data_ptr(), scales.data_ptr()),
    )
    return values, scales
