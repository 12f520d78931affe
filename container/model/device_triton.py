"""A layer's operators by Triton's kernels: on a GPU, or on a CPU by Triton's interpreter.

Owns: which kernel and which tuning answers a call. Must not know: models, plans. Importing it needs Triton.
Invariant: nothing is read on the host, so that every call can be captured.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from container.kernels.gpu import int4, layer
from container.kernels.gpu.attention import PagedShape, Partials, Rows, Tuning, attend, padded
from container.model.device import (
    Activation,
    Angles,
    Dense,
    Fp8,
    HeadNorm,
    HeadShape,
    LayerPages,
    StepRows,
    Weight,
)

GATES: Final = {Activation.SILU: layer.Gate.SILU, Activation.GELU_TANH: layer.Gate.GELU_TANH}
# Start values, to be confirmed on a device by `scripts/bench gpu`.
DECODE_PROGRAMS: Final = 512  # about four on each of an H200's 132 multiprocessors
MOST_SPLITS: Final = 32
DECODE_TILE: Final = 64
PREFILL_ROWS: Final = 64


def tuning_for(shape: HeadShape, rows: int, *, decodes: bool) -> Tuning:
    """Return how attention of `rows` rows is cut; depends on sizes alone, as a captured launch must."""
    if not decodes:
        return Tuning(block_rows=max(PREFILL_ROWS, padded(shape.heads // shape.kv_heads)), tile=DECODE_TILE)
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * rows * shape.kv_heads <= DECODE_PROGRAMS:
        splits *= 2
    return Tuning(tile=DECODE_TILE, splits=splits)


class TritonOperators:
    """A layer's operators in Triton; `deterministic` keeps splits off, so that sums have one order."""

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def rotate_and_store(
        self,
        qkv: Tensor,
        shape: HeadShape,
        angles: Angles,
        norms: HeadNorm | None,
        epsilon: float,
        rows: StepRows,
        pages: LayerPages,
    ) -> Tensor:
        queries = qkv.new_empty(qkv.shape[0], shape.heads, shape.dim)
        layer.rotate_and_store(
            qkv.view(qkv.shape[0], -1, shape.dim),
            queries,
            layer.Rotation(angles.cosines, angles.sines),
            rows.positions,
            rows.places,
            layer.Pool(pages.keys, pages.values),
            None if norms is None else layer.HeadNorms(norms.query, norms.key, epsilon),
        )
        return queries

    def attend(self, query: Tensor, shape: HeadShape, rows: StepRows, pages: LayerPages) -> Tensor:
        out = torch.zeros_like(query)
        paged = PagedShape(shape.heads, shape.kv_heads, shape.dim, shape.dim, shape.scale, shape.window)
        split = rows.decodes and not self._deterministic
        tuning = tuning_for(shape, rows.lengths.shape[0], decodes=rows.decodes) if split else Tuning()
        if not rows.decodes:
            tuning = tuning_for(shape, rows.lengths.shape[0], decodes=False)
        partials = None
        if tuning.splits > 1:
            partials = Partials.of(paged, query.shape[0], tuning.splits, query.device)
        held = Rows(rows.starts, rows.lengths, rows.lines, rows.table)
        attend(paged, held, query, pages.keys, pages.values, out, tuning, partials=partials)
        return out.view(query.shape[0], -1)

    def rms_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        out = torch.empty_like(hidden)
        layer.rms_norm(hidden, weight, out, epsilon, residual=residual)
        return out

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        layer.gated(gate_up, out, GATES[activation])
        return out

    def linear(self, hidden: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Dense):
            return torch.nn.functional.linear(hidden, weight.weight, weight.bias)
        if isinstance(weight, Fp8):
            product = fp8_linear(hidden, weight)
        else:
            product = int4.linear(hidden, int4.Int4Weight(weight.packed, weight.scales))
        return product if weight.bias is None else product + weight.bias


def fp8_linear(hidden: Tensor, weight: Fp8) -> Tensor:
    """Return `hidden` (tokens, inputs), rounded to fp8 per token, times the weight; bfloat16 inside."""
    rounded = layer.quantize_rows(hidden, layer.Rounding.FP8)
    product: Tensor = torch._scaled_mm(  # the only way to the rowwise product in this torch
        rounded.numbers,
        weight.weight.t(),  # column-major, as the product wants it
        scale_a=rounded.scales[:, None],
        scale_b=weight.scales[None],
        out_dtype=torch.bfloat16,
    )
    return product.to(hidden.dtype)
