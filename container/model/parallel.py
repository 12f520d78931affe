"""Modules that make one rank's part of a layer give the whole layer's result.

Owns: sums over ranks after row-parallel layers and experts, norms over a width that ranks share.
Must not know: plans, files, which part of the model this rank holds.
Invariant: until `arm` is called nothing here talks to another rank, so that layers can be tried one by one
while they load; afterwards every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from container.model.errors import ShardRefused
from container.model.group import Group

NORM_TOLERANCE: Final = 1e-6  # relative, float32: two ways to write one formula


class Parallel(nn.Module):
    """A module whose result needs the other ranks; `group` is None until armed."""

    group: Group | None = None


class RowParallel(Parallel):
    """A linear layer that holds some of the input columns: products are summed, then the bias is added.

    `inner` computes without bias and may be exchanged for a quantized layer.
    """

    def __init__(self, inner: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.inner = inner
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., out) for this rank's (..., own in)."""
        product: Tensor = self.inner(hidden)
        if self.group is not None:
            product = self.group.all_reduce(product.contiguous())
        return product if self.bias is None else product + self.bias


class SummedExperts(Parallel):
    """Experts that hold some of their inner columns: the combined result is summed once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        combined: Tensor = self.inner(*args, **kwargs)
        return combined if self.group is None else self.group.all_reduce(combined.contiguous())


class WideNorm(Parallel):
    """RMS norm over a width of which this rank holds `weight`'s part.

    One sum of squares per token is added up over the ranks. `copies` says how many ranks hold the same part.
    """

    def __init__(
        self, weight: nn.Parameter, epsilon: float, width: int, copies: int, cast_first: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.width = width
        self.copies = copies
        self.cast_first = cast_first  # whether the product with the weight is made in the narrow dtype

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.group is None:
            mean = squares / hidden.shape[-1]
        else:
            mean = self.group.all_reduce(squares) / (self.width * self.copies)
        wide = wide * torch.rsqrt(mean + self.epsilon)
        if self.cast_first:
            return self.weight * wide.to(hidden.dtype)
        return (self.weight * wide).to(hidden.dtype)


def wide_norm(norm: nn.Module, width: int, copies: int) -> WideNorm:
    """Return `norm`, whose weight is cut already, as a norm over `width`.

    Which of the usual formulas `norm` computes is found out on random input; raises ShardRefused when none.
    """
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(epsilon, float) or not isinstance(weight, nn.Parameter):
        raise ShardRefused("a norm over all heads is of no known kind")
    generator = torch.Generator().manual_seed(3)
    probe = torch.randn((2, 5, len(weight)), generator=generator).to(weight.dtype)
    # A fresh checkpoint's weights are all ones and would let a wrong formula pass: try with others.
    kept = weight.data
    with torch.no_grad():
        weight.data = torch.randn(len(weight), generator=generator).to(kept.dtype)
        try:
            expected = norm(probe).float()
            for cast_first in (True, False):
                candidate = WideNorm(weight, epsilon, width, copies, cast_first)
                found = candidate(probe).float()
                if bool((found - expected).norm() <= NORM_TOLERANCE * expected.norm()):
                    return candidate
        finally:
            weight.data = kept
    raise ShardRefused("a norm over all heads is of no known kind")


def parallel_modules(model: nn.Module) -> Iterator[Parallel]:
    """Yield the modules of `model` that need the other ranks, in the model's order."""
    return (module for module in model.modules() if isinstance(module, Parallel))


def arm(model: nn.Module, group: Group) -> None:
    """Let the modules of `model` talk to the other ranks from now on."""
    for module in parallel_modules(model):
        module.group = group
