"""Admission without a server: prompts, windows, what the engine may answer, the end of a run."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from container.engine.request import SamplingParams
from container.ranks.messages import SCHEMA_VERSION, Delta, Token, Welcome
from container.ranks.submission import DeltaTimeout, EngineBusy, EngineGone, EngineSilent
from container.text.model import TextModel
from sagemaker_entry import metrics, model_files
from sagemaker_entry.body import BodyLimits, BodyReader
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Exchange
from sagemaker_entry.generation import (
    ChatPrompt,
    ChoiceEnd,
    EndReason,
    GenerationRequest,
    ModelLimits,
    PromptInfo,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)
from sagemaker_entry.lifetime import End, Lifetime
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.prompts import output_tokens, token_ids
from sagemaker_entry.replies import LARGE_BODY_BYTES, Replies
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from tests.sagemaker_entry.harness import write_model

WELCOME = Welcome(SCHEMA_VERSION, 64, 260, 8, "native", None, True, False)
LIMITS = ModelLimits(model="m", sequence_tokens=64, input_tokens=63, vocabulary=260)


class FakeSubmission:
    """Hands out prepared batches; an exception among them is raised."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.cancels = 0
        self.cancelled: list[int] = []

    def next(self, wait_s: float | None = None) -> list[Delta]:
        if self.cancels:
            return []
        batch = self.batches.pop(0) if self.batches else DeltaTimeout()
        if isinstance(batch, Exception):
            raise batch
        if callable(batch):
            batch()
            return []
        deltas: list[Delta] = batch
        return deltas

    def cancel(self, choice: int | None = None) -> None:
        if choice is None:
            self.cancels += 1
        else:
            self.cancelled.append(choice)


class FakeEngine:
    """Takes submissions and remembers them."""

    def __init__(self, *batches: list[Any]) -> None:
        self.failure: Exception | None = None
        self.sent: list[dict[str, Any]] = []
        self.submissions = [FakeSubmission(list(b)) for b in batches]

    def welcome(self, wait_s: float = 1.0) -> Welcome:
        if self.failure is not None:
            raise self.failure
        return WELCOME

    def submit(self, prompt: array[int], **fields: Any) -> FakeSubmission:
        if self.failure is not None:
            raise self.failure
        self.sent.append({"prompt": prompt} | fields)
        return self.submissions[len(self.sent) - 1]


def delta(text: str = "", *, choice: int = 0, finish: str | None = None, error: str | None = None) -> Delta:
    return Delta(1, choice, [Token(byte, -1.0, []) for byte in text.encode()], finish, error, None, 0, None)


def exchange(lifetime: Lifetime | None = None) -> Exchange:
    reader = BodyReader(lambda _: b"", lambda _: None, 0, BodyLimits(1))
    return Exchange("POST", reader, lifetime or Lifetime(), lambda: False)


def request(*prompts: Any, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompts or (TextPrompt("hi"),), SamplingParams(), **fields)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextModel]:
    model = TextModel.load(model_files.read(str(write_model(tmp_path_factory.mktemp("m")))))
    yield model
    model.close()


@pytest.fixture
def page() -> Iterator[Metrics]:
    fd = metrics.create()
    yield Metrics(fd, 1)
    os.close(fd)


def serving(engine: FakeEngine, text: TextModel, page: Metrics, **settings: Any) -> Service:
    service = Service(Settings(model="/m", **settings), engine, page)
    service.ready(text, SamplingParams())
    return service


def code_of(call: Any, *arguments: Any) -> Code:
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.code


def test_a_prompt_becomes_ids_by_its_kind(text: TextModel) -> None:
    chat = ChatPrompt(({"role": "user", "content": "<|im_end|>"},))
    assert token_ids(text, TextPrompt("hi"), request(), LIMITS) == array("i", list(b"hi"))
    assert token_ids(text, TokenPrompt((1, 2)), request(), LIMITS) == array("i", [1, 2])
    ids = list(token_ids(text, chat, request(), LIMITS))
    assert ids.count(256) == 2
    assert ids.count(257) == 1, "a control token came from the user's text"
    assert token_ids(text, TextPrompt("hello"), request(truncate_tokens=2), LIMITS) == array("i", list(b"lo"))


