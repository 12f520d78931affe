"""The CPU as a device: plain torch, each call done when it returns.

Owns: the plain answer to container.model.device. Must not know: Triton, who calls it.
Invariant: it computes what an accelerator computes, by the references the kernels are judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from container.kernels.gpu import attention_reference, int4_reference, layer_reference
from container.model import shape as machine
from container.model.device import (
    Activation,
    Angles,
    Dense,
    Fp8,
    HeadNorm,
    HeadShape,
    LayerPages,
    Operators,
    StepRows,
    Weight,
)


class PlainOperators:
    """A layer's operators in plain torch."""

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
        layer_reference.rotate_and_store(
            qkv.view(qkv.shape[0], -1, shape.dim),
            queries,
            angles.cosines,
            angles.sines,
            rows.positions,
            rows.places,
            pages.keys,
            pages.values,
            norms=None if norms is None else (norms.query, norms.key, epsilon),
        )
        return queries

    def attend(self, query: Tensor, shape: HeadShape, rows: StepRows, pages: LayerPages) -> Tensor:
        out = torch.zeros_like(query)
        attention_reference.attend(
            query,
            pages.keys,
            pages.values,
            out,
            rows.starts,
            rows.lengths,
            rows.lines,
            rows.table,
            scale=shape.scale,
            window=shape.window,
        )
        return out.view(query.shape[0], -1)

    def rms_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        return layer_reference.rms_norm(hidden, weight, epsilon, residual=residual).to(hidden.dtype)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return layer_reference.gated(gate_up, gelu=activation is Activation.GELU_TANH).to(gate_up.dtype)

    def linear(self, hidden: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Dense):
            return torch.nn.functional.linear(hidden, weight.weight, weight.bias)
        if isinstance(weight, Fp8):
            numbers, scales = layer_reference.quantized(hidden, torch.float8_e4m3fn)
            product = numbers.float() @ weight.weight.float().t() * scales[:, None] * weight.scales
        else:
            product = int4_reference.linear(hidden, weight.packed, weight.scales)
        return (product if weight.bias is None else product + weight.bias.float()).to(hidden.dtype)


class Done:
    """A marker that was passed before anyone could ask."""

    def wait(self) -> None:
        """Nothing is under way."""


class CpuDevice:
    """Host memory as a device's; `operators` may be an accelerator's, interpreted, and so `capability`."""

    def __init__(self, operators: Operators | None = None, capability: tuple[int, int] | None = None) -> None:
        self.operators: Operators = operators or PlainOperators()
        self.capability = capability

    def free_bytes(self) -> int:
        return machine.memory_limit_bytes()

    def zeros(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(sizes), dtype=dtype)

    def staging(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(sizes), dtype=dtype)

    def upload(self, source: Tensor, to: Tensor) -> Done:
        to.copy_(source)
        return Done()

    def download(self, source: Tensor, to: Tensor) -> Done:
        to.copy_(source)
        return Done()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        return launch
