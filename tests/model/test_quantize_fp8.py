"""fp8: the emulation that defines the arithmetic of the tensor cores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from container.model.quantize_format import Obstacle
from container.model.quantize_fp8 import LARGEST, Fp8, to_fp8


def weight(seed: int, outputs: int = 48, inputs: int = 96) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_largest_of_each_row_becomes_448_and_comes_back_exactly() -> None:
    values, scale = to_fp8(weight(1))
    assert (values.float().abs().amax(-1) == LARGEST).all()
    torch.testing.assert_close(scale * LARGEST, weight(1).abs().amax(-1))


def test_errors_stay_within_three_bits_of_mantissa() -> None:
    dense = weight(2)
    values, scale = to_fp8(dense)
    back = values.float() * scale.unsqueeze(-1)
    smallest_normal = scale.unsqueeze(-1) * 2.0**-6
    bound = torch.maximum(dense.abs() / 16, smallest_normal / 16)  # half a unit in the last place
    assert ((back - dense).abs() <= bound * 1.001).all()


def test_the_product_is_that_of_the_rounded_operands() -> None:
    form, x = Fp8(), torch.randn(7, 96, generator=torch.Generator().manual_seed(3))
    parts = form.pack(weight(4))
    values, scale = to_fp8(x)
    expected = (values.double() * scale.double().unsqueeze(-1)) @ form.unpack(parts).double().t()
    torch.testing.assert_close(form.multiply(x, parts).double(), expected, rtol=1e-5, atol=1e-6)
    exact = x @ weight(4).t()
    assert (form.multiply(x, parts) - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    form = Fp8()
    assert form.multiply(torch.randn(2, 96).to(dtype), form.pack(weight(5).to(dtype))).dtype == dtype


def test_zero_rows_and_huge_ones_stay_finite() -> None:
    form, dense = Fp8(), weight(6)
    dense[3] = 0
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(7)) * torch.tensor(
        [[0.0], [1e-30], [1e30]]
    )
    y = form.multiply(x, form.pack(dense))
    assert y.isfinite().all()
    assert (y[:, 3] == 0).all()
    assert (y[0] == 0).all()


def test_one_tokens_outlier_does_not_reach_another_token() -> None:
    form, x = Fp8(), torch.randn(3, 96, generator=torch.Generator().manual_seed(8))
    parts = form.pack(weight(9))
    wild = x.clone()
    wild[0] *= 1e4
    assert torch.equal(form.multiply(wild, parts)[1:], form.multiply(x, parts)[1:])


def test_parts_are_as_announced_and_sizes_are_multiples_of_16() -> None:
    form = Fp8()
    parts = form.pack(weight(10))
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        name: (torch.Size(part.shape), part.dtype) for name, part in form.parts(48, 96).items()
    }
    assert form.obstacle(48, 96) is None
    assert form.obstacle(40, 96) is Obstacle.WIDTH
    assert form.obstacle(48, 72) is Obstacle.WIDTH


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_by_rows_hold_the_bits_of_the_whole(ranks: int) -> None:
    whole = Fp8().pack(weight(11))
    shards = [Fp8().pack(shard) for shard in weight(11).chunk(ranks, 0)]
    assert torch.equal(torch.cat([s["weight_scale"] for s in shards]), whole["weight_scale"])
    bits = torch.cat([s["weight"].view(torch.uint8) for s in shards])
    assert torch.equal(bits, whole["weight"].view(torch.uint8))
