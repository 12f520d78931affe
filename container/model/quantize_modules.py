"""Modules that hold quantized weights: a linear layer, and the experts of a mixture.

Owns: where the parts of a weight lie in a state dict, the loop over experts.
Must not know: how a format computes, which layers are to be replaced.
Invariant: every bit of a quantized weight is in a buffer, so that a state dict restores it without quantizing
again; buffers keep their dtype whatever `.to(dtype)` is called around them.

    q_proj.weight, q_proj.weight_scale, ..., q_proj.bias                    a linear layer
    experts.gate_up_proj.weight (experts, ...), experts.down_proj.weight    experts, stacked
    experts.inner.gate_up_proj_bias                                         what else the experts hold
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from container.model.quantize_format import Multiplier

_plain: ContextVar[bool] = ContextVar("plain activations", default=False)


@contextmanager
def plain_activations() -> Iterator[None]:
    """Multiply unpacked weights by activations as they are, for comparing two ways to compute one model.

    Where activations are quantized, sums in another order flip some of their roundings, and layer after layer
    that grows to the size of the quantization error: on the demo model (30 layers, fp32) two correct ways
    differ by 0.9 % under int8-block and 2.9 % under fp8, by 5e-7 in here. A real fault hides in the former.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class PackedWeight(nn.Module):
    """The parts of one weight matrix, or of several of the same size, stacked."""

    def __init__(self, form: Multiplier, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.form = form
        self._part_names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part)

    def parts(self, index: int | None = None) -> dict[str, Tensor]:
        """Return the parts, of matrix `index` where there are several."""
        named = {name: self.get_buffer(name) for name in self._part_names}
        return named if index is None else {name: part[index] for name, part in named.items()}

    def set_parts(self, form: Multiplier, parts: dict[str, Tensor]) -> None:
        """Hold the same weight in another form, under the same names."""
        assert tuple(parts) == self._part_names, "the form has other parts"
        self.form = form
        for name, part in parts.items():
            self.register_buffer(name, part)

    def multiply(self, x: Tensor, index: int | None = None) -> Tensor:
        """Return `x` (tokens, in) times the weight transposed, (tokens, out)."""
        parts = self.parts(index)
        if _plain.get():
            return self.form.multiply_plain(x, parts)
        return self.form.multiply(x, parts)

    @property
    def packed_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move buffers with the module, but never convert one: a scale in another dtype is another weight."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        packed = {id(part) for part in self.parts().values()}
        apply: Any = super()._apply  # torch leaves it untyped
        return apply(lambda t: keep(t) if id(t) in packed else fn(t), recurse)


class PackedLinear(PackedWeight):
    """A linear layer with a quantized weight: (..., in_features) -> (..., out_features), dtype kept."""

    def __init__(
        self, form: Multiplier, parts: dict[str, Tensor], sizes: tuple[int, int], bias: nn.Parameter | None
    ) -> None:
        super().__init__(form, parts)
        self.out_features, self.in_features = sizes
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {type(self.form).__name__}"


class PackedExperts(nn.Module):
    """Experts with quantized weights, one after another; called as transformers calls its own.

    `inner` is the module replaced, without its weights: it keeps the biases and how a gate is applied. The
    loop asks which experts were hit, which on a GPU waits for the device.
    """

    def __init__(self, inner: nn.Module, entry: tuple[str, PackedWeight], down: PackedWeight) -> None:
        super().__init__()
        self.inner = inner
        self.entry_name, weight = entry
        self.add_module(self.entry_name, weight)
        self.down_proj = down
        self.num_experts = weight.parts()["weight"].shape[0]

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum (tokens, width) of the `chosen` (tokens, k) experts' outputs.

        An id of num_experts or more names no expert and adds nothing.
        """
        total = torch.zeros_like(hidden)
        for expert in torch.unique(chosen).tolist():
            if expert >= self.num_experts:
                continue
            tokens, places = torch.where(chosen == expert)
            outputs = self._expert(hidden[tokens], expert) * weights[tokens, places, None]
            total.index_add_(0, tokens, outputs.to(total.dtype))
        return total

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        inner: Any = self.inner
        y = self._multiply(self.entry_name, x, expert)
        y = inner._apply_gate(y) if inner.has_gate else inner.act_fn(y)
        y = self._multiply("down_proj", y, expert)
        post_norm = getattr(inner, "has_post_expert_norm", False)
        y = inner.post_expert_norm(y) if post_norm else y
        assert isinstance(y, Tensor)
        return y

    def _multiply(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = self.get_submodule(name)
        assert isinstance(weight, PackedWeight)
        y = weight.multiply(x, expert)
        return y + getattr(self.inner, f"{name}_bias")[expert] if self.inner.has_bias else y
