"""Products with int8 blocks: every instruction set and team against the definition in plain torch."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from container.kernels import blocks, int8
from container.kernels.block_weight import ArrangedBlocks, Kind
from container.kernels.operators import Native
from container.model.quantize_blocks import Int8Block, quantize_activations

FORM = Int8Block()
# A kernel that adds in another order may be off by (blocks + 3) * 2**-23 of the sum of |terms|.
EPSILON = 2.0**-23
SHAPES = [(8, 32), (1, 32), (7, 64), (16, 96), (33, 160), (64, 576), (129, 1536)]


@pytest.fixture(params=list(itertools.product(["plain", "avx2", None], [1, 3])), ids=str)
def native(request: pytest.FixtureRequest) -> Native:
    isa, threads = request.param
    return Native(threads, isa)


def seeded(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(outputs: int, inputs: int, bias: bool = False) -> tuple[dict[str, Tensor], ArrangedBlocks]:
    parts = FORM.pack(seeded(outputs, inputs, seed=outputs + inputs))
    added = seeded(outputs, seed=3) if bias else None
    return parts, int8.arrange(parts["weight"], parts["weight_scale"], added)


def bound(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Return the error that the definition allows, (tokens, outputs)."""
    values, scales = quantize_activations(x)
    terms = torch.einsum("tbk,obk->tob", values, parts["weight"].float().view(len(parts["weight"]), -1, 32))
    terms *= scales.squeeze(-1)[:, None] * parts["weight_scale"].float()[None]
    return (terms.shape[-1] + 3) * EPSILON * terms.abs().sum(-1) + 1e-30


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_a_product_is_the_definitions_within_its_bound(
    native: Native, outputs: int, inputs: int, tokens: int
) -> None:
    parts, arranged = weight(outputs, inputs)
    x = seeded(tokens, inputs)
    values, scales = quantize_activations(x)
    stored = parts["weight"].double().view(outputs, -1, 32)
    dots = torch.einsum("tbk,obk->tob", values.double(), stored)
    exact = (dots * scales.double().squeeze(-1)[:, None] * parts["weight_scale"].double()[None]).sum(-1)
    error = (blocks.multiply(native, arranged, x).double() - exact).abs()
    assert bool((error <= bound(x, parts)).all())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_plain_activations_are_multiplied_as_they_are(native: Native, outputs: int, inputs: int) -> None:
    parts, arranged = weight(outputs, inputs)
    x = seeded(5, inputs)
    expected = x.double() @ FORM.unpack(parts).double().T
    error = (blocks.multiply(native, arranged, x, plain=True) - expected).norm() / expected.norm()
    assert error < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_nothing_beside_a_weights_outputs_is_written(native: Native, groups: int) -> None:
    """An odd weight's last group has no partner where two are computed at once."""
    _, arranged = weight(8 * groups, 64)
    for tokens in (1, 2, 4, 7, 8, 9, 17):
        x = seeded(tokens, 64)
        held = blocks.quantize(native, x, Kind.INT8)
        y = torch.full((tokens + 1, 8 * groups + 8), 42.0)
        native.call(
            "strongroom_multiply",
            ctypes.byref(arranged.structure),
            blocks.addresses(held),
            ctypes.c_int32(tokens),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(y.stride(0)),
        )
        assert torch.equal(y[:tokens, :-8], blocks.multiply(native, arranged, x))
        assert bool((y[:tokens, -8:] == 42.0).all()) and bool((y[tokens] == 42.0).all())


class Idle(Native):
    """Stands for the operators: what they would write into is only made."""

    def call(self, function: str, *arguments: object) -> None:
        assert function.startswith("strongroom_") and arguments


