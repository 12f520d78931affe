"""Products with int4 blocks: every instruction set and team against the definition in plain torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from container.kernels import blocks, int4, int8
from container.kernels.block_weight import ArrangedBlocks, Kind
from container.kernels.operators import Native
from container.model.quantize_blocks import Int4Block, quantize_activations

FORM = Int4Block()
# A kernel that adds in another order may be off by (2 * blocks + 3) * 2**-23 of the sum of |terms|.
EPSILON = 2.0**-23
SHAPES = [(8, 32), (1, 32), (7, 64), (16, 96), (33, 160), (64, 576), (129, 1536)]


@pytest.fixture(params=list(itertools.product(["plain", "avx2", None], [1, 3])), ids=str)
def native(request: pytest.FixtureRequest) -> Native:
    isa, threads = request.param
    return Native(threads, isa)


def seeded(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(
    outputs: int, inputs: int, bias: bool = False, shift: float = 0.0
) -> tuple[dict[str, Tensor], ArrangedBlocks]:
    parts = FORM.pack(seeded(outputs, inputs, seed=outputs + inputs) + shift)
    return parts, arranged(parts, seeded(outputs, seed=3) if bias else None)


def arranged(parts: dict[str, Tensor], bias: Tensor | None = None) -> ArrangedBlocks:
    return int4.arrange(parts["weight"], parts["weight_scale"], parts["weight_low"], bias)


def defined(x: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the definition without its roundings, (tokens, outputs), and the error that it allows."""
    values, scales = (each.double() for each in quantize_activations(x))
    halves = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), -1)
    steps = halves.double().view(len(halves), -1, 32)
    dots = torch.einsum("tbk,obk->tob", values, steps) * parts["weight_scale"].double() * scales.mT
    lows = (values.sum(-1, keepdim=True) * scales).mT * parts["weight_low"].double()
    allowed = (2 * dots.shape[-1] + 3) * EPSILON * (dots.abs() + lows.abs()).sum(-1) + 1e-30
    return (dots + lows).sum(-1), allowed


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_product_is_the_definitions_within_its_bound(
    native: Native, outputs: int, inputs: int, tokens: int, shift: float
) -> None:
    parts, held = weight(outputs, inputs, shift=shift)
    x = seeded(tokens, inputs)
    exact, allowed = defined(x, parts)
    error = (blocks.multiply(native, held, x).double() - exact).abs()
    assert bool((error <= allowed).all())


def test_the_bound_is_narrower_than_a_step_of_any_value(native: Native) -> None:
    """It would not hide one wrong half byte, one wrong scale or one forgotten low."""
    parts, _ = weight(16, 96)
    x = seeded(3, 96)
    exact, allowed = defined(x, parts)
    for name, changed in (
        ("weight", parts["weight"] ^ torch.eye(16, 48).to(torch.uint8)),
        ("weight_scale", parts["weight_scale"] * 1.001),
        ("weight_low", parts["weight_low"] * 1.001),
    ):
        error = (blocks.multiply(native, arranged(parts | {name: changed}), x).double() - exact).abs()
        assert bool((error > allowed).any()), name


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_plain_activations_are_multiplied_as_they_are(
    native: Native, outputs: int, inputs: int, shift: float
) -> None:
    parts, held = weight(outputs, inputs, shift=shift)
    x = seeded(5, inputs)
    expected = x.double() @ FORM.unpack(parts).double().T
    error = (blocks.multiply(native, held, x, plain=True) - expected).norm() / expected.norm()
    assert error < 1e-6


def test_quantized_activations_cost_their_rounding_alone(native: Native) -> None:
    """What differs from torch's form, which leaves them as they are: as much as under int8-block."""
    parts, held = weight(64, 576)
    x = seeded(5, 576)
    expected = FORM.multiply(x, parts)
    assert 1e-4 < (blocks.multiply(native, held, x) - expected).norm() / expected.norm() < 0.01


def test_a_token_does_not_depend_on_those_beside_it_or_on_the_team() -> None:
    _, held = weight(72, 576)
    x = seeded(9, 576)
    for isa in ("plain", None):
        whole = blocks.multiply(Native(1, isa), held, x)
        for threads in (1, 2, 3):
            native = Native(threads, isa)
            assert torch.equal(blocks.multiply(native, held, x), whole)
            for row in range(9):
                assert torch.equal(blocks.multiply(native, held, x[row : row + 1])[0], whole[row])


def test_rows_that_lie_apart_are_multiplied_as_rows_that_do_not(native: Native) -> None:
    _, held = weight(16, 64)
    wide = seeded(5, 200)
    for apart in (wide[:, 3:67], wide[::2, :64], seeded(64, 5).T):
        assert torch.equal(
            blocks.multiply(native, held, apart), blocks.multiply(native, held, apart.contiguous())
        )


def test_activations_are_quantized_as_defined(native: Native) -> None:
    x = torch.cat((seeded(6, 96), seeded(2, 96) * 1e-3, seeded(2, 96) * 1e6, torch.zeros(1, 96)))
    x[0, :32] = 2.0**-101  # counts as zeros
    x[1, 40] = 1000.0  # one large value flattens its own block only
    x[2, :32] = torch.arange(32) - 15.5  # ties
    x[3, 32:64] = 5.0  # the largest sum there is
    values, scales, sums = blocks.quantize(native, x, Kind.INT4)
    expected, expected_scales = quantize_activations(x)
    assert values.dtype == torch.int8 and torch.equal(values.float(), expected.flatten(1))
    assert torch.equal(scales, expected_scales.squeeze(-1))
    assert torch.equal(sums, expected.sum(-1) * scales)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(native: Native, poison: float) -> None:
    _, held = weight(16, 64)
    x = seeded(5, 64)
    clean = blocks.multiply(native, held, x)
    x[2, 33] = poison
    y = blocks.multiply(native, held, x)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert not blocks.multiply(native, held, x, plain=True)[2].isfinite().any()


