"""Guessing ahead on real runners: what comes out is what comes out without it."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from container.engine import speculation
from container.engine.engine import Engine
from container.engine.request import EngineRequest, FinishReason, SampledToken, SamplingParams
from container.engine.stats import Stats
from container.engine.step import ROW_SAMPLES, Capacity, Runner, StepPlan, StepResult
from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits, LayerShape
from container.model.masks import Verdict
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from container.model.start import build_runner
from container.model.verify import draw_along
from container.ranks.plans import Order, decode, encode
from tests.model.divided import divided_source
from tests.model.driving import Driver
from tests.model.ranks import RankedRunner, ranked
from tests.model.serving import GREEDY, PATIENT, ask, native_runner, real_text
from tests.model.test_concurrent import Cramped
from tests.model.test_windows import Watched
from tests.model.tiny import VOCABULARY, tiny_source

DRAFTS = 4
CONFIG = RunnerConfig(
    sequence_tokens=256,
    running_limit=6,
    step_tokens=12,
    kv_mib=32,
    block_tokens=4,
    dtype="float32",
    threads=1,
    draft_tokens=DRAFTS,
)
KINDS = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe", "gpt2")
COLD = SamplingParams(temperature=0.3, seed=7)  # cold enough to repeat itself
ASKED = {
    "greedy": GREEDY,
    "seeded": COLD,
    "filtered": replace(COLD, temperature=0.6, top_p=0.9, top_k=20, min_p=0.02),
    "repetition penalty": replace(GREEDY, repetition_penalty=1.02),
    "other penalties": replace(COLD, frequency_penalty=0.05, presence_penalty=0.1),
    "bias": replace(GREEDY, logit_bias=((5, 1.5), (9, -2.0))),
    "logprobs": replace(COLD, top_logprobs=3),
    "prompt logprobs": replace(GREEDY, top_logprobs=0, prompt_logprobs=1),
}


@dataclass
class Told:
    """All that a request got."""

    tokens: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt: Sequence[SampledToken] | None = None


def told(engine: Engine, requests: Sequence[EngineRequest]) -> dict[int, Told]:
    answers = {request.key.id: Told() for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            answer = answers[delta.key.id]
            answer.tokens += delta.tokens
            answer.finish = delta.finish
            answer.prompt = answer.prompt or delta.prompt_logprobs
        engine.check()
    return answers


@dataclass
class Silent:
    """The same runner, never asked to verify anything."""

    runner: Runner

    def capacity(self) -> Capacity:
        return replace(self.runner.capacity(), draft_tokens=0)

    def run(self, plan: StepPlan) -> StepResult:
        assert not plan.drafts and not plan.truncates
        return self.runner.run(plan)

    def reset(self) -> None:
        self.runner.reset()

    def close(self) -> None:
        self.runner.close()


def assert_same(mine: Sequence[SampledToken] | None, theirs: Sequence[SampledToken] | None) -> None:
    assert (mine is None) == (theirs is None)
    for one, other in zip(mine or (), theirs or (), strict=True):
        assert one.token == other.token
        assert (one.logprob is None) == (other.logprob is None)
        assert math.isclose(one.logprob or 0.0, other.logprob or 0.0, abs_tol=1e-4)
        assert len(one.top) == len(other.top)
        for (_, mine_best), (_, other_best) in zip(one.top, other.top, strict=True):
            assert math.isclose(mine_best, other_best, abs_tol=1e-4)


class Oracle:
    """Guesses what is known to come, more or less: as many tokens as it may, one in four of them wrong."""

    known: ClassVar[list[list[int]]] = []

    rate = 1.0
    probing = True  # whatever it costs

    def __init__(self, tokens: int, rate: float) -> None:
        self._random = random.Random(tokens)

    def propose(self, history: array[int], most: int) -> array[int]:
        end = len(history)
        (whole, *_) = [tokens for tokens in self.known if tokens[:end] == history.tolist()]
        count = self._random.randint(0, most)
        drafts = [VOCABULARY - 1 - t if self._random.random() < 0.25 else t for t in whole[end : end + count]]
        return array("i", drafts)

    def settle(self, history: array[int], drafts: int, accepted: int) -> None:
        """It learns nothing."""


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "Guesses", Oracle)


def assert_guessing_changes_nothing(runner: Runner, requests: Sequence[EngineRequest]) -> Stats:
    """Run `requests` both ways, as many at once as run at once; return what was counted while guessing."""
    size = runner.capacity().slots
    engine = Engine(runner, PATIENT)
    for at in range(0, len(requests), size):
        part = requests[at : at + size]
        silent = Engine(Silent(runner), PATIENT)
        plain = told(silent, part)
        runner.reset()
        Oracle.known = [[*r.prompt, *(t.token for t in plain[r.key.id].tokens)] for r in part]
        guessed = told(engine, part)
        engine._scheduler.reset()  # with the runner: nothing is published there any more
        runner.reset()
        for number, answer in plain.items():
            assert guessed[number].finish is answer.finish
            assert_same(guessed[number].tokens, answer.tokens)
            assert_same(guessed[number].prompt, answer.prompt)
    return engine.stats()


def prompts(kind: str, count: int) -> list[list[int]]:
    """Half of them repeat themselves."""
    rng = random.Random(kind)
    made = []
    for number in range(count):
        part = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(3, 12))]
        made.append(part * 3 if number % 2 else part)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_same_with_and_without_guessing(kind: str, oracle: None) -> None:
    """Watched: slabs are wiped of what is taken back, rings too."""
    runner, facts = build_runner(CONFIG, tiny_source(kind), lambda _: None)
    assert facts.runner == "native" and isinstance(runner, NativeRunner)
    sampled = list(ASKED.values())
    requests = [
        ask(number, prompt, 60, sampled[number % len(sampled)])
        for number, prompt in enumerate(prompts(kind, 2 * len(sampled)))
    ]
    stats = assert_guessing_changes_nothing(Watched(runner), requests)
    assert min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > 100


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_output_is_the_same_under_preemption_and_hits(kind: str, oracle: None) -> None:
    runner, _ = build_runner(CONFIG, tiny_source(kind), lambda _: None)
    shared = prompts(kind, 2)[1]
    requests = [ask(n, shared + prompt, 60, COLD) for n, prompt in enumerate(prompts(kind, 6))]
    stats = assert_guessing_changes_nothing(Cramped(runner, 200), requests)
    assert min(stats.preemptions, stats.prefix_hit_tokens, stats.accepted_tokens) > 0


@pytest.mark.parametrize("step_tokens", [5, 6, 9])
@pytest.mark.parametrize("block_tokens", [1, 2, 4])
def test_a_ring_outlasts_the_drafts_that_are_taken_back(
    step_tokens: int, block_tokens: int, oracle: None
) -> None:
    """Steps and blocks so short that windows and drafts alone decide how long a ring must be."""
    config = replace(CONFIG, step_tokens=step_tokens, block_tokens=block_tokens, running_limit=2)
    runner, _ = build_runner(config, tiny_source("mistral"), lambda _: None)
    assert isinstance(runner, NativeRunner)
    requests = [ask(n, prompt, 80, COLD) for n, prompt in enumerate(prompts("ring", 4))]
    stats = assert_guessing_changes_nothing(Watched(runner), requests)
    assert min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > 30


@pytest.mark.parametrize("place", [4, 9, 17, 30])
def test_a_stop_id_ends_the_answer_where_it_would_without_guessing(place: int, oracle: None) -> None:
    runner = native_runner(CONFIG, tiny_source("llama"))
    requests = [ask(n, prompt, 60) for n, prompt in enumerate(prompts("stops", 6))]
    first = told(Engine(Silent(runner), PATIENT), requests)
    stopping = [
        replace(
            request,
            stop_token_ids=frozenset({first[request.key.id].tokens[place].token}),
            min_tokens=min_tokens,
        )
        for request, min_tokens in zip(requests, (0, 0, 3, place, place + 3, 40), strict=True)
    ]
    runner.reset()
    assert assert_guessing_changes_nothing(runner, stopping).accepted_tokens > 0


class Follower:
    """A rank that knows of a plan what the ring tells it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def run(self, plan: StepPlan) -> StepResult:
        heard = decode(encode(Order.RUN, plan)).plan
        assert heard is not None
        return self.runner.run(heard)


