"""Norm, gate, rotation with cache write and rounding to 8 bits against plain torch, by Triton's interpreter.

The interpreter cuts bfloat16 instead of rounding it, and loses the carry of an fp8 number that rounds up to
the next power of two: bfloat16 is compared to within two steps, fp8 on numbers that need no rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from container.kernels.gpu import layer, layer_reference
from container.kernels.gpu.layer import Gate, HeadNorms, Pool, Rotation, Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEPS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}
WIDTHS = (1, 7, 64, 100, 576)
E4M3 = torch.tensor([0.0, 2**-6, 0.875, -1.0, 1.125, 3.25, -26.0, 120.0, 240.0, -416.0])


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), want.float(), atol=STEPS[dtype], rtol=STEPS[dtype])


def exact_rows(rows: int, width: int) -> Tensor:
    """Return rows that fp8 holds exactly: each has 448 in it, so that its scale is 1."""
    picked = E4M3[torch.randint(len(E4M3), (rows, width), generator=torch.Generator().manual_seed(4))]
    picked[:, width // 2] = 448.0
    return picked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_is_that_of_torch(width: int, dtype: torch.dtype) -> None:
    hidden, weight = random(5, width, dtype=dtype), random(width, seed=1, dtype=dtype)
    out = torch.empty_like(hidden)
    layer.rms_norm(hidden, weight, out, 1e-5)
    want = torch.nn.functional.rms_norm(hidden.float(), (width,), weight.float(), 1e-5)
    close(out, want, dtype)
    close(out, layer_reference.rms_norm(hidden, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_adds_to_the_residual_first(dtype: torch.dtype) -> None:
    hidden, residual, weight = (random(3, 48, seed=s, dtype=dtype) for s in (1, 2, 3))
    residual_there, own = residual.clone(), hidden.clone()
    out = torch.empty_like(hidden)
    want = layer_reference.rms_norm(hidden, weight[0], 1e-6, residual=residual_there, offset=1.0)
    layer.rms_norm(hidden, weight[0], out, 1e-6, residual=residual, offset=1.0)
    close(residual, residual_there, dtype)
    close(out, want, dtype)
    assert torch.equal(hidden, own)


@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_a_norm_of_tiny_and_huge_rows_is_finite(scale: float) -> None:
    hidden, out = scale * random(4, 64), torch.empty(4, 64)
    layer.rms_norm(hidden, torch.ones(64), out, 1e-6)
    close(out, layer_reference.rms_norm(hidden, torch.ones(64), 1e-6), torch.float32)


def test_a_norm_writes_no_other_row_or_column() -> None:
    around = torch.full((6, 70), 777.0)
    layer.rms_norm(random(4, 60), torch.ones(60), around[1:5, :60], 1e-6)
    assert bool((around[:, 60:] == 777.0).all()) and bool((around[[0, 5]] == 777.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("width", [1, 33, 64])
def test_a_gate_multiplies_what_it_lets_through(gate: Gate, width: int, dtype: torch.dtype) -> None:
    gate_up = 3 * random(4, 2 * width, dtype=dtype)
    out = torch.empty(4, width, dtype=dtype)
    layer.gated(gate_up, out, gate)
    close(out, layer_reference.gated(gate_up, gelu=gate is Gate.GELU_TANH), dtype)


@pytest.mark.parametrize("gate", list(Gate))
def test_a_gate_far_from_zero_is_open_or_shut(gate: Gate) -> None:
    gate_up = torch.tensor([[80.0, -80.0, 0.0, 1.0, 1.0, 1.0]])
    out = torch.empty(1, 3)
    layer.gated(gate_up, out, gate)
    torch.testing.assert_close(out, torch.tensor([[80.0, 0.0, 0.0]]))


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_in_int8_are_those_of_the_reference(width: int) -> None:
    hidden = random(6, width)
    hidden[2] = 0.0
    hidden[3] = 2.0**-120
    found = layer.quantize_rows(hidden, Rounding.INT8)
    numbers, scales = layer_reference.quantized(hidden, torch.int8)
    assert torch.equal(found.numbers, numbers) and torch.equal(found.scales, scales)
    assert float(found.scales[2]) == 1.0 and not found.numbers[3].any()
    assert bool((found.numbers.float().abs().amax(1)[[0, 1, 4, 5]] == 127).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_in_fp8_are_those_of_the_reference(width: int) -> None:
    hidden = exact_rows(5, width) * torch.tensor([1.0, 2.0, 0.25, 2.0**10, 2.0**-9])[:, None]
    found = layer.quantize_rows(hidden, Rounding.FP8)
    numbers, scales = layer_reference.quantized(hidden, torch.float8_e4m3fn)
    assert torch.equal(found.numbers.float(), numbers.float()) and torch.equal(found.scales, scales)
    assert torch.equal(found.numbers.float() * found.scales[:, None], hidden)


def test_a_norm_and_a_gate_leave_in_8_bits() -> None:
    hidden, weight, gate_up = random(4, 96), random(96, seed=1), random(4, 192, seed=2)
    numbers, scales = torch.empty(4, 96, dtype=torch.int8), torch.empty(4)
    layer.rms_norm(hidden, weight, numbers, 1e-6, scales=scales)
    want = layer_reference.rms_norm(hidden, weight, 1e-6)
    assert float((numbers * scales[:, None] - want).abs().max()) <= 0.51 * float(scales.max())
    layer.gated(gate_up, numbers, Gate.SILU, scales=scales)
    want = layer_reference.gated(gate_up, gelu=False)
    assert float((numbers * scales[:, None] - want).abs().max()) <= 0.51 * float(scales.max())


def stored(
    dtype: torch.dtype, dim: int, half: int, *, fp8: bool = False, normed: bool = False, tokens: int = 7
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return queries, keys and values of the kernel and of the reference; two tokens are padding."""
    heads, kv_heads, pages, page = 3, 2, 5, 4
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    if fp8:  # exact in fp8, on their way through the scales too
        qkv = exact_rows(tokens * 7, dim).view(tokens, 7, dim)
    angles = random(40, half, seed=1)
    rotation = Rotation(angles.cos().contiguous(), angles.sin().contiguous())
    positions = torch.tensor([0, 39, 5, 5, 1, 2, 3], dtype=torch.int32)[:tokens]
    places = torch.tensor([7, -1, 19, 0, 4, -1, 12], dtype=torch.int32)[:tokens]
    scales = (torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0])) if fp8 else (None, None)
    norms = HeadNorms(random(dim, seed=2, dtype=dtype), random(dim, seed=3, dtype=dtype), 1e-5)
    results = []
    for kernel in (True, False):
        kept = torch.float8_e4m3fn if fp8 else dtype
        keys, values = (torch.full((pages, page, kv_heads, dim), 7.0).to(kept) for _ in range(2))
        queries = torch.full((tokens, heads, dim), 777.0, dtype=dtype)
        if kernel:
            pool = Pool(keys, values, *scales)
            layer.rotate_and_store(qkv, queries, rotation, positions, places, pool, norms if normed else None)
        else:
            layer_reference.rotate_and_store(
                qkv, queries, rotation.cosines, rotation.sines, positions, places, keys, values,
                None if scales[0] is None or scales[1] is None else (scales[0], scales[1]),
                (norms.query, norms.key, norms.epsilon) if normed else None,
            )  # fmt: skip
        results.append((queries, keys, values))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 40), (96, 16), (16, 0), (128, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotated_keys_and_values_reach_their_pages(
    dtype: torch.dtype, dim: int, half: int, normed: bool
) -> None:
    found, want = stored(dtype, dim, half, normed=normed)
    for mine, reference in zip(found, want, strict=True):
        close(mine, reference, dtype)
    written = (found[1].float() != 7.0).any(-1).any(-1).view(-1)
    assert written.nonzero()[:, 0].tolist() == [0, 4, 7, 12, 19]


def test_fp8_pages_hold_what_their_scales_divide() -> None:
    found, want = stored(torch.float32, 64, 0, fp8=True)
    for mine, reference in zip(found, want, strict=True):
        assert torch.equal(mine.float(), reference.float())


def test_padding_alone_writes_nothing() -> None:
    qkv, queries = random(2, 7, 16), torch.empty(2, 3, 16)
    keys = torch.full((2, 4, 2, 16), 7.0)
    pool = Pool(keys, keys.clone())
    rotation = Rotation(torch.ones(4, 8), torch.zeros(4, 8))
    nowhere = torch.full((2,), -1, dtype=torch.int32)
    layer.rotate_and_store(qkv, queries, rotation, torch.zeros(2, dtype=torch.int32), nowhere, pool)
    assert bool((pool.keys == 7.0).all()) and bool((pool.values == 7.0).all())


def test_the_reference_rotates_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, angles = random(5, 3, 16), random(5, 8, seed=1)
    whole, swapped = torch.cat((angles, angles), -1)[None], heads.transpose(0, 1)[None]
    want, _ = apply_rotary_pos_emb(swapped, swapped, whole.cos(), whole.sin())
    close(layer_reference.rotated(heads, angles.cos(), angles.sin()), want[0].transpose(0, 1), torch.float32)


def test_no_rows_launch_nothing() -> None:
    nothing = torch.empty(0, 8)
    layer.rms_norm(nothing, torch.ones(8), nothing, 1e-6)
    layer.gated(torch.empty(0, 16), nothing, Gate.SILU)
    assert layer.quantize_rows(nothing, Rounding.INT8).numbers.shape == (0, 8)


def test_tensors_of_another_shape_never_reach_a_kernel() -> None:
    hidden, out = random(4, 8), torch.empty(4, 8)
    with pytest.raises(AssertionError, match="shape"):
        layer.rms_norm(hidden, torch.ones(8), out[:3], 1e-6)
    with pytest.raises(AssertionError, match="scales"):
        layer.rms_norm(hidden, torch.ones(8), out.to(torch.int8), 1e-6)
    with pytest.raises(AssertionError, match="halves"):
        layer.gated(hidden, out, Gate.SILU)
    with pytest.raises(AssertionError, match="8 bits"):
        layer.quantize_rows(hidden, Rounding.NONE)
