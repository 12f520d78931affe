"""The runner's results follow the plan: who samples, who is scored, who failed, in row order."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch

from container.engine.request import SampledToken, SamplingParams
from container.engine.step import ROW_HOLDS_STOPS, ROW_PROMPT_LOGPROBS, ROW_SAMPLES, SlotAssignment, StepPlan
from container.model import runner as runner_module
from container.model.build import assemble
from container.model.fused_model import FusedModel
from container.model.kv_limits import KVBudgetExceeded
from container.model.runner import NativeRunner, plan_rows, triples
from tests.model.driving import CONFIG, Driver, built, greedy
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import VOCABULARY, reference_model, tiny_source

KINDS = ("llama", "gemma2", "gpt2", "qwen3_next", "bloom")


def tokens(count: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def fresh(kind: str) -> tuple[Driver, GreedySampler]:
    runner, _, sampler = built(kind)
    runner.reset()
    sampler.positions.clear()
    sampler.held.clear()
    return Driver(runner), sampler


def expected_logprobs(kind: str, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = reference_model(kind)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs_are_those_of_the_reference(kind: str) -> None:
    driver, _ = fresh(kind)
    prompt = tokens(19)
    sequence = driver.start(2, prompt, SamplingParams(temperature=0.0, prompt_logprobs=3))
    chunks = (8, 11) if driver.runner.capacity().chunked_prefill else (19,)
    scored: list[SampledToken] = []
    for index, count in enumerate(chunks):
        last = index == len(chunks) - 1
        driver.row(sequence, count, ROW_PROMPT_LOGPROBS | (ROW_SAMPLES if last else 0))
        row = driver.step().rows[0]
        assert (row.sampled is not None) == last
        assert len(row.prompt_logprobs) == count - last
        scored.extend(row.prompt_logprobs)
    expected = expected_logprobs(kind, prompt)
    assert [token.token for token in scored] == prompt[1:]
    for position, token in enumerate(scored):
        assert token.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)
        assert [pair[0] for pair in token.top] == expected[position].topk(3).indices.tolist()


def test_generated_history_is_not_scored_as_prompt() -> None:
    driver, _ = fresh("llama")
    history = tokens(10)
    sequence = driver.start(0, history, SamplingParams(temperature=0.0, prompt_logprobs=0))
    driver._plan.assigns[0] = SlotAssignment(
        0,
        SamplingParams(prompt_logprobs=0),
        (),
        prompt_tokens=6,
        cached_tokens=0,
        history=array("i", history),
    )
    driver.row(sequence, 10, ROW_PROMPT_LOGPROBS | ROW_SAMPLES)
    assert [token.token for token in driver.step().rows[0].prompt_logprobs] == history[1:6]


def test_long_prompts_are_scored_in_parts_without_a_gap() -> None:
    driver, _ = fresh("llama")
    prompt = tokens(150)
    sequence = driver.start(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=0))
    driver.row(sequence, 150, ROW_PROMPT_LOGPROBS)
    (row,) = driver.step().rows
    assert row.sampled is None
    assert not row.failed
    assert [token.token for token in row.prompt_logprobs] == prompt[1:]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_only_flagged_rows_have_results_and_they_keep_the_plans_order(kind: str) -> None:
    driver, sampler = fresh(kind)
    lengths = (4, 1, 6, 1, 3)
    flags = (ROW_SAMPLES, ROW_SAMPLES | ROW_HOLDS_STOPS, 0, ROW_SAMPLES, ROW_PROMPT_LOGPROBS | ROW_SAMPLES)
    for slot, (count, flag) in enumerate(zip(lengths, flags, strict=True)):
        driver.row(driver.start(slot, tokens(count, slot)), count, flag)
    result = driver.step()
    assert [row.row for row in result.rows] == [0, 1, 3, 4]
    assert sampler.positions == [4, 1, 1, 3]
    assert sampler.held == [False, True, False, False]
    for row, count in zip(result.rows, (4, 1, 1, 3), strict=True):
        best = int(expected_logprobs(kind, tokens(count, row.row))[-1].argmax())
        assert row.sampled == SampledToken(best)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_numerical_failure_fails_its_row_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, sampler = fresh(kind)
    drawn = sampler.sample

    def first_fails(logits: torch.Tensor, *rest: Any) -> list[SampledToken | None]:
        logits = logits.clone()
        logits[0, 0] = float("nan")
        return drawn(logits, *rest)

    monkeypatch.setattr(sampler, "sample", first_fails)
    for slot in range(2):
        driver.row(driver.start(slot, tokens(3, slot)), 3)
    first, second = driver.step().rows
    assert (first.failed, first.sampled) == (True, None)
    assert not second.failed
    assert second.sampled is not None


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_plan_without_rows_still_frees_slots(kind: str) -> None:
    driver, sampler = fresh(kind)
    sequence = driver.start(1, tokens(5))
    driver.row(sequence, 5)
    driver.step()
    assert list(sampler.assigned) == [1]
    driver.release(sequence)
    assert driver.step().rows == []
    assert sampler.assigned == {}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_reused_slot_knows_nothing_of_its_predecessor(kind: str) -> None:
    driver, sampler = fresh(kind)
    driver.row(driver.start(0, tokens(30)), 30)
    driver.step()
    driver._plan.releases.append(0)
    driver.row(driver.start(0, tokens(4, 9)), 4)
    driver.step()
    expected = expected_logprobs(kind, tokens(4, 9))[-1]
    torch.testing.assert_close(sampler.logits[0].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_runner_works_on_after_reset(kind: str) -> None:
    driver, sampler = fresh(kind)
    driver.row(driver.start(0, tokens(30)), 30)
    driver.step()
    driver.runner.reset()
    assert sampler.assigned == {}
    prompt = tokens(6, 4)
    assert greedy(driver.runner, [prompt], 3, 8) == greedy(driver.runner, [prompt], 3, 2)


def test_after_reset_no_block_can_be_restored() -> None:
    driver, _ = fresh("llama")
    sequence = driver.start(0, tokens(9))
    driver.row(sequence, 9)
    driver.step()
    driver.runner.reset()
    driver.preempt(sequence, 1)
    with pytest.raises(KeyError):
        driver.step()
    driver.runner.reset()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_closing_wipes_and_lets_go(kind: str) -> None:
    runner, _ = assemble(CONFIG, tiny_source(kind), lambda phase: None, GreedySampler, score)
    greedy(runner, [tokens(5)], 2, 8)
    runner.close()
    if isinstance(runner, NativeRunner):
        assert runner._packed.kv.slab_bytes == 0
    with pytest.raises(TypeError):
        greedy(runner, [tokens(5)], 2, 8)


@pytest.mark.parametrize("quantize", ["none", "int8-block"])
def test_large_pages_are_asked_for_all_weights_and_no_longer_after_closing(
    monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    class Asked:
        def __init__(self, blocks: list[tuple[int, int]]) -> None:
            self.blocks, self.closed = blocks, False
            asked.append(self)

        def close(self) -> None:
            self.closed = True

    asked: list[Asked] = []
    monkeypatch.setattr(runner_module, "LargePages", Asked)
    config = replace(CONFIG, quantize=quantize)
    runner, _ = assemble(config, tiny_source("llama"), lambda phase: None, GreedySampler, score)
    assert isinstance(runner, NativeRunner)
    (one,) = asked
    assert sum(size for _, size in one.blocks) == runner.packed.weight_bytes > 0
    assert len({address for address, _ in one.blocks}) == len(one.blocks)
    embedding = (
        runner.packed.weights.embedding.ctypes.data
        if isinstance(runner.packed, FusedModel)
        else next(runner.packed._model.parameters()).data_ptr()  # type: ignore[attr-defined]
    )
    assert embedding in {address for address, _ in one.blocks}
    assert not one.closed
    runner.close()
    assert one.closed


def test_sequences_beyond_the_resident_limit_raise_and_the_runner_recovers() -> None:
    driver, _ = fresh("llama")
    kv = driver.runner._packed.kv  # type: ignore[attr-defined]
    limits = kv._limits
    kv._limits = type(limits)(limits.slots, limits.sequence_tokens, limits.block_tokens, limits.blocks, 20)
    try:
        for slot in range(2):
            driver.row(driver.start(slot, tokens(15, slot)), 15)
        with pytest.raises(KVBudgetExceeded):
            driver.step()
        driver.runner.reset()
        assert greedy(driver.runner, [tokens(5)], 2, 8)
    finally:
        kv._limits = limits


def test_compat_refuses_a_row_that_does_not_continue_its_sequence() -> None:
    driver, _ = fresh("bloom")
    sequence = driver.start(0, tokens(8))
    sequence.computed = 3
    driver.row(sequence, 2)
    with pytest.raises(AssertionError, match="continue"):
        driver.step()
    driver.runner.reset()


def test_rows_must_account_for_every_token() -> None:
    plan = StepPlan(1)
    plan.slots.append(0)
    plan.starts.append(0)
    plan.counts.append(2)
    plan.flags.append(ROW_SAMPLES)
    plan.tokens.extend((1, 2, 3))
    with pytest.raises(AssertionError, match="token count"):
        plan_rows(plan)


def test_a_cut_array_of_triples_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="cut short"):
        list(triples([1, 2, 3, 4]))
