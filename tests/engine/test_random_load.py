"""Seeded random arrivals, cancels and failures on small pools, every invariant checked after each step."""

from __future__ import annotations

import random
from array import array

import pytest

from container.engine import speculation
from container.engine.grammar import GrammarState
from container.engine.guesses import Guesses
from container.engine.request import (
    ErrorCode,
    FinishReason,
    Grammar,
    Refused,
    RequestKey,
    SamplingParams,
)
from container.engine.step import ROW_FED
from tests.engine.ahead_runner import MOST_UNDER_WAY, AheadFakeRunner
from tests.engine.bench import COMPLETE, VOCABULARY, Bench, request
from tests.engine.fake_grammars import grammar, turn
from tests.engine.fake_runner import expected_tokens, prompt_logprob

SHAPES = {
    "roomy": {},
    "tiny pool": {"blocks": 9, "sequence_tokens": 32},
    "one block to spare": {"blocks": 33, "sequence_tokens": 128, "slots": 6, "step_tokens": 9},
    "budget below a block": {"block_tokens": 16, "step_tokens": 9, "blocks": 12, "sequence_tokens": 96},
    "one slot": {"slots": 1, "step_tokens": 2, "sequence_tokens": 40},
    "no cache": {"prefix_cache": False, "blocks": 12, "sequence_tokens": 48},
    "whole prompts": {"chunked_prefill": False, "prefix_cache": False, "blocks": 12, "sequence_tokens": 48},
    "whole prompts, cache": {"chunked_prefill": False, "blocks": 12, "sequence_tokens": 48},
    "few residents": {"resident_tokens": 40, "sequence_tokens": 40},
    "few residents, whole prompts": {"resident_tokens": 50, "sequence_tokens": 48, "chunked_prefill": False},
    "few residents, few blocks": {"resident_tokens": 45, "blocks": 11, "sequence_tokens": 44},
    "guessing": {"draft_tokens": 4},
    "guessing over several blocks": {"draft_tokens": 7, "block_tokens": 2, "sequence_tokens": 96},
    "guessing, tiny pool": {"draft_tokens": 4, "blocks": 12, "sequence_tokens": 48, "slots": 4},
    "guessing, few residents": {"draft_tokens": 4, "resident_tokens": 60, "sequence_tokens": 48, "slots": 4},
    "guessing, small budget": {"draft_tokens": 4, "step_tokens": 7, "slots": 4},
    "guessing, no cache": {"draft_tokens": 4, "prefix_cache": False, "blocks": 24, "sequence_tokens": 48},
}
AHEAD = ("roomy", "tiny pool", "one block to spare", "budget below a block", "one slot", "no cache")
AHEAD += ("few residents, few blocks", "guessing, tiny pool")
SHAPES |= {f"ahead, {name}": {**SHAPES[name], "runs_ahead": True} for name in AHEAD}


class Reckless(Guesses):
    """Guesses whenever it may, out of thin air if need be, and learns nothing."""

    def __init__(self, tokens: int, rate: float) -> None:
        super().__init__(tokens, 1.0)
        self.random = random.Random(tokens)

    def propose(self, history, most):
        self._count = self.random.randint(1, most)
        return super().propose(history, most) or array("i", [self.random.randrange(VOCABULARY)])

    def settle(self, history, drafts, accepted):
        pass


@pytest.fixture(autouse=True)
def reckless(monkeypatch):
    monkeypatch.setattr(speculation, "Guesses", Reckless)