def test_prompts_that_cannot_be_served_are_refused_with_their_reason(text: TextModel) -> None:
    def code(prompt: Any) -> Code:
        return code_of(token_ids, text, prompt, request(), LIMITS)

    assert code(TextPrompt("a" * 769)) is Code.CONTEXT_LENGTH
    assert code(TextPrompt("\u00e9" * 385)) is Code.CONTEXT_LENGTH, "the bound counts bytes"
    assert code(TokenPrompt((1,) * 65)) is Code.CONTEXT_LENGTH
    assert code(TokenPrompt((260,))) is Code.INVALID_VALUE
    assert code(TokenPrompt((-1,))) is Code.INVALID_VALUE
    assert code(TokenPrompt((65, 257))) is Code.CONTROL_TOKEN
    assert code(ChatPrompt(({"role": "user"},), template_kwargs={"messages": 1})) is Code.TEMPLATE_FAILED


def test_the_window_bounds_prompt_and_output_together() -> None:
    assert output_tokens(4, None, LIMITS) == 60
    assert output_tokens(4, 60, LIMITS) == 60
    assert code_of(output_tokens, 4, 61, LIMITS) is Code.CONTEXT_LENGTH
    assert code_of(output_tokens, 64, None, LIMITS) is Code.CONTEXT_LENGTH
    assert code_of(output_tokens, 0, 1, LIMITS) is Code.INVALID_VALUE


def test_the_engine_gets_what_was_asked_for(text: TextModel, page: Metrics) -> None:
    engine = FakeEngine([[delta("x", finish="length")]])
    wanted = request(
        seed=5, max_tokens=3, min_tokens=9, best_of=2, choices=2, stop_token_ids=(7,), cache_salt="s"
    )
    serving(engine, text, page).start(wanted, exchange())
    sent = engine.sent[0]
    assert (sent["max_tokens"], sent["min_tokens"], sent["choices"]) == (3, 3, 2)
    assert sent["stop_token_ids"] == frozenset({7, 257})
    assert (sent["sampling"].seed, sent["cache_salt"]) == (5, "s")
    engine = FakeEngine([[delta("x", finish="length")]])
    serving(engine, text, page).start(request(ignore_eos=True), exchange())
    assert engine.sent[0]["stop_token_ids"] == frozenset()


def test_the_input_limit_of_the_operator_holds(text: TextModel, page: Metrics) -> None:
    service = serving(FakeEngine([]), text, page, max_input_tokens=1)
    assert code_of(service.start, request(), exchange()) is Code.CONTEXT_LENGTH


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineGone("x"), Code.ENGINE_DOWN),
        (EngineSilent("x"), Code.ENGINE_DOWN),
        (EngineBusy("x"), Code.OVERLOADED),
    ],
)
def test_an_engine_that_cannot_be_reached_is_the_servers_error(
    text: TextModel, page: Metrics, failure: Exception, code: Code
) -> None:
    engine = FakeEngine([])
    service = serving(engine, text, page)
    engine.failure = failure
    assert code_of(service.start, request(), exchange()) is code


def test_a_full_engine_is_asked_nothing_and_no_prompt_is_tokenized_for_it(page: Metrics) -> None:
    full = [9]
    service = Service(Settings(model="/m"), FakeEngine([]), page, lambda: full[0])
    with pytest.raises(ApiError) as caught:
        service.start(request(), exchange())
    assert (caught.value.code, caught.value.retry_after_s) == (Code.OVERLOADED, 9)
    full[0] = 0
    service.check_room()


def test_a_large_body_is_not_read_only_to_be_refused(page: Metrics) -> None:
    service = Service(Settings(model="/m"), FakeEngine([]), page, lambda: 9)
    replies = Replies(Settings(model="/m"), service, page, "auto", "fp")
    answer = replies.generate(Route.INVOCATIONS, b'{"messages": 3}', exchange())
    assert answer.status_code == 400, "what is wrong with a small one is said all the same"
    with pytest.raises(ApiError) as caught:
        replies.generate(Route.INVOCATIONS, b'{"messages": 3}' + b" " * LARGE_BODY_BYTES, exchange())
    assert caught.value.code is Code.OVERLOADED


