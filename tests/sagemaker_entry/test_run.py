"""A run whose parts do not move in step: slow consumers, prompts that end early, failures of every kind."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from container.ranks.messages import Delta, Token
from container.text.model import TextModel
from sagemaker_entry import metrics, model_files
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft
from sagemaker_entry.generation import ChoiceEnd, TextDelta, TextPrompt
from sagemaker_entry.lifetime import End, Lifetime
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.run import Run
from tests.sagemaker_entry.harness import write_model
from tests.sagemaker_entry.test_service import FakeEngine, delta, exchange, request, serving

TWO = (TextPrompt("x"), TextPrompt("y"))


class Ending:
    """A submission as the engine's client has it: after its last batch, `next` returns [] at once."""

    def __init__(self, batches: list[Any], gap_s: float = 0.0) -> None:
        self.batches = batches
        self.gap_s = gap_s
        self.cancels = 0

    def next(self, wait_s: float | None = None) -> list[Delta]:
        gevent.sleep(self.gap_s)
        if not self.batches or self.cancels:
            return []
        batch = self.batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        deltas: list[Delta] = batch
        return deltas

    def cancel(self, choice: int | None = None) -> None:
        self.cancels += choice is None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextModel]:
    model = TextModel.load(model_files.read(str(write_model(tmp_path_factory.mktemp("m")))))
    yield model
    model.close()


@pytest.fixture
def page() -> Metrics:
    return Metrics(metrics.create(), 1)


@pytest.fixture
def start(text: TextModel, page: Metrics) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def begin(*submissions: Ending, lifetime: Lifetime | None = None, **fields: Any) -> Run:
        life = lifetime or Lifetime()
        prompts = [(array("i", [120]), submission) for submission in submissions]
        wanted = request(*TWO[: len(submissions)], **fields)
        counts = exchange().counts
        started.append(Run(wanted, 1, text, prompts, life, 1e12, counts, page))
        return started[-1]

    yield begin
    for run in started:
        run.close()


def test_a_reader_slower_than_the_engine_gets_every_prompt_to_its_end(start: Callable[..., Run]) -> None:
    quick = Ending([[delta("a")], [delta("b", finish="length")]])
    slow = Ending([[delta("c")] for _ in range(5)] + [[delta("d", finish="length")]], gap_s=0.01)
    told = []
    for event in start(quick, slow).events():
        told.append(event)
        gevent.sleep(0.02)  # a client that takes its time over each event
    ends = [event for event in told if isinstance(event, ChoiceEnd)]
    assert [end.prompt for end in ends] == [0, 1]
    texts = ["", ""]
    for event in told:
        if isinstance(event, TextDelta):
            texts[event.prompt] += event.text
    assert texts == ["ab", "cccccd"]


def test_a_failure_nobody_foresaw_in_one_of_several_prompts_reaches_the_reader(
    start: Callable[..., Run],
) -> None:
    broken = Ending([[delta("a")], RuntimeError("unforeseen")])
    endless = Ending([[delta("b")] for _ in range(1000)], gap_s=0.01)
    run = start(broken, endless)
    with gevent.Timeout(2, AssertionError), pytest.raises(RuntimeError):
        list(run.events())
    run.close()
    assert broken.cancels and endless.cancels


def test_an_engine_that_ends_a_prompt_without_a_last_delta_is_an_error_not_an_answer(
    start: Callable[..., Run],
) -> None:
    for submissions in ([Ending([[delta("a")]])], [Ending([[delta("a")]]), Ending([[delta("b")]])]):
        with pytest.raises(ApiError) as caught:
            list(start(*submissions).events())
        assert caught.value.code is Code.ENGINE_DOWN


def test_a_client_that_leaves_ends_all_prompts_of_its_request(start: Callable[..., Run]) -> None:
    lifetime = Lifetime()
    both = [Ending([[delta("a")] for _ in range(1000)], gap_s=0.01) for _ in range(2)]
    run = start(*both, lifetime=lifetime)
    gevent.spawn_later(0.05, lifetime.end, End.CLIENT_LEFT)
    with gevent.Timeout(2, AssertionError), pytest.raises(ClientLeft):
        list(run.events())
    assert all(submission.cancels for submission in both)


def test_a_run_that_is_closed_no_longer_listens_to_its_lifetime(start: Callable[..., Run]) -> None:
    lifetime = Lifetime()
    submission = Ending([[delta("a", finish="length")]])
    run = start(submission, lifetime=lifetime)
    assert len(list(run.events())) == 3
    run.close()
    cancels = submission.cancels
    lifetime.end(End.CLIENT_LEFT)
    assert submission.cancels == cancels


