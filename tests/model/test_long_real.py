"""A long text in chunks through our runner gives the logits of one whole forward of transformers.

2,048 tokens here; STRONGROOM_TEST_LONG_TOKENS asks for more, up to the demo model's 8,192. These were run
once by hand, 2026-11-23, in chunks of 256, fp32: logits differ by 1.2e-6, 1.2e-6, 1.5e-6, 7.6e-7 and 1.3e-6
of their norm after 256 tokens, a quarter, a half, three quarters and all; the best token is the same at each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from container.engine.step import ROW_SAMPLES
from container.model.build import assemble
from container.model.shape import RunnerConfig, physical_cores
from container.model.source import DirectorySource
from tests.model.driving import BLOCK, Driver
from tests.model.serving import real_text
from tests.model.stand_in import GreedySampler, score

TOKENS = int(os.environ.get("STRONGROOM_TEST_LONG_TOKENS", "2048"))
CHUNK = 256
THREADS = min(2, physical_cores())
TOLERANCE = (
    2e-5  # of the logits' norm: fp32 sums in another order, through 30 layers; five times what is measured
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Building a runner changes torch's thread count for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chunked_logits(checkpoint: Path, tokens: list[int]) -> dict[int, Tensor]:
    """Return the logits after each chunk's last token, by its position."""
    samplers: list[GreedySampler] = []

    def make(vocabulary: int) -> GreedySampler:
        samplers.append(GreedySampler(vocabulary))
        return samplers[-1]

    config = RunnerConfig(
        sequence_tokens=len(tokens),
        running_limit=1,
        step_tokens=CHUNK,
        kv_mib=1600,
        block_tokens=BLOCK,
        prefix_cache=False,
        dtype="float32",
        threads=THREADS,
    )
    runner, facts = assemble(config, DirectorySource(checkpoint), lambda _: None, make, score)
    assert facts.runner == "native"
    driver = Driver(runner)
    sequence = driver.start(0, tokens)
    found = {}
    while sequence.computed < len(tokens):
        driver.row(sequence, min(CHUNK, len(tokens) - sequence.computed), ROW_SAMPLES)
        driver.step()
        found[sequence.computed - 1] = samplers[0].logits[0]
    runner.close()
    return found


def whole_logits(checkpoint: Path, tokens: list[int], positions: list[int]) -> Tensor:
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = model(
            input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=torch.tensor(positions)
        ).logits[0]
    return logits


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_a_long_text_in_chunks_has_the_logits_of_one_whole_forward(demo_checkpoint: Path) -> None:
    tokens = real_text(demo_checkpoint)[:TOKENS]
    assert len(tokens) == TOKENS
    found = chunked_logits(demo_checkpoint, tokens)
    last = TOKENS - 1
    positions = [CHUNK - 1, TOKENS // 4 - 1, TOKENS // 2 - 1, TOKENS * 3 // 4 - 1, last]
    expected = whole_logits(demo_checkpoint, tokens, positions)
    apart = [
        float((found[position] - row).norm() / row.norm())
        for position, row in zip(positions, expected, strict=True)
    ]
    print(f"\n{TOKENS} tokens in chunks of {CHUNK}: relative difference", [f"{each:.1e}" for each in apart])
    assert max(apart) < TOLERANCE
    assert [int(found[position].argmax()) for position in positions] == expected.argmax(-1).tolist()
