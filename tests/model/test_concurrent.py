"""Sixty-four requests at once on too little memory get what each gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from container.engine.engine import Engine
from container.engine.request import EngineRequest, FinishReason, RequestKey, SamplingParams
from container.engine.step import Capacity, Runner, StepPlan, StepResult
from container.model.kv_pages import PagedKV
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from container.model.start import build_runner
from tests.model.serving import CONNECTION, GREEDY, PATIENT, Answers, ask, native_runner, real_text, serve
from tests.model.tiny import VOCABULARY, tiny_source

REQUESTS = 64
CANCELLED_EARLY = range(5, REQUESTS, 16)  # waiting, in the prompt, or just begun
CANCELLED_LATE = range(13, REQUESTS, 16)  # in the middle of the answer
SAMPLED = (
    SamplingParams(temperature=0.8, seed=7),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=8),
    SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=9),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.5),
)


class Cramped:
    """A runner that owns up to `tokens` tokens of KV only: the smallest budget is roomy for a tiny model.

    `most_pages`: how many pages it ever held, where it keeps pages; it is sized to hold one per block.
    """

    def __init__(self, runner: Runner, tokens: int) -> None:
        self._runner = runner
        whole = runner.capacity()
        blocks = tokens // whole.block_tokens
        packed = getattr(runner, "packed", None)
        self._pages = packed.kv if packed is not None and isinstance(packed.kv, PagedKV) else None
        resident = tokens if whole.prefix_cache and self._pages is None else None
        self._capacity = replace(whole, blocks=blocks, resident_tokens=resident)
        self.most_pages = 0

    def capacity(self) -> Capacity:
        return self._capacity

    def run(self, plan: StepPlan) -> StepResult:
        result = self._runner.run(plan)
        if self._pages is not None:
            self._pages.check()
            self.most_pages = max(self.most_pages, self._pages.held_pages)
        return result

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


def mixed_requests(text: Sequence[int], longest: int, most_new: int) -> list[EngineRequest]:
    """Return requests of all lengths up to `longest`; two of three greedy, many with a common beginning."""
    rng = random.Random(64)
    requests = []
    for number in range(REQUESTS):
        length = max(1, round(longest ** rng.random()))
        at = 0 if number % 4 == 0 else rng.randrange(len(text) - length)
        sampling = SAMPLED[number // 3 % len(SAMPLED)] if number % 3 == 0 else GREEDY
        requests.append(ask(number, text[at : at + length], rng.randint(most_new // 2, most_new), sampling))
    return requests


def assert_equal_alone(runner: Runner, requests: Sequence[EngineRequest]) -> None:
    engine = Engine(runner, PATIENT)

    def leave(step: int, answers: Answers) -> None:
        gone = [number for number in CANCELLED_EARLY if step == number // 4]
        gone += [number for number in CANCELLED_LATE if len(answers[number].tokens) == 2]
        for number in gone:
            engine.cancel(RequestKey(CONNECTION, number))
            engine.check()

    together = serve(engine, requests, leave)
    stats = engine.stats()
    assert stats.preemptions > 0, "the pool was not small enough"
    assert stats.failed_steps == 0
    assert stats.completed == REQUESTS - stats.cancelled
    runner.reset()
    for number, request in enumerate(requests):
        # An engine of its own each time: nothing is in its prefix cache.
        alone = serve(Engine(runner, PATIENT), [request])[number]
        got = together[number]
        if got.finish is FinishReason.CANCELLED:
            assert got.tokens == alone.tokens[: len(got.tokens)]
        else:
            assert got == alone
        runner.reset()
    cut = {number for number, answer in together.items() if answer.finish is FinishReason.CANCELLED}
    assert cut == {*CANCELLED_EARLY, *CANCELLED_LATE}
    assert all(len(together[number].tokens) == 2 for number in CANCELLED_LATE)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "falcon_h1"])
def test_64_tiny_requests_with_preemption_and_cancels_equal_their_solo_runs(kind: str) -> None:
    config = RunnerConfig(
        sequence_tokens=96,
        running_limit=16,
        step_tokens=48,
        kv_mib=1,
        block_tokens=4,
        dtype="float32",
        threads=1,
    )
    runner, _ = build_runner(config, tiny_source(kind), lambda phase: None)
    assert_equal_alone(Cramped(runner, 144), tiny_requests(kind))


def test_64_tiny_requests_on_pages_never_hold_more_pages_than_the_pool_has_blocks() -> None:
    config = RunnerConfig(
        sequence_tokens=96,
        running_limit=16,
        step_tokens=48,
        kv_mib=1,
        block_tokens=4,
        dtype="float32",
        threads=1,
        quantize="int8-block",
    )
    runner, facts = build_runner(config, tiny_source("llama"), lambda phase: None)
    assert facts.operators == "fused"
    assert runner.capacity().resident_tokens is None
    cramped = Cramped(runner, 144)
    assert_equal_alone(cramped, tiny_requests("llama"))
    assert cramped.most_pages == cramped.capacity().blocks, "the pool was never full, or overfull"


def tiny_requests(kind: str) -> list[EngineRequest]:
    rng = random.Random(kind)
    text = [rng.randrange(3, VOCABULARY) for _ in range(512)]
    return mixed_requests(text, longest=64, most_new=24)


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_64_requests_with_preemption_and_cancels_equal_their_solo_runs(demo_checkpoint: Path) -> None:
    config = RunnerConfig(
        sequence_tokens=160,
        running_limit=32,
        step_tokens=64,
        kv_mib=80,
        block_tokens=4,
        dtype="float32",
        threads=1,
    )
    runner = native_runner(config, DirectorySource(demo_checkpoint))
    assert_equal_alone(runner, mixed_requests(real_text(demo_checkpoint), longest=120, most_new=12))
    runner.close()
