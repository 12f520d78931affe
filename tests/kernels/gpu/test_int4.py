"""Weights of 4 bits against plain torch, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from container.kernels.gpu import int4, int4_reference
from tests.kernels.gpu.test_layer import DTYPES, random

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def weight(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return random(outputs, inputs, seed=seed) / inputs**0.5


@pytest.mark.parametrize("group", int4.GROUPS)
def test_packing_moves_a_number_by_half_a_step_at_most(group: int) -> None:
    whole = weight(5, 256)
    packed = int4.pack(whole, group)
    back = int4_reference.written_out(packed.packed, packed.scales)
    step = packed.scales.float().repeat_interleave(group, 1)
    assert bool(((back - whole).abs() <= 0.502 * step).all())
    assert packed.packed.numel() * 2 == whole.numel() and (packed.outputs, packed.inputs) == (5, 256)


def test_a_group_of_zeros_stays_zero() -> None:
    whole = weight(3, 128)
    whole[1, 32:64] = 0.0
    whole[2, :32] = 1e-12
    packed = int4.pack(whole, 32)
    back = int4_reference.written_out(packed.packed, packed.scales)
    assert not back[1, 32:64].any() and float(back[2, :32].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", int4.GROUPS)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33])
def test_few_and_many_rows_give_the_same_product(rows: int, group: int, dtype: torch.dtype) -> None:
    x, packed = random(rows, 256, dtype=dtype), int4.pack(weight(80, 256), group)
    want = int4_reference.linear(x, packed.packed, packed.scales)
    found = int4.linear(x, packed)
    assert found.dtype is dtype
    assert float((found.float() - want).abs().max()) <= LIMITS[dtype] * float(want.abs().max())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (64, 32), (65, 96), (100, 1056), (640, 64)])
def test_outputs_and_inputs_that_fill_no_block(outputs: int, inputs: int) -> None:
    x, packed = random(2, inputs), int4.pack(weight(outputs, inputs), 32)
    want = int4_reference.linear(x, packed.packed, packed.scales)
    torch.testing.assert_close(int4.linear(x, packed), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_written_out_is_the_packed_one(dtype: torch.dtype) -> None:
    packed = int4.pack(weight(7, 2304), 128)
    want = int4_reference.written_out(packed.packed, packed.scales).to(dtype)
    torch.testing.assert_close(int4.written_out(packed, dtype), want, atol=0, rtol=1e-3)


def test_a_row_does_not_depend_on_the_others() -> None:
    packed, x = int4.pack(weight(64, 64), 32), random(3, 64)
    poisoned = torch.cat((x[:1], torch.full((2, 64), float("nan"))))
    assert torch.equal(int4.linear(poisoned, packed)[0], int4.linear(x, packed)[0])


def test_no_rows_give_none() -> None:
    assert int4.linear(torch.empty(0, 64), int4.pack(weight(8, 64), 32)).shape == (0, 8)


@pytest.mark.parametrize(("inputs", "group"), [(64, 48), (100, 32)])
def test_a_group_that_the_kernel_does_not_know_is_refused(inputs: int, group: int) -> None:
    with pytest.raises(ValueError, match="`group`"):
        int4.pack(torch.zeros(4, inputs), group)
