"""Requests through the real engine and a real runner, in one thread, invariants checked after every step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from container.engine.engine import Engine, EngineLimits
from container.engine.request import EngineRequest, FinishReason, RequestKey, SamplingParams
from container.engine.step import Runner
from container.model.shape import RunnerConfig
from container.model.source import ModelSource
from container.model.start import build_runner

CONNECTION = 1
GREEDY = SamplingParams(temperature=0.0)
PATIENT = EngineLimits(waiting=1024, waiting_s=3600.0)  # tests wait as long as it takes


@cache
def real_text(checkpoint: Path) -> list[int]:
    """Return the tokens of Python's own manual: prose, tables and code that every machine has."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    return tokens


def native_runner(config: RunnerConfig, source: ModelSource) -> Runner:
    runner, facts = build_runner(config, source, lambda phase: None)
    assert facts.runner == "native"
    return runner


def ask(
    number: int, prompt: Sequence[int], max_tokens: int, sampling: SamplingParams = GREEDY
) -> EngineRequest:
    return EngineRequest(RequestKey(CONNECTION, number), array("i", prompt), max_tokens, sampling)


@dataclass
class Answer:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


Answers = dict[int, Answer]  # by number of the request


def serve(
    engine: Engine,
    requests: Iterable[EngineRequest],
    between: Callable[[int, Answers], None] = lambda step, answers: None,
) -> Answers:
    """Submit all `requests` at once, run until the engine is idle, and return what they got.

    `between` is called before each step with its number and the answers so far.
    """
    answers: Answers = {}
    for request in requests:
        engine.submit(request)
        answers[request.key.id] = Answer()
    step = 0
    while engine.has_work:
        between(step, answers)
        for delta in engine.step():
            answer = answers[delta.key.id]
            assert delta.error is None
            assert answer.finish is None, "a delta came after the final one"
            answer.tokens += [sampled.token for sampled in delta.tokens]
            answer.finish = delta.finish
        engine.check()
        step += 1
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.in_flight, stats.kv_blocks_used) == (0, 0, 0, 0)
    return answers


def serve_alone(engine: Engine, requests: Iterable[EngineRequest]) -> Answers:
    """Run one request after another and return what they got."""
    answers: Answers = {}
    for request in requests:
        answers.update(serve(engine, [request]))
    return answers
