"""Every architecture gives its own logits and tokens through its runner, however its tokens are packed."""

from __future__ import annotations

import random

import pytest
import torch

from container.model.probe import probe_structure
from container.model.replay import ProbeFailed
from tests.model.architectures import TABLE, render
from tests.model.driving import Driven, Driver, built, greedy
from tests.model.tiny import ARCHITECTURES, VOCABULARY, reference_model, tiny_config

COMPAT = ("qwen3_next", "falcon_h1", "lfm2", "bloom", "mpt")
NATIVE = tuple(kind for kind in ARCHITECTURES if kind not in COMPAT)
TOLERANCE = 1e-4  # relative; fp32 sums in another order give up to about 5e-6


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def reference_row(kind: str, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference_model(kind)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def assert_row(kind: str, row: torch.Tensor, tokens: list[int]) -> None:
    expected = reference_row(kind, tokens)
    assert (row - expected).norm() <= TOLERANCE * expected.norm()


def test_the_list_holds_at_least_twenty_native_architectures() -> None:
    assert len(NATIVE) >= 20


@pytest.mark.parametrize("kind", NATIVE)
def test_native_architectures_pass_both_probes(kind: str) -> None:
    _, facts, _ = built(kind)
    assert (facts.runner, facts.reason) == ("native", None)
    assert probe_structure(tiny_config(kind)), "the structural probe could not judge this configuration"


@pytest.mark.parametrize("kind", COMPAT)
def test_architectures_with_state_outside_attention_run_on_compat(kind: str) -> None:
    _, facts, _ = built(kind)
    assert facts.runner == "compat"
    assert facts.reason is not None
    with pytest.raises(ProbeFailed):
        probe_structure(tiny_config(kind))


@pytest.mark.parametrize("kind", NATIVE)
def test_packed_chunks_in_any_order_give_the_reference_logits(kind: str) -> None:
    rng = random.Random(kind)
    runner, _, sampler = built(kind)
    runner.reset()
    driver = Driver(runner)
    live = [driver.start(slot, random_tokens(rng, rng.randint(5, 40))) for slot in range(4)]
    spare = [4, 5]
    while live:
        rng.shuffle(live)
        advanced = live[: rng.randint(1, len(live))]
        for sequence in advanced:
            left = len(sequence.tokens) - sequence.computed
            driver.row(sequence, min(left, rng.choice((1, 1, 2, 3, 5, 9))))
        driver.step()
        for sequence in advanced:
            assert_row(kind, sampler.logits[sequence.slot], sequence.tokens[: sequence.computed])
        for sequence in [s for s in live if s.computed == len(s.tokens)]:
            live.remove(sequence)
            driver.release(sequence)
        if live and rng.random() < 0.3:
            preempted = rng.choice(live)
            spare.append(preempted.slot)
            driver.preempt(preempted, spare.pop(0))
    runner.reset()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_generate(kind: str) -> None:
    rng = random.Random(kind + " greedy")
    runner, _, _ = built(kind)
    runner.reset()
    prompts = [random_tokens(rng, count) for count in (1, 4, 7, 17, 30)]
    answers = greedy(runner, prompts, 12, chunk=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference_model(kind).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_a_preempted_sequence_goes_on_with_the_same_logits(kind: str) -> None:
    runner, _, sampler = built(kind)
    runner.reset()
    driver = Driver(runner)
    sequence = driver.start(0, random_tokens(random.Random(3), 27))
    driver.row(sequence, 18)
    driver.step()
    driver.preempt(sequence, 3)
    assert sequence.computed == 16
    driver.row(sequence, 11)
    driver.step()
    assert_row(kind, sampler.logits[3], sequence.tokens)
    runner.reset()


def test_two_sequences_restored_from_the_same_blocks_do_not_touch_each_other() -> None:
    rng = random.Random(8)
    runner, _, sampler = built("llama")
    runner.reset()
    driver = Driver(runner)
    shared = random_tokens(rng, 16)
    first = driver.start(0, shared + random_tokens(rng, 3))
    driver.row(first, 19)
    driver.step()
    others = [Driven(shared + random_tokens(rng, 5), 9, blocks=dict(first.blocks)) for _ in range(2)]
    for slot, other in zip((1, 2), others, strict=True):
        driver.preempt(other, slot)
        driver.row(other, len(other.tokens) - other.computed)
    driver.step()
    for other in others:
        assert_row("llama", sampler.logits[other.slot], other.tokens)
    runner.reset()


def test_the_table_of_architectures_is_current() -> None:
    assert TABLE.read_text(encoding="utf-8") == render()