def test_two_ranks_verify_together(oracle: None) -> None:
    runner = ranked(CONFIG, divided_source("llama", 2), 2)[0]
    runner = RankedRunner([runner.runners[0], Follower(runner.runners[1])])  # type: ignore[list-item]
    requests = [ask(n, prompt, 50, COLD if n % 2 else GREEDY) for n, prompt in enumerate(prompts("two", 6))]
    whole = told(Engine(Silent(native_runner(CONFIG, divided_source("llama", 2))), PATIENT), requests)
    Oracle.known = [[*r.prompt, *(t.token for t in whole[r.key.id].tokens)] for r in requests]
    engine = Engine(runner, PATIENT)
    guessed = told(engine, requests)
    stats = engine.stats()
    assert min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > 30
    for number, answer in whole.items():
        assert_same(guessed[number].tokens, answer.tokens)


def test_a_compat_runner_verifies_nothing() -> None:
    runner, facts = build_runner(CONFIG, tiny_source("falcon_h1"), lambda _: None)
    assert facts.runner == "compat"
    assert runner.capacity().draft_tokens == 0
    assert native_runner(CONFIG, tiny_source("llama")).capacity().draft_tokens == DRAFTS


def test_a_draft_that_cannot_be_drawn_after_fails_in_the_step_that_comes_to_it() -> None:
    """NaN at a later position of a row costs nothing that was drawn before it."""
    runner = native_runner(CONFIG, tiny_source("llama"))
    driver = Driver(runner)
    sequence = driver.start(0, [5, 6, 7])
    driver.row(sequence, 3)
    first = driver.step().rows[0].sampled
    assert first is not None
    spoilt = [Spoilt(at) for at in range(3)]
    row = torch.zeros(3, 8)
    assert [len(draw_along(each, row, 0, 4, False, array("i", [0, 0]))) for each in spoilt] == [0, 1, 2]
    assert spoilt[2].positions == [4, 5, 6]


