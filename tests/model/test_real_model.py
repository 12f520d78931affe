"""The demo model: the tokens of `model.generate`, and batching that pays."""

from __future__ import annotations

import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from container.engine.step import Runner
from container.model.build import assemble
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from tests.model.driving import BLOCK, greedy
from tests.model.stand_in import GreedySampler, score

pytestmark = pytest.mark.real_model
NEW_TOKENS = 12


@cache
def runner_for(path: Path) -> Runner:
    config = RunnerConfig(
        sequence_tokens=2048, running_limit=32, kv_mib=2048, block_tokens=BLOCK, dtype="float32", threads=1
    )
    runner, facts = assemble(config, DirectorySource(path), lambda phase: None, GreedySampler, score)
    assert facts.runner == "native"
    return runner


@cache
def reference_for(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(100, 40_000) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("length", [1, 2, 17, 64, 257])
def test_greedy_tokens_equal_those_of_generate(demo_checkpoint: Path, length: int) -> None:
    (prompt,) = prompts([length])
    (answer,) = greedy(runner_for(demo_checkpoint), [prompt], NEW_TOKENS, chunk=64)
    ids = torch.tensor([prompt])
    expected = reference_for(demo_checkpoint).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert answer == expected[0, length:].tolist()


def test_32_requests_together_cost_a_third_of_one_after_another(demo_checkpoint: Path) -> None:
    """CPU time of this process: other work on the machine does not blur the ratio."""
    runner = runner_for(demo_checkpoint)
    asked = prompts([(4, 8, 16, 24)[index % 4] for index in range(32)])
    begun_s = time.process_time()
    together = greedy(runner, asked, NEW_TOKENS, chunk=8)
    together_s = time.process_time() - begun_s
    begun_s = time.process_time()
    alone = [greedy(runner, [prompt], NEW_TOKENS, chunk=64)[0] for prompt in asked[:8]]
    alone_s = (time.process_time() - begun_s) * 4  # eight of the thirty-two, each length twice
    assert together[:8] == alone
    assert alone_s >= 3 * together_s
