"""RMS norms become one call where it gives their numbers, in whichever of three ways they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from container.model.surgery import Part, fuse
from container.model.surgery_norm import RMSNorm, TwiceRoundedRMSNorm, WideRMSNorm

WIDTH = 48


class Norm(nn.Module):
    """w * cast(n)"""

    def __init__(self, dtype: torch.dtype, eps: float = 1e-5) -> None:
        super().__init__()
        noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
        self.weight = nn.Parameter((1 + 0.3 * noise).to(dtype), requires_grad=False)
        self.variance_epsilon = eps

    def normal(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.normal(hidden).to(hidden.dtype)


class OffsetNorm(Norm):
    """cast((1 + w) * n)"""

    def forward(self, hidden: Tensor) -> Tensor:
        return ((1.0 + self.weight.float()) * self.normal(hidden)).to(hidden.dtype)


class OnceRoundedNorm(Norm):
    """cast(w * n)"""

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.weight * self.normal(hidden)).to(hidden.dtype)


class Centred(Norm):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class OtherEps(Norm):
    def normal(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon * 10)


class Clipped(Norm):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.clamp(-50, 50))


class OverTokens(Norm):
    def normal(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        mean = wide.pow(2).mean((-2, -1), keepdim=True)
        return wide * torch.rsqrt(mean + self.variance_epsilon)


class Gated(Norm):
    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        result = super().forward(hidden)
        return result if gate is None else result * gate


class Biased(Norm):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.bias = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)


class Raising(Norm):
    def forward(self, hidden: Tensor) -> Tensor:
        raise RuntimeError("not today")


class TupleNorm(Norm):
    def forward(self, hidden: Tensor) -> Any:
        return (super().forward(hidden),)


def operated(norm: nn.Module) -> tuple[nn.Module, int]:
    model = nn.Sequential(norm)
    count = fuse(model).counts[Part.NORM]
    return model[0], count


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = ((1, 9, WIDTH), (3, WIDTH), (1, 4, 5, WIDTH))
    return [
        (torch.randn(shape, generator=generator) * size).to(dtype)
        for shape in shapes
        for size in (1e-3, 1.0, 300.0)
    ]


@pytest.mark.parametrize("norm", [Norm, OffsetNorm, OnceRoundedNorm])
def test_in_float32_every_way_is_one_call(norm: type[Norm]) -> None:
    original = norm(torch.float32)
    fused, count = operated(original)
    assert (count, type(fused)) == (1, RMSNorm)
    for hidden in inputs(torch.float32):
        torch.testing.assert_close(fused(hidden), original(hidden), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "form"),
    [(Norm, TwiceRoundedRMSNorm), (OffsetNorm, WideRMSNorm), (OnceRoundedNorm, RMSNorm)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_each_way_is_rounded_as_the_model_rounds(
    norm: type[Norm], form: type[RMSNorm], dtype: torch.dtype
) -> None:
    original = norm(dtype)
    fused, count = operated(original)
    assert (count, type(fused)) == (1, form)
    for hidden in inputs(dtype):
        result, expected = fused(hidden), original(hidden)
        assert result.dtype == dtype
        assert (result == expected).float().mean() >= 0.999  # sums in another order may cross a rounding


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_the_size_of_eps_is_kept(eps: float) -> None:
    original = Norm(torch.float32, eps)
    fused, _ = operated(original)
    assert isinstance(fused, RMSNorm)
    hidden = inputs(torch.float32)[0] * eps
    torch.testing.assert_close(fused(hidden), original(hidden))


@pytest.mark.parametrize("norm", [Centred, OtherEps, Clipped, OverTokens, Gated, Biased, Raising, TupleNorm])
def test_a_norm_that_computes_anything_else_is_left(norm: type[Norm]) -> None:
    original = norm(torch.float32)
    assert operated(original) == (original, 0)


@pytest.mark.parametrize("original", [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False), nn.Linear(3, 3)])
def test_layers_of_other_kinds_are_left(original: nn.Module) -> None:
    assert operated(original) == (original, 0)


def test_a_norm_without_a_number_for_eps_is_left() -> None:
    original = Norm(torch.float32)
    original.variance_epsilon = None  # type: ignore[assignment]
    assert operated(original) == (original, 0)


def test_a_norm_with_weights_that_are_no_numbers_is_left() -> None:
    original = Norm(torch.float32)
    original.weight[3] = float("nan")
    assert operated(original) == (original, 0)


def test_a_norm_that_someone_listens_to_is_left() -> None:
    original = Norm(torch.float32)
    original.register_forward_hook(lambda module, arguments, result: None)
    assert operated(original) == (original, 0)


def test_a_norm_of_our_own_is_left_since_it_may_talk_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Norm(torch.float32)
    monkeypatch.setattr(Norm, "__module__", "container.model.other")
    assert operated(original) == (original, 0)


def test_undone_the_original_stands_in_its_place() -> None:
    original = Norm(torch.bfloat16)
    model = nn.Sequential(original)
    fused = fuse(model)
    assert model[0] is not original
    fused.undo()
    assert model[0] is original