@dataclass
class Spoilt:
    """Draws token 0, but nothing at its `at`-th position; `complete` after so many."""

    at: int
    complete: int = 99
    positions: list[int] = field(default_factory=list)

    def verdict(self, slot: int) -> Verdict:
        return Verdict.COMPLETE if len(self.positions) == self.complete else Verdict.OPEN

    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], hold_stops: Sequence[bool]
    ) -> list[SampledToken | None]:
        self.positions += positions
        return [None if len(self.positions) - 1 == self.at else SampledToken(0)]


def test_nothing_is_drawn_beyond_a_complete_grammar_or_a_draft_that_fails() -> None:
    row = torch.zeros(4, 8)
    complete = Spoilt(99, complete=2)
    assert len(draw_along(complete, row, 0, 4, False, array("i", [0, 0, 0]))) == 2
    assert complete.positions == [4, 5]
    assert len(draw_along(Spoilt(99), row, 0, 4, False, array("i", [0, 1, 0]))) == 2
    assert len(draw_along(Spoilt(99), row, 0, 4, False, array("i", [0, 0, 0]))) == 4


def test_positions_are_taken_back_and_written_again() -> None:
    """A row's drafts leave no trace: logits after a truncation are those of a run without."""
    runner = native_runner(CONFIG, tiny_source("gemma2"))
    assert isinstance(runner, NativeRunner)
    kv = runner.packed.kv
    rng = random.Random(2)
    tokens = [rng.randrange(3, VOCABULARY) for _ in range(40)]
    expected = told(Engine(Silent(runner), PATIENT), [ask(0, tokens, 1, replace(GREEDY, top_logprobs=5))])[0]
    runner.reset()
    driver = Driver(runner)
    sequence = driver.start(0, tokens, replace(GREEDY, top_logprobs=5))
    while sequence.computed < 39:
        if sequence.computed > 20:  # a row with drafts, none of which is sampled
            plan = driver._plan
            driver.row(sequence, 1)
            plan.counts[0], plan.drafts = 1 + DRAFTS, array("i", [DRAFTS])
            plan.tokens.extend([90] * DRAFTS)
            row = driver.step().rows[0]
            assert len(row.accepted) < DRAFTS
            assert kv.written(0) == kv.resident_tokens == sequence.computed + DRAFTS
            driver._plan.truncates.extend((0, sequence.computed))
        else:
            driver.row(sequence, 1, 0)
            driver.step()
    driver.row(sequence, 1, ROW_SAMPLES)
    row = driver.step().rows[0]
    assert kv.written(0) == kv.resident_tokens == 40
    assert row.sampled is not None
    assert_same([row.sampled], expected.tokens)


def test_a_ring_holds_the_window_the_drafts_and_what_two_steps_write_of_them() -> None:
    limits = KVLimits(4, 1000, 4, 300, None, 5, draft_tokens=8)
    assert limits.held_tokens(50) == 60  # 50 + 7, in whole blocks
    assert limits.held_tokens(2) == 20  # 8 drafts accepted, 8 more written before their block is saved


def test_a_block_that_drafts_have_overwritten_in_a_ring_cannot_be_saved() -> None:
    kv = KVCache([LayerShape(1, 4, 4, window=8)], torch.float32, KVLimits(1, 1000, 4, 9, None, 9, 4))
    for tokens in (9, 16, 20):
        kv.place(0, tokens)
    kv.truncate(0, 16)
    with pytest.raises(AssertionError, match="window has passed"):
        kv.save(0, 1, 1)
    kv.save(0, 2, 1)


@pytest.mark.parametrize("tokens", [8, 3, 9])
def test_no_more_is_taken_back_than_drafts(tokens: int) -> None:
    runner = native_runner(CONFIG, tiny_source("llama"))
    assert isinstance(runner, NativeRunner)
    kv = runner.packed.kv
    kv.place(0, 8)
    with pytest.raises(AssertionError, match="taken back"):
        kv.truncate(0, tokens)
    kv.truncate(0, 4)
    assert kv.written(0) == 4


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_20_real_prompts_are_answered_the_same(demo_checkpoint: Path) -> None:
    text = real_text(demo_checkpoint)
    config = replace(CONFIG, running_limit=8, step_tokens=128, kv_mib=128, block_tokens=16)
    runner = native_runner(config, DirectorySource(demo_checkpoint))
    requests = []
    for number in range(20):
        part = text[number * 1013 : number * 1013 + 40]
        prompt = part + part[:16] if number % 2 else part
        sampling = replace(COLD, seed=number, top_logprobs=1) if number % 3 == 0 else GREEDY
        requests.append(ask(number, prompt, 12, sampling))
    assert assert_guessing_changes_nothing(runner, requests).accepted_tokens > 20