def test_a_request_whose_client_has_left_never_reaches_the_engine(text: TextModel, page: Metrics) -> None:
    engine = FakeEngine([])
    lifetime = Lifetime()
    lifetime.end(End.CLIENT_LEFT)
    with pytest.raises(ClientLeft):
        serving(engine, text, page).start(request(), exchange(lifetime))
    assert engine.sent == []


def events(engine: FakeEngine, text: TextModel, page: Metrics, wanted: GenerationRequest) -> list[Any]:
    run = serving(engine, text, page).start(wanted, exchange())
    try:
        return list(run.events())
    finally:
        run.close()


def test_a_run_tells_the_prompt_the_text_and_one_end(text: TextModel, page: Metrics) -> None:
    engine = FakeEngine([[delta("he")], [delta("y", finish="length")]])
    told = events(engine, text, page, request(seed=9))
    assert [type(event) for event in told] == [PromptInfo, TextDelta, TextDelta, ChoiceEnd]
    assert "".join(event.text for event in told if isinstance(event, TextDelta)) == "hey"
    assert (told[-1].reason, told[-1].completion_tokens, told[-1].seed) == (EndReason.LENGTH, 3, 9)


def test_the_end_of_sequence_token_and_a_stop_id_are_told_apart(text: TextModel, page: Metrics) -> None:
    own = Delta(1, 0, [Token(257, None, [])], "stop_token", None, None, 0, None)
    assert events(FakeEngine([[own]]), text, page, request())[-1].reason is EndReason.EOS
    given = FakeEngine([[delta("h", finish="stop_token")]])
    assert events(given, text, page, request(stop_token_ids=(104,)))[-1].reason is EndReason.STOP_TOKEN


def test_half_a_character_waits_for_its_other_half(text: TextModel, page: Metrics) -> None:
    first, second = "\u00e9".encode()
    halves = [[Delta(1, 0, [Token(b, None, [])], None, None, None, 0, None)] for b in (first, second)]
    told = events(FakeEngine([*halves, [delta("!", finish="length")]]), text, page, request())
    texts = [event.text for event in told if isinstance(event, TextDelta)]
    assert "".join(texts) == "\u00e9!"
    assert not any("\ufffd" in piece for piece in texts)


def test_a_stop_string_over_token_borders_ends_the_choice_and_cancels(text: TextModel, page: Metrics) -> None:
    engine = FakeEngine([[delta("ab")], [delta("cd")], [delta("ef")]])
    told = events(engine, text, page, request(stop=("bcd",)))
    assert "".join(event.text for event in told if isinstance(event, TextDelta)) == "a"
    assert (told[-1].reason, told[-1].completion_tokens) == (EndReason.STOP_STRING, 4)
    assert engine.submissions[0].cancelled == [0]
    assert engine.submissions[0].batches, "the run read on after its end"


def test_a_stop_string_in_one_choice_ends_that_choice_in_the_engine_and_no_other(
    text: TextModel, page: Metrics
) -> None:
    both = [delta("ab"), delta("ax", choice=1)]
    late = [delta("zz"), delta("y", choice=1, finish="length")]  # choice 0 was on its way already
    engine = FakeEngine([both, late])
    told = events(engine, text, page, request(stop=("b",), best_of=2, choices=2))
    assert engine.submissions[0].cancelled == [0], "who has ended by itself is not cancelled"
    ends = [(event.choice, event.reason) for event in told if isinstance(event, ChoiceEnd)]
    assert ends == [(0, EndReason.STOP_STRING), (1, EndReason.LENGTH)]
    texts = [(event.choice, event.text) for event in told if isinstance(event, TextDelta)]
    assert [[text for choice, text in texts if choice == c] for c in (0, 1)] == [["a"], ["ax", "y"]]