class Load:
    """Draws what happens next."""

    def __init__(self, seed: int, shape: dict[str, int | bool], faults: bool) -> None:
        self.random = random.Random(seed)
        self.bench = Bench(boot_key=bytes([seed % 256]) * 32, **shape)
        self.guesses = self.bench.engine.capacity.draft_tokens > 0
        self.window = self.bench.engine.capacity.sequence_tokens
        self.next_id = 0
        self.faults = faults
        self.bench.runner.fault = self.fault
        self.bench.runner.bad_rows = self.bad_rows
        if isinstance(self.bench.runner, AheadFakeRunner):
            self.bench.runner.late_fault = self.fault
            self.bench.runner.waits = lambda plan: self.random.random() < 0.1
        # Few prefixes, so that requests often share one.
        self.prefixes = [[self.random.randrange(VOCABULARY) for _ in range(self.window)] for _ in range(3)]

    def fault(self, plan) -> None:
        if self.faults and self.random.random() < 0.01:
            raise RuntimeError("the device is lost")

    def bad_rows(self, plan) -> set[int]:
        return {row for row in range(plan.rows) if self.faults and self.random.random() < 0.01}

    def arrive(self) -> None:
        draw = self.random
        self.next_id += 1
        tokens = draw.choice((3, self.window // 3, self.window - 1))
        prompt_tokens = draw.randint(1, tokens)
        longest = 40 if self.guesses else 12
        max_tokens = draw.randint(1, min(longest, self.window - prompt_tokens))
        shared = draw.randint(0, prompt_tokens)
        prompt = draw.choice(self.prefixes)[:shared]
        prompt += [draw.randrange(VOCABULARY) for _ in range(prompt_tokens - shared)]
        self.bench.submit(
            request(
                self.next_id,
                prompt,
                max_tokens,
                connection=draw.randrange(3),
                sampling=SamplingParams(
                    seed=draw.randrange(1 << 64),
                    min_p=draw.choice((0.0, 0.8, 0.97)) if self.guesses else 0.0,
                    prompt_logprobs=draw.choice((None, None, None, 0)),
                    grammar=self.grammar(),
                ),
                choices=draw.choice((1, 1, 1, 2, 4)),
                min_tokens=draw.randint(0, max_tokens),
                stop_token_ids=frozenset(draw.sample(range(VOCABULARY), draw.choice((0, 2, 300)))),
                tenant=draw.choice(("", "a", "b")),
                cache_salt=draw.choice(("", "", "salt")),
            )
        )

    def grammar(self) -> Grammar | None:
        """None for most; some are shared by requests, some fail to compile, some fail later."""
        what = self.random.choice((None, None, None, "ends", "ends", "breaks"))
        return what and grammar(f"{what} {self.random.randint(1, 12)} {self.random.randrange(4)}")

    def compile(self) -> None:
        """Let some compilations come to an end; a grammar that failed is tried again when asked again."""
        grammars = self.bench.grammars
        for held, state in list(grammars.states.items()):
            if state is GrammarState.COMPILING and self.random.random() < 0.2:
                failed = self.random.random() < 0.2
                grammars.states[held] = GrammarState.FAILED if failed else GrammarState.READY
            elif not grammars.holds[held] and self.random.random() < 0.1:
                del grammars.states[held]

    def run(self, steps: int) -> None:
        draw, bench = self.random, self.bench
        for _ in range(steps):
            # Guesses are made while nobody waits.
            while draw.random() < (0.1 if self.guesses else 0.35) and len(bench.engine._live) < 40:
                self.arrive()
            if bench.requests and draw.random() < 0.05:
                bench.engine.cancel(draw.choice(list(bench.requests)), draw.choice((None, 0, 1, 3)))
                bench.engine.check()
            if draw.random() < 0.005:
                bench.engine.cancel_connection(draw.randrange(3))
                bench.engine.check()
            self.compile()
            bench.step()
        bench.engine.drain()
        with pytest.raises(Refused):
            bench.engine.submit(request(1_000_000))
        while bench.engine.has_work:
            self.compile()
            bench.step()
        bench.check_idle()
        self.judge()

    def judge(self) -> None:
        """What was said is a prefix of what the model says; what ended well was said whole."""
        for (key, number), got in self.bench.choices.items():
            asked = self.bench.requests[key]
            expected = expected_tokens(asked, number, VOCABULARY)
            assert got.tokens == expected[: len(got.tokens)]
            if got.finish in COMPLETE:
                assert got.tokens == expected
            if got.finish is FinishReason.GRAMMAR:
                assert turn(asked.sampling) == ("ends", len(got.tokens))
            if got.prompt_logprobs is not None:
                ends = range(1, len(asked.prompt))
                assert got.prompt_logprobs == [prompt_logprob(asked.prompt[: end + 1]) for end in ends]
            allowed = {ErrorCode.INTERNAL, ErrorCode.NUMERICAL} if self.faults else set()
            allowed |= {ErrorCode.GRAMMAR} if asked.sampling.grammar is not None else set()
            assert got.error is None or got.error in allowed


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("faults", [False, True], ids=["sound", "faulty"])
@pytest.mark.parametrize("seed", range(2))
def test_any_mix_of_arrivals_cancels_and_failures_ends_well(shape, faults, seed):
    Load(seed, shape, faults).run(steps=250)


def test_the_random_load_reaches_what_it_is_meant_to_reach():
    load = Load(5, SHAPES["tiny pool"], faults=True)
    load.run(steps=600)
    stats = load.bench.engine.stats()
    assert min(stats.preemptions, stats.prefix_hit_tokens, stats.failed_steps) > 0
    assert min(stats.completed, stats.failed, stats.cancelled) > 0


def test_the_random_load_reaches_all_that_running_ahead_may_meet():
    """Tokens that are fed, rows for nobody, steps behind a step that fails, preemption of who expects one."""
    load = Load(5, SHAPES["ahead, tiny pool"], faults=True)
    load.run(steps=600)
    runner, stats = load.bench.runner, load.bench.engine.stats()
    assert isinstance(runner, AheadFakeRunner) and runner.deepest == MOST_UNDER_WAY
    assert sum(flags & ROW_FED > 0 for plan in runner.plans for flags in plan.flags) > 100
    assert min(stats.preemptions, stats.prefix_hit_tokens, stats.failed_steps) > 0
    assert min(stats.completed, stats.failed, stats.cancelled) > 0


def test_the_random_load_reaches_the_limit_of_residents_while_blocks_are_plenty():
    load = Load(8, SHAPES["few residents"], faults=True)
    load.run(steps=400)
    stats = load.bench.engine.stats()
    assert min(stats.preemptions, stats.prefix_hit_tokens, stats.failed_steps, stats.completed) > 0


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("guessing")])
def test_the_random_load_reaches_guesses_that_hold_and_guesses_that_fail(shape):
    load = Load(9, SHAPES[shape], faults=False)
    load.run(steps=400)
    stats = load.bench.engine.stats()
    assert min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > 20
    assert "tiny" not in shape or stats.preemptions > 0
    assert any(plan.truncates for plan in load.bench.runner.plans)


def test_a_connection_that_is_gone_gets_no_more_deltas():
    load = Load(6, SHAPES["roomy"], faults=False)
    for _ in range(60):
        load.arrive()
    load.bench.step()
    load.bench.engine.cancel(RequestKey(1, next(k.id for k in load.bench.engine._live if k.connection == 1)))
    load.bench.engine.cancel_connection(1)
    while load.bench.engine.has_work:
        load.compile()
        assert all(delta.key.connection != 1 for delta in load.bench.step())
    load.bench.check_idle()