def test_a_client_that_left_before_the_run_began_is_told_to_the_engine_at_once(
    start: Callable[..., Run],
) -> None:
    lifetime = Lifetime()
    lifetime.end(End.CLIENT_LEFT)
    submission = Ending([[delta("a", finish="length")]])
    with pytest.raises(ClientLeft):
        list(start(submission, lifetime=lifetime).events())
    assert submission.cancels


def histogram_count(page: Metrics, name: str) -> float:
    lines = page.text("m", {}).splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}_count"))


def test_the_time_between_tokens_is_measured_within_each_choice(
    start: Callable[..., Run], page: Metrics
) -> None:
    steps = [[delta("a", choice=0), delta("b", choice=1)] for _ in range(2)]
    last = [delta("c", choice=0, finish="length"), delta("d", choice=1, finish="length")]
    list(start(Ending([*steps, last]), choices=2, best_of=2).events())
    assert histogram_count(page, "vllm:inter_token_latency_seconds") == 4, "3 tokens have 2 gaps, twice"
    assert histogram_count(page, "vllm:time_to_first_token_seconds") == 1
    assert page.total("vllm:generation_tokens_total") == 6


def test_deltas_after_a_stop_string_are_not_counted_or_shown(
    start: Callable[..., Run], page: Metrics
) -> None:
    late = [delta("zz", choice=0), delta("zz", choice=1)]
    batches = [[delta("ab", choice=0), delta("x", choice=1)], late, [delta("b", choice=1, finish="length")]]
    told = list(start(Ending(batches), choices=2, best_of=2, stop=("b",)).events())
    texts = ["", ""]
    for event in told:
        if isinstance(event, TextDelta):
            texts[event.choice] += event.text
    assert texts == ["a", "xzz"]
    assert [event.completion_tokens for event in told if isinstance(event, ChoiceEnd)] == [2, 4]
    assert page.total("vllm:generation_tokens_total") == 6


class Refusing(FakeEngine):
    """Takes the first prompt and fails on the second in a way nobody foresaw."""

    def submit(self, prompt: array[int], **fields: Any) -> Any:
        if self.sent:
            raise ValueError("unforeseen")
        return super().submit(prompt, **fields)


def test_prompts_already_submitted_are_cancelled_whatever_stops_the_rest(
    text: TextModel, page: Metrics
) -> None:
    engine = Refusing([[delta("a")]])
    with pytest.raises(ValueError, match="unforeseen"):
        serving(engine, text, page).start(request(*TWO), exchange())
    assert engine.submissions[0].cancels == 1


def test_a_special_token_in_a_batch_keeps_its_place_among_the_pieces(start: Callable[..., Run]) -> None:
    tokens = [Token(104, -0.5, [(105, -1.0)]), Token(256, -0.5, []), Token(105, -0.5, [])]
    batch = [Delta(1, 0, tokens, "length", None, None, 0, None)]
    told = list(start(Ending([batch]), skip_special_tokens=False).events())
    pieces = [piece for event in told if isinstance(event, TextDelta) for piece in event.pieces]
    assert [(piece.id, piece.special) for piece in pieces] == [(104, False), (256, True), (105, False)]
    assert pieces[0].top == ((105, "i", -1.0),)
    assert pieces[0].raw == b"h"


def test_tokens_that_came_in_one_step_share_its_time(start: Callable[..., Run], page: Metrics) -> None:
    tokens = [Token(ord(letter), None, []) for letter in "bcd"]
    several = Delta(1, 0, tokens, "length", None, None, None, None)
    submission = Ending([[delta("a")], [several]], gap_s=0.06)
    events = list(start(submission).events())
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "abcd"
    (end,) = [event for event in events if isinstance(event, ChoiceEnd)]
    assert end.completion_tokens == 4
    shown = page.text("model", {})
    (total,) = re.findall(r"inter_token_latency_seconds_sum\{[^}]*\} (\S+)", shown)
    assert histogram_count(page, "vllm:inter_token_latency_seconds") == 3
    assert float(total) > 0.05
    (quickest,) = re.findall(r'inter_token_latency_seconds_bucket\{[^}]*le="0.01"\} (\S+)', shown)
    assert float(quickest) == 0, "no token took no time"
    assert page.total("vllm:generation_tokens_total") == 4