@pytest.mark.parametrize(
    ("batches", "code"),
    [
        ([DeltaTimeout()], Code.DEADLINE),
        ([[delta("a")], EngineGone("x")], Code.ENGINE_DOWN),
        ([[delta(error="queue_full")]], Code.OVERLOADED),
        ([[delta(error="unsupported")]], Code.UNSUPPORTED_FIELD),
        ([[delta(error="internal")]], Code.INTERNAL),
        ([[delta(finish="cancelled")]], Code.ENGINE_DOWN),
    ],
)
def test_whatever_goes_wrong_ends_in_one_error_and_a_cancel(
    text: TextModel, page: Metrics, batches: list[Any], code: Code
) -> None:
    engine = FakeEngine(batches)
    with pytest.raises(ApiError) as caught:
        events(engine, text, page, request())
    assert caught.value.code is code
    assert engine.submissions[0].cancels >= 1


def test_the_end_of_a_lifetime_wakes_the_run(text: TextModel, page: Metrics) -> None:
    for reason, expected in ((End.CLIENT_LEFT, ClientLeft), (End.DRAINING, ApiError)):
        lifetime = Lifetime()
        engine = FakeEngine([[delta("a")], lambda r=reason, life=lifetime: life.end(r)])
        run = serving(engine, text, page).start(request(), exchange(lifetime))
        with pytest.raises(expected):
            list(run.events())
        assert engine.submissions[0].cancels == 1


def test_best_of_returns_the_choices_with_the_best_mean(text: TextModel, page: Metrics) -> None:
    def scored(choice: int, letter: str, logprob: float) -> Delta:
        return Delta(1, choice, [Token(ord(letter), logprob, [])], "length", None, None, 0, None)

    engine = FakeEngine([[scored(0, "a", -3.0), scored(1, "b", -1.0), scored(2, "c", -2.0)]])
    run = serving(engine, text, page).start(request(best_of=3, choices=2), exchange())
    result = run.result()
    run.close()
    assert [choice.text for choice in result.choices] == ["b", "c"]
    assert [choice.choice for choice in result.choices] == [0, 1]
    assert [choice.text for choice in result.rest] == ["a"]


def test_several_prompts_run_side_by_side_and_one_failure_ends_all(text: TextModel, page: Metrics) -> None:
    engine = FakeEngine([[delta("a", finish="length")]], [[delta("b", finish="length")]])
    result_run = serving(engine, text, page).start(request(TextPrompt("x"), TextPrompt("y")), exchange())
    result = result_run.result()
    result_run.close()
    assert [(choice.prompt, choice.text) for choice in result.choices] == [(0, "a"), (1, "b")]
    engine = FakeEngine([[delta("a")], EngineGone("x")], [[delta("b", finish="length")]])
    run = serving(engine, text, page).start(request(TextPrompt("x"), TextPrompt("y")), exchange())
    with pytest.raises(ApiError):
        list(run.events())
    run.close()
    assert all(submission.cancels for submission in engine.submissions)


def test_model_files_are_read_by_name_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    (tmp_path / "model.py").write_text("raise SystemExit")
    assert set(model_files.read(str(tmp_path))) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    monkeypatch.setattr(model_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        model_files.read(str(tmp_path))
    (tmp_path / "fifo").mkdir()
    monkeypatch.setattr(model_files, "NAMES", ("fifo",))
    with pytest.raises(OSError):
        model_files.read(str(tmp_path))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (b"{}", SamplingParams()),
        (b"not json", SamplingParams()),
        (b'{"temperature": 0.2}', SamplingParams()),
        (b'{"do_sample": true, "temperature": 0.2, "top_k": 5}', SamplingParams(temperature=0.2, top_k=5)),
        (b'{"do_sample": true, "temperature": true, "top_p": 7, "top_k": -1}', SamplingParams()),
    ],
)
def test_generation_defaults_are_taken_only_where_they_make_sense(
    document: bytes, expected: SamplingParams
) -> None:
    assert model_files.default_sampling({"generation_config.json": document}) == expected