def test_results_have_float32s_room_whatever_the_process_makes_by_default() -> None:
    """While one thread builds a model, torch's default dtype is the model's: half the room for a result."""
    _, arranged = weight(16, 64)
    x = seeded(3, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, scales, sums = blocks.quantize(Idle(1), x, Kind.INT8)
        results = [blocks.multiply(Idle(1), arranged, x, plain=plain) for plain in (False, True)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {each.dtype for each in (scales, sums, *results)} == {torch.float32}


def test_a_token_does_not_depend_on_those_beside_it_or_on_the_team() -> None:
    _, arranged = weight(72, 576)
    x = seeded(9, 576)
    whole = blocks.multiply(Native(1), arranged, x)
    for threads in (1, 2, 3):
        native = Native(threads)
        assert torch.equal(blocks.multiply(native, arranged, x), whole)
        for row in range(9):
            assert torch.equal(blocks.multiply(native, arranged, x[row : row + 1])[0], whole[row])


def test_activations_are_quantized_as_defined(native: Native) -> None:
    x = torch.cat((seeded(6, 96), seeded(2, 96) * 1e-3, seeded(2, 96) * 1e6, torch.zeros(1, 96)))
    x[0, :32] = 2.0**-101  # counts as zeros
    x[1, 40] = 1000.0  # one large value flattens its own block only
    x[2, :32] = torch.arange(32) - 15.5  # ties
    values, scales, _ = blocks.quantize(native, x, Kind.INT8)
    expected, expected_scales = quantize_activations(x)
    assert torch.equal(values.float(), expected.flatten(1))
    assert torch.equal(scales, expected_scales.squeeze(-1))


def test_a_row_is_the_same_alone_and_among_more_than_a_tile_of_them(native: Native) -> None:
    _, arranged = weight(40, 1536)
    x = seeded(213, 1536)  # tiles hold 168 rows of so many bytes, or half as many of 16 bits
    together = blocks.multiply(native, arranged, x)
    for row in (0, 7, 83, 84, 85, 167, 168, 211, 212):
        assert torch.equal(together[row], blocks.multiply(native, arranged, x[row : row + 1])[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(native: Native, poison: float) -> None:
    _, arranged = weight(16, 64)
    x = seeded(5, 64)
    clean = blocks.multiply(native, arranged, x)
    x[2, 33] = poison
    y = blocks.multiply(native, arranged, x)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_the_largest_products_do_not_overflow(native: Native) -> None:
    values = torch.full((8, 1536), 127, dtype=torch.int8)
    values[1] = -127
    arranged = int8.arrange(values, torch.ones(8, 48, dtype=torch.float16))
    y = blocks.multiply(native, arranged, torch.full((4, 1536), 127.0))
    assert torch.equal(y[:, 0], torch.full((4,), 1536 * 127.0 * 127.0))
    assert torch.equal(y[:, 1], -y[:, 0])


def test_half_scales_of_every_size_are_read(native: Native) -> None:
    """Normal, subnormal, zero, both signs: as torch reads them."""
    scales = torch.tensor([1.0, -2.0, 6e-8, 5.9e-5, 6.2e-5, 65504.0, 0.0, -3e-7]).half().view(8, 1)
    arranged = int8.arrange(torch.eye(8, 32, dtype=torch.int8), scales)
    y = blocks.multiply(native, arranged, torch.eye(8, 32), plain=True)
    assert torch.equal(y.diagonal(), scales.float().flatten())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_arranging_only_moves_bytes(outputs: int, inputs: int) -> None:
    parts, arranged = weight(outputs, inputs, bias=True)
    values, scales = int8.restore(arranged)
    assert torch.equal(values, parts["weight"]) and torch.equal(scales, parts["weight_scale"])
    assert arranged.values.nbytes == -(-outputs // 8) * 8 * inputs


@pytest.mark.parametrize("interleaved", [False, True])
def test_joined_weights_multiply_as_the_several_did_and_come_apart_again(interleaved: bool) -> None:
    native = Native(1)
    pairs = [weight(24, 64), weight(24, 64, bias=True)]
    pairs[0] = (pairs[0][0], int8.arrange(*_packed(seeded(24, 64, seed=99))))
    arranged = [each for _, each in pairs]
    joined = blocks.join(arranged, interleaved=interleaved)
    x = seeded(3, 64)
    apart = [blocks.multiply(native, each, x) for each in arranged]
    together = blocks.multiply(native, joined, x)
    if interleaved:
        groups = together.view(3, 6, 8)
        together = torch.cat((groups[:, ::2].reshape(3, 24), groups[:, 1::2].reshape(3, 24)), dim=1)
    assert torch.equal(together, torch.cat(apart, dim=1))
    for ours, whole in zip(blocks.split(joined, [24, 24], interleaved=interleaved), arranged, strict=True):
        assert np.array_equal(ours.values, whole.values) and np.array_equal(ours.scales, whole.scales)


def _packed(values: Tensor) -> tuple[Tensor, Tensor]:
    parts = FORM.pack(values)
    return parts["weight"], parts["weight_scale"]


def test_what_does_not_fit_is_refused() -> None:
    native = Native(1)
    _, arranged = weight(8, 64)
    with pytest.raises(AssertionError, match="rows of inputs"):
        blocks.multiply(native, arranged, seeded(2, 32))
    with pytest.raises(AssertionError, match="blocks of 32"):
        int8.arrange(torch.zeros(8, 40, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.float16))
    with pytest.raises(AssertionError, match="half scales"):
        int8.arrange(torch.zeros(8, 32, dtype=torch.int8), torch.zeros(8, 1))
    with pytest.raises(AssertionError, match="same input"):
        blocks.join([arranged, weight(8, 32)[1]])
    with pytest.raises(AssertionError, match="only the last"):
        blocks.join([weight(7, 64)[1], arranged])
