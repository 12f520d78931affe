"""Quantized shards against the quantized whole: the real model among three ranks, small ones among two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from container.model import fused
from container.model.group import Group
from container.model.quantize_modules import plain_activations
from container.model.rows import PackedRow
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource, ModelSource
from container.model.start import build_runner
from tests.model.ranks import together
from tests.model.serving import real_text
from tests.model.tiny import ARCHITECTURES, BASE, TinySource, tiny_source

REAL = RunnerConfig(sequence_tokens=128, running_limit=2, kv_mib=64, threads=1, dtype="float32")
TINY = RunnerConfig(sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1, dtype="float32")
LIMIT = 0.03  # of the norm of all logits
# Layers sum over ranks in another order, so a rounding of activations may fall otherwise; with activations
# left as they are, what differs is the quantization of the weights alone.
ROUNDING = 1e-4


def logits(config: RunnerConfig, source: ModelSource, tokens: list[int], group: Group | None) -> Tensor:
    """Return (tokens, vocabulary) on rank 0, nothing elsewhere."""
    runner, facts = build_runner(config, source, lambda phrase: None, group)
    assert isinstance(runner, NativeRunner)
    assert facts.quantize == config.quantize
    with plain_activations():
        computed = runner.packed.logits([PackedRow(0, 0, tokens, range(len(tokens)))])
    return torch.empty(0) if computed is None else computed


def error(config: RunnerConfig, source: ModelSource, tokens: list[int], size: int) -> float:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fused, "fuse", lambda *_: None)  # which always quantizes activations; see test_fused
        whole = logits(config, source, tokens, None)
    parts = together(size, lambda group: logits(config, source, tokens, group))[0]
    return float((parts - whole).norm() / whole.norm())


@pytest.mark.real_model
@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-int8", "int8-block", "int4-block"])
def test_the_real_model_in_three_quantized_parts_gives_the_logits_of_the_whole(
    demo_checkpoint: Path, scheme: str
) -> None:
    tokens = real_text(demo_checkpoint)[:24]
    source = DirectorySource(demo_checkpoint)
    assert error(replace(REAL, quantize=scheme), source, tokens, 3) < LIMIT


def aligned_source(kind: str) -> TinySource:
    """Return a small model whose widths are whole blocks of every scheme on each of two ranks."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    config = AutoConfig.for_model(kind, **{**BASE, **ARCHITECTURES[kind], **wide})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data.normal_(0.0, 0.1)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return TinySource({"config.json": json.dumps(config.to_dict()).encode()}, tensors)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["int8-block", "int4-block", "bnb-nf4"])
def test_aligned_parts_of_small_models_differ_from_the_whole_by_rounding_alone(
    kind: str, scheme: str
) -> None:
    config = replace(TINY, quantize=scheme)
    assert error(config, aligned_source(kind), [5, 9, 11, 4, 8, 33, 2, 90], 2) < ROUNDING


def test_parts_that_do_not_fit_whole_blocks_are_told() -> None:
    """48 inputs per rank: left in full precision by blocks of 32, in smaller blocks than usual by nf4."""
    facts = together(
        2,
        lambda group: build_runner(
            replace(TINY, quantize="int8-block"), tiny_source("llama"), lambda phrase: None, group
        )[1],
    )
    assert all("left (width)" in each.quantized for each in facts)
    facts = together(
        2,
        lambda group: build_runner(
            replace(TINY, quantize="bnb-nf4"), tiny_source("llama"), lambda phrase: None, group
        )[1],
    )
    assert all("smaller blocks than usual, so that shards may differ" in each.quantized for each in facts)
