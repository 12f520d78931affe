"""Root mean square norms as one call of torch's own.

Owns: the three ways models write this norm, and the modules that stand for them.
Must not know: architectures and class names.
Invariant: what is installed gave the original numbers in the working dtype on ordinary, tiny and huge input.

With n = x / sqrt(mean(x * x) + eps) in fp32, models return w * cast(n), cast((1 + w) * n) or cast(w * n).
`torch.nn.functional.rms_norm` computes the last, which in fp32 is all of them. In half precision each has a
form that rounds where the model rounds: rounding the first only once is the better arithmetic, but moved the
demo model's bf16 logits by 1.5 % (random tokens), as much as bf16 differs from fp32.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from container.model.surgery_check import ROWS, agree, output, plain, random_input

EPS_NAMES: Final = ("variance_epsilon", "eps")
HUGE: Final = 100.0  # a sum of squares that half precision would not hold


class RMSNorm(nn.Module):
    """cast(w * n): one call."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class TwiceRoundedRMSNorm(RMSNorm):
    """w * cast(n): norm, product."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * functional.rms_norm(hidden, self.weight.shape, None, self.variance_epsilon)


class WideRMSNorm(RMSNorm):
    """cast(w * n) where w is kept in fp32, since rounding 1 + w would cost digits: cast, norm, cast."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float()).to(hidden.dtype)


def fuse_norm(module: nn.Module) -> nn.Module | None:
    """Return the shortest faithful form of `module`, or None where it is no RMS norm over its last axis."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if weight is None or eps is None or len(module._parameters) != 1 or weight.dim() != 1:
        return None
    if weight.is_meta or next(module.children(), None) is not None or not plain(module):
        return None
    inputs = _inputs(weight, eps)
    expected = [output(module, hidden) for hidden in inputs]
    best: nn.Module | None = None
    least = float("inf")
    for form in _forms(weight, eps):
        results = [output(form, hidden) for hidden in inputs]
        if all(agree(result, want) for result, want in zip(results, expected, strict=True)):
            error = sum(_error(result, want) for result, want in zip(results, expected, strict=True))
            if error < least:  # of equals the first: it has the fewest kernels
                best, least = form.eval(), error
    return best


def _forms(weight: nn.Parameter, eps: float) -> list[nn.Module]:
    offset = weight.float() + 1.0
    if weight.dtype == torch.float32:
        return [RMSNorm(weight, eps), RMSNorm(offset, eps)]
    return [RMSNorm(weight, eps), TwiceRoundedRMSNorm(weight, eps), WideRMSNorm(offset, eps)]


def _inputs(weight: Tensor, eps: float) -> list[Tensor]:
    """Return random input of two ranks: ordinary, so small that eps counts, and huge."""
    width = weight.shape[0]
    ordinary = random_input((*ROWS, width), weight)
    return [ordinary, ordinary * eps**0.5, random_input((1, 2, 3, width), weight) * HUGE]


def _error(result: Tensor | None, want: Tensor | None) -> float:
    """Return the summed difference in units of the largest number; on agreeing tensors only."""
    assert result is not None and want is not None
    return float((result.double() - want.double()).abs().sum() / want.double().abs().max())


def _eps(module: nn.Module) -> float | None:
    for name in EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float) and value >= 0:
            return value
    return None
