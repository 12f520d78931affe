"""Products with weights in blocks of integers: joining weights, the native operator's checked call.

Owns: how several weights lie as one, what the native operator is handed.
Must not know: modules, models, how weights were quantized, the order of a kind's values (int8, int4).
Invariant: joining only moves bytes: `split` gives back what was joined.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from container.kernels.block_weight import BLOCK, GROUP, ArrangedBlocks, Kind, padded
from container.kernels.operators import Activations, Native

BYTE_SUMS: Final = ("avx512", "avx512bf16")  # instruction sets that multiply int8 with activations in 8 bits


def join(weights: Sequence[ArrangedBlocks], *, interleaved: bool = False) -> ArrangedBlocks:
    """Return weights of the same kind and inputs as one, with their outputs, or groups of outputs, in turn.

    All have whole groups of outputs, but for the last when they are not `interleaved`.
    """
    inputs = weights[0].inputs
    whole = weights if interleaved else weights[:-1]
    assert all(each.outputs % GROUP == 0 for each in whole), "only the last may have a group to fill up"
    assert all(each.inputs == inputs for each in weights), "products of the same input"
    assert len({each.kind for each in weights}) == 1, "weights of the same kind"
    bias = None
    if any(each.bias is not None for each in weights):
        each_bias = [np.zeros(w.padded_outputs, np.float32) if w.bias is None else w.bias for w in weights]
        bias = _joined(each_bias, [w.padded_outputs for w in weights], interleaved)
    counts = [w.padded_outputs for w in weights]
    lows = [each.lows for each in weights if each.lows is not None]
    return ArrangedBlocks(
        sum(each.outputs for each in weights),
        inputs,
        _joined([each.values for each in weights], counts, interleaved),
        _joined([each.scales for each in weights], counts, interleaved),
        bias,
        _joined(lows, counts, interleaved) if lows else None,
    )


def _joined(parts: Sequence[npt.NDArray[Any]], counts: Sequence[int], interleaved: bool) -> npt.NDArray[Any]:
    if not interleaved:
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
    assert len(set(counts)) == 1, "groups in turn need as many of each"
    return np.stack([part.reshape(counts[0] // GROUP, -1) for part in parts], axis=1).reshape(-1)


def split(
    joined: ArrangedBlocks, outputs: Sequence[int], *, interleaved: bool = False
) -> list[ArrangedBlocks]:
    """Return what `join` made of weights with so many outputs as the several again, without their biases."""

    def apart(part: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        laid = part.reshape(sum(groups), -1)
        if interleaved:
            return [laid[at :: len(outputs)].reshape(-1) for at in range(len(outputs))]
        return [each.reshape(-1) for each in np.split(laid, np.cumsum(groups)[:-1])]

    groups = [padded(count) // GROUP for count in outputs]
    values, scales = apart(joined.values), apart(joined.scales)
    lows = [None] * len(outputs) if joined.lows is None else apart(joined.lows)
    return [
        ArrangedBlocks(count, joined.inputs, value, scale, lows=low)
        for count, value, scale, low in zip(outputs, values, scales, lows, strict=True)
    ]


def padded_bias(bias: Tensor) -> npt.NDArray[np.float32]:
    """Return `bias` (outputs,) as float32 (padded outputs,)."""
    filled: npt.NDArray[np.float32] = filled_up(bias.detach().float().reshape(-1, 1)).flatten().numpy()
    return filled


def filled_up(rows: Tensor) -> Tensor:
    """Return `rows` with rows of zeros that fill the last group."""
    rows, wanted = rows.contiguous(), padded(len(rows))
    if len(rows) == wanted:
        return rows
    return torch.cat((rows, rows.new_zeros(wanted - len(rows), *rows.shape[1:])))


def split_in_groups(halves: Tensor) -> npt.NDArray[np.float16]:
    """Return a number per block (outputs, blocks), such as its scale, as (groups, blocks, 8), flat."""
    flat: npt.NDArray[np.float16] = (
        filled_up(halves).view(-1, GROUP, halves.shape[1]).transpose(1, 2).reshape(-1).numpy()
    )
    return flat


def restored_halves(halves: npt.NDArray[np.float16], weight: ArrangedBlocks) -> Tensor:
    """Return what `split_in_groups` was given as a part of `weight`."""
    blocks = weight.inputs // BLOCK
    laid = torch.from_numpy(halves).view(-1, blocks, GROUP).transpose(1, 2)
    return laid.reshape(weight.padded_outputs, blocks)[: weight.outputs]


def multiply(native: Native, weight: ArrangedBlocks, x: Tensor, *, plain: bool = False) -> Tensor:
    """Return `x` (tokens, inputs) float32 times the weight transposed, plus its bias: (tokens, outputs).

    `plain` leaves activations as they are; otherwise they are quantized in blocks of 32.
    """
    assert x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == weight.inputs, "rows of inputs"
    x = x.contiguous()
    tokens, stride = x.shape[0], weight.padded_outputs
    y = torch.empty(tokens, stride, dtype=torch.float32)  # whatever the default is while a model is built
    shape = (ctypes.c_int32(tokens), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(stride))
    structure = weight.structure
    if plain:
        source = ctypes.c_void_p(x.data_ptr())
        native.call("strongroom_multiply_plain", ctypes.byref(structure), source, *shape)
    else:
        held = quantize(native, x, weight.kind)
        native.call("strongroom_multiply", ctypes.byref(structure), addresses(held), *shape)
    return y[:, : weight.outputs]


def quantize(native: Native, x: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x` (tokens, inputs) float32 as -127..127, its scales and its sums (tokens, inputs / 32).

    Values are held as products with weights of `kind` take them, in int16 or int8. What sums are depends on
    the kind and the instruction set; see csrc/gemm.hpp.
    """
    assert x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] % BLOCK == 0, "rows in blocks"
    tokens, inputs = x.shape
    narrow = kind is Kind.INT4 or native.isa in BYTE_SUMS
    values = torch.empty(tokens, inputs, dtype=torch.int8 if narrow else torch.int16)
    scales, sums = (torch.empty(tokens, inputs // BLOCK, dtype=torch.float32) for _ in range(2))
    native.call(
        "strongroom_quantize",
        ctypes.c_int32(kind),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int32(tokens),
        ctypes.c_int32(inputs),
        addresses((values, scales, sums)),
    )
    return values, scales, sums


def addresses(held: tuple[Tensor, Tensor, Tensor]) -> Activations:
    """Return where what `quantize` gave lies, as the operators take it."""
    values, scales, sums = held
    return Activations(values.data_ptr(), scales.data_ptr(), sums.data_ptr())