@pytest.mark.parametrize("value", [127.0, -127.0])
def test_the_largest_products_do_not_overflow(native: Native, value: float) -> None:
    """15 * 127 in every place of a block is what its sums of 16 bits must hold."""
    steps = torch.full((8, 768), 255, dtype=torch.uint8)
    halves = torch.ones(8, 48, dtype=torch.float16)
    held = int4.arrange(steps, halves, -halves)
    y = blocks.multiply(native, held, torch.full((4, 1536), value))
    assert torch.equal(y, torch.full((4, 8), 1536 * 14.0 * value))


def test_blocks_without_a_step_are_their_lowest_value(native: Native) -> None:
    """All-equal blocks, of zeros too: their scale is zero."""
    dense = torch.zeros(8, 96)
    dense[1:4] = 0.25
    dense[5, 32:64] = -3.0
    held, x = arranged(FORM.pack(dense)), torch.ones(2, 96)
    for plain in (True, False):
        assert torch.allclose(blocks.multiply(native, held, x, plain=plain), x @ dense.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1e-33, 1e-20, 1e30])
def test_tiny_and_huge_activations_neither_overflow_nor_vanish(native: Native, factor: float) -> None:
    parts, held = weight(16, 96)
    x = seeded(3, 96) * factor
    exact, allowed = defined(x, parts)
    smallest = 0.0 if factor > 1e-30 else float(x.abs().max())  # may count as zeros
    error = (blocks.multiply(native, held, x).double() - exact).abs()
    assert bool((error <= allowed + smallest).all())


def test_half_scales_and_lows_of_every_size_are_read(native: Native) -> None:
    """Normal, subnormal, zero, both signs: as torch reads them."""
    numbers = torch.tensor([1.0, -2.0, 6e-8, 5.9e-5, 6.2e-5, 65504.0, 0.0, -3e-7]).half().view(8, 1)
    one = torch.zeros(8, 16, dtype=torch.uint8)
    one[:, 0] = 1
    first = torch.eye(1, 32)
    scaled = blocks.multiply(native, int4.arrange(one, numbers, numbers * 0), first, plain=True)
    lowest = blocks.multiply(native, int4.arrange(one * 0, numbers, numbers), first, plain=True)
    assert torch.equal(scaled[0], numbers.float().flatten()) and torch.equal(lowest, scaled)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_arranging_only_moves_bits(outputs: int, inputs: int) -> None:
    parts, held = weight(outputs, inputs, bias=True)
    restored = int4.restore(held)
    assert all(torch.equal(a, b) for a, b in zip(restored, parts.values(), strict=True))
    assert held.kind is Kind.INT4 and held.values.nbytes == -(-outputs // 8) * 8 * inputs // 2
    assert sum(part.nbytes for part in held.arrays()) == held.padded_outputs * (
        inputs // 2 + 4 * (inputs // 32) + 4
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_joined_weights_multiply_as_the_several_did_and_come_apart_again(interleaved: bool) -> None:
    native = Native(1)
    several = [arranged(FORM.pack(seeded(24, 64, seed=99))), weight(24, 64, bias=True)[1]]
    joined = blocks.join(several, interleaved=interleaved)
    x = seeded(3, 64)
    apart = [blocks.multiply(native, each, x) for each in several]
    together = blocks.multiply(native, joined, x)
    if interleaved:
        groups = together.view(3, 6, 8)
        together = torch.cat((groups[:, ::2].reshape(3, 24), groups[:, 1::2].reshape(3, 24)), dim=1)
    assert torch.equal(together, torch.cat(apart, dim=1))
    for ours, whole in zip(blocks.split(joined, [24, 24], interleaved=interleaved), several, strict=True):
        assert ours.lows is not None and whole.lows is not None
        assert np.array_equal(ours.values, whole.values) and np.array_equal(ours.lows, whole.lows)
        assert np.array_equal(ours.scales, whole.scales) and ours.kind is Kind.INT4


def test_what_does_not_fit_is_refused() -> None:
    native = Native(1)
    parts, held = weight(8, 64)
    halves = torch.zeros(8, 2, dtype=torch.float16)
    with pytest.raises(AssertionError, match="rows of inputs"):
        blocks.multiply(native, held, seeded(2, 32))
    with pytest.raises(AssertionError, match="blocks of 32"):
        int4.arrange(parts["weight"][:, :20], halves, halves)
    with pytest.raises(AssertionError, match="half scales"):
        int4.arrange(parts["weight"], halves, halves.float())
    with pytest.raises(AssertionError, match="half scales"):
        int4.arrange(parts["weight"].to(torch.int8), halves, halves)
    eight = int8.arrange(torch.zeros(8, 64, dtype=torch.int8), halves)
    with pytest.raises(AssertionError, match="same kind"):
        blocks.join([held, eight])
    with pytest.raises(AssertionError, match="int4 blocks"):
        int4.restore(eight)
    with pytest.raises(AssertionError, match="int8 blocks"):
        int8.restore(held)
