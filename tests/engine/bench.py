"""A bench to put an engine on: short ways to make requests, run steps and judge what came out."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from container.engine.engine import Engine, EngineLimits
from container.engine.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    RequestKey,
    SamplingParams,
    SequenceDelta,
)
from container.engine.step import Capacity
from tests.engine.ahead_runner import AheadFakeRunner
from tests.engine.fake_grammars import FakeGrammars
from tests.engine.fake_runner import FakeRunner, expected_tokens

BOOT_KEY = bytes(range(32))
VOCABULARY = 997
COMPLETE = (FinishReason.LENGTH, FinishReason.STOP_TOKEN, FinishReason.GRAMMAR)


def capacity(**changes: int | bool) -> Capacity:
    sizes: dict[str, int | bool] = {
        "blocks": 64,
        "block_tokens": 4,
        "slots": 8,
        "step_tokens": 32,
        "sequence_tokens": 128,
        "vocabulary": VOCABULARY,
        "grammar": True,
    }
    return Capacity(**(sizes | changes))  # type: ignore[arg-type]


def request(
    id: int,
    prompt: Iterable[int] | int = 5,
    max_tokens: int = 4,
    *,
    connection: int = 0,
    seed: int = 0,
    sampling: SamplingParams | None = None,
    **fields: object,
) -> EngineRequest:
    """Return a request; a number as `prompt` makes that many tokens that no other id shares."""
    if isinstance(prompt, int):
        prompt = [(id * 31 + place * 7) % VOCABULARY for place in range(prompt)]
    return EngineRequest(
        key=RequestKey(connection, id),
        prompt=array("i", prompt),
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(seed=seed),
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class Clock:
    """Time that moves only when told, or by `step_s` each time a runner is asked to run."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: ErrorCode | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[float | None] | None = None
    deltas: int = 0

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None


class Bench:
    """An engine on a fake runner; `step` checks every invariant and that no delta follows a final one."""

    def __init__(
        self,
        limits: EngineLimits | None = None,
        *,
        step_s: float = 0.01,
        boot_key: bytes = BOOT_KEY,
        **sizes: int | bool,
    ) -> None:
        self.clock = Clock()
        self.grammars = FakeGrammars()
        held = capacity(**sizes)
        self.runner = (AheadFakeRunner if held.runs_ahead else FakeRunner)(held, self.grammars)
        self.step_s = step_s
        self.engine = Engine(
            self.runner,
            limits or EngineLimits(waiting=10_000, waiting_s=1e9),
            clock=self.clock,
            boot_key=boot_key,
            grammars=self.grammars,
        )
        self.requests: dict[RequestKey, EngineRequest] = {}
        self.choices: dict[tuple[RequestKey, int], Choice] = defaultdict(Choice)

    def submit(self, *requests: EngineRequest) -> None:
        for each in requests:
            self.engine.submit(each)
            self.requests[each.key] = each
            self.engine.check()

    def step(self) -> list[SequenceDelta]:
        self.clock.now_s += self.step_s
        deltas = self.engine.step()
        if self.runner.problem is not None:
            raise self.runner.problem
        self.engine.check()
        for delta in deltas:
            choice = self.choices[delta.key, delta.choice]
            assert not choice.ended, "a delta after the final one"
            assert delta.finish is None or delta.error is None, "an ending of two kinds"
            if choice.deltas == 0 and delta.tokens:
                choice.cached_tokens = delta.cached_tokens
                if delta.prompt_logprobs is not None:
                    choice.prompt_logprobs = [token.logprob for token in delta.prompt_logprobs]
            else:
                assert delta.cached_tokens is None and delta.prompt_logprobs is None
            choice.deltas += 1
            choice.tokens += [sampled.token for sampled in delta.tokens]
            choice.finish, choice.error = delta.finish, delta.error
        return deltas

    def run(self, steps: int = 10_000) -> None:
        """Step until nothing is left; fails after `steps`."""
        for _ in range(steps):
            if not self.engine.has_work:
                self.check_idle()
                return
            self.step()
        raise AssertionError(f"work is left after {steps} steps")

    def check_idle(self) -> None:
        stats = self.engine.stats()
        assert (stats.waiting, stats.running, stats.in_flight, stats.kv_blocks_used) == (0, 0, 0, 0)
        assert stats.accepted == stats.completed + stats.failed + stats.cancelled
        assert not +self.grammars.holds, "a grammar is held for nobody"

    def choice(self, id: int, choice: int = 0, connection: int = 0) -> Choice:
        return self.choices[RequestKey(connection, id), choice]

    def check_complete(self, *ids: int) -> None:
        """Assert that these requests (all, if none is named) ended with exactly the expected tokens."""
        self.check_each([RequestKey(0, id) for id in ids] or self.requests)

    def check_each(self, keys: Iterable[RequestKey]) -> None:
        for key in keys:
            asked = self.requests[key]
            for number in range(asked.choices):
                got = self.choices[key, number]
                assert got.error is None and got.finish in COMPLETE
                assert got.tokens == expected_tokens(asked, number, VOCABULARY)
