"""The demo model quantized: how far its answers move."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from container.model.quantize import quantize
from container.model.quantize_choose import Scheme
from tests.model.serving import real_text

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]

WINDOW_TOKENS = 128
WINDOWS = 4
# (mean KL, top-1 agreement) per scheme: the bar for int8-block; for nf4 about twice of what was measured
# (0.239, 0.755 over 1024 tokens), so that a fault shows. bnb-int8 measured 0.031 and 0.900, fp8 (emulated)
# 0.030 and 0.902. int4-block is not judged here: the model was made from blocks of that form and comes
# through without loss.
BARS = {Scheme.INT8_BLOCK: (0.01, 0.95), Scheme.BNB_NF4: (0.5, 0.65)}


@cache
def reference_for(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@cache
def windows(path: Path) -> list[Tensor]:
    text = real_text(path)
    return [torch.tensor([text[at : at + WINDOW_TOKENS]]) for at in range(0, WINDOWS * 20011, 20011)]


def log_probabilities(model: Any, path: Path) -> Tensor:
    with torch.inference_mode():
        rows = [model(input_ids=ids, use_cache=False).logits[0] for ids in windows(path)]
    return torch.cat(rows).double().log_softmax(-1)


@cache
def expected(path: Path) -> Tensor:
    return log_probabilities(reference_for(path), path)


@pytest.mark.parametrize("scheme", BARS)
def test_quality_stays_within_its_bars(demo_checkpoint: Path, scheme: Scheme) -> None:
    before = expected(demo_checkpoint)
    model = copy.deepcopy(reference_for(demo_checkpoint))
    quantize(model, scheme)
    after = log_probabilities(model, demo_checkpoint)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    agreement = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    print(f"{scheme.value}: KL {divergence:.4f}, top-1 {agreement:.3f}")
    most, least = BARS[scheme]
    assert divergence <= most
    assert agreement >= least
