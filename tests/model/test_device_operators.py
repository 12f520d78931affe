"""Each operator of a device by two answers: plain torch, and an accelerator's kernels interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from container.kernels.gpu import layer_reference
from container.model.device import Activation, Dense, Fp8, HeadShape, Int4, LayerPages, StepRows, Weight
from container.model.device_cpu import PlainOperators
from container.model.device_triton import (
    DECODE_PROGRAMS,
    MOST_SPLITS,
    TritonOperators,
    fp8_linear,
    tuning_for,
)
from container.model.device_weights import fp8, int4
from tests.model import devices
from tests.model.devices import NO_CAPTURES, continued, prompts
from tests.model.driving import greedy

PLAIN, KERNELS = PlainOperators(), TritonOperators()
SHAPE = HeadShape(4, 2, 16, 0.25)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def rows(decodes: bool) -> tuple[StepRows, LayerPages]:
    counts, lengths = ((1, 1, 1), (9, 1, 20)) if decodes else ((4, 1, 6), (9, 1, 20))
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    table = torch.arange(1, 19, dtype=torch.int32).view(3, 6)
    size = LayerPages(*(random(20, 4, 2, 16, seed=s) for s in (1, 2)))
    ints = torch.zeros(int(starts[-1]), dtype=torch.int32)
    lines = torch.tensor([2, 0, 1], dtype=torch.int32)
    return StepRows(starts, torch.tensor(lengths, dtype=torch.int32), lines, table, ints, ints, decodes), size


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_both_attend_alike(decodes: bool, deterministic: bool, window: int | None) -> None:
    held, pages = rows(decodes)
    shape = HeadShape(4, 2, 16, 0.25, window)
    query = random(int(held.starts[-1]), 4, 16)
    mine = TritonOperators(deterministic=deterministic).attend(query, shape, held, pages)
    torch.testing.assert_close(mine, PLAIN.attend(query, shape, held, pages), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", list(Activation))
def test_both_norm_and_gate_alike(activation: Activation) -> None:
    hidden, weight = random(3, 64), random(64, seed=1)
    for kernels, plain in (
        (KERNELS.gated(hidden, activation), PLAIN.gated(hidden, activation)),
        (KERNELS.rms_norm(hidden, weight, 1e-5), PLAIN.rms_norm(hidden, weight, 1e-5)),
        (
            KERNELS.rms_norm(hidden, weight, 1e-5, residual=random(3, 64, seed=2)),
            PLAIN.rms_norm(hidden, weight, 1e-5, residual=random(3, 64, seed=2)),
        ),
    ):
        torch.testing.assert_close(kernels, plain, atol=1e-5, rtol=1e-5)


def forms() -> list[Weight]:
    weight, bias = random(48, 128, seed=4) / 11, random(48, seed=5)
    eight, four = fp8(weight, bias), int4(weight, bias)
    assert isinstance(eight, Fp8) and isinstance(four, Int4)
    return [Dense(weight, bias), eight, four]


@pytest.mark.parametrize("form", range(3))
def test_both_multiply_alike_and_near_the_whole_weight(form: int) -> None:
    hidden, weight = random(5, 128), forms()[form]
    whole = PLAIN.linear(hidden, forms()[0])
    limit = (1e-5, 0.06, 0.25)[form] * float(whole.abs().max())
    assert float((PLAIN.linear(hidden, weight) - whole).abs().max()) <= limit
    if form != 1:  # the interpreter rounds to fp8 wrongly; the product itself is tested below
        torch.testing.assert_close(
            KERNELS.linear(hidden, weight), PLAIN.linear(hidden, weight), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_the_fp8_product_is_rows_times_scales(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_scaled_mm`, which the CPU has too, against plain products, on rows rounded by the reference."""
    hidden, weight = random(tokens, 128), forms()[1]
    assert isinstance(weight, Fp8)
    from container.kernels.gpu import layer

    monkeypatch.setattr(
        layer,
        "quantize_rows",
        lambda x, _: layer.Quantized(*layer_reference.quantized(x, torch.float8_e4m3fn)),
    )
    want = PLAIN.linear(hidden, Fp8(weight.weight, weight.scales))
    torch.testing.assert_close(fp8_linear(hidden, weight), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("pack", [fp8, int4])
def test_a_width_that_a_format_does_not_have_stays_as_it_is(pack: devices.Pack) -> None:
    assert isinstance(pack(random(24, 24), None), Dense)


def test_a_quantized_decoder_still_continues_its_prompt() -> None:
    """fp8 weights move logits by percents, not the best of them on a clear prompt."""
    given = prompts(9, 6)
    found = greedy(devices.runner("llama", captures=NO_CAPTURES, pack=fp8), given, 1, 16)
    want = [continued("llama", prompt, 1) for prompt in given]
    assert sum(mine == own for mine, own in zip(found, want, strict=True)) >= 1


def test_decodes_are_cut_until_the_device_is_full_and_no_further() -> None:
    wide = HeadShape(32, 8, 128, 0.1)
    splits = [tuning_for(wide, count, decodes=True).splits for count in (1, 4, 16, 64, 256)]
    assert splits[0] == MOST_SPLITS and splits[-1] == 1
    assert splits == sorted(splits, reverse=True)
    for count, cut in zip((4, 16, 64), splits[1:4], strict=True):
        assert DECODE_PROGRAMS / 2 < cut * count * 8 <= DECODE_PROGRAMS or cut == MOST_SPLITS
    assert tuning_for(wide, 64, decodes=False).splits == 1


def test_a_group_wider_than_a_block_gets_a_wider_one() -> None:
    assert tuning_for(HeadShape(128, 1, 64, 0.1), 4, decodes=False).block_rows == 128
