"""Grammars in the service: checked before the engine hears of them, judged before an answer ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from container.engine.request import Grammar, GrammarKind, SamplingParams
from container.ranks.messages import SCHEMA_VERSION, Welcome
from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.model import TextModel
from sagemaker_entry import model_files
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ChoiceEnd, EndReason, GenerationRequest, TextPrompt
from sagemaker_entry.grammars import WORDS, Grammars, grammar_refused
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from tests.sagemaker_entry.harness import write_model
from tests.sagemaker_entry.test_service import FakeEngine, delta, exchange, page, text

__all__ = ["page", "text"]  # fixtures

ABLE = Welcome(SCHEMA_VERSION, 64, 260, 8, "native", None, True, True)
UNABLE = Welcome(SCHEMA_VERSION, 64, 260, 8, "compat", "no_hook", True, False)
OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


class Engine(FakeEngine):
    """The fake engine with a welcome of its own."""

    def __init__(self, *batches: list[Any], hello: Welcome = ABLE) -> None:
        super().__init__(*batches)
        self.hello = hello

    def welcome(self, wait_s: float = 1.0) -> Welcome:
        return self.hello


class FakeChecker:
    """Accepts or refuses as told, and remembers what it was asked."""

    def __init__(self, refusal: GrammarError | None = None, holds: bool | GrammarError = True) -> None:
        self.refusal = refusal
        self.verdict = holds
        self.checked: list[tuple[str, str]] = []
        self.judged: list[str] = []
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def check(self, kind: str, text: str) -> None:
        self.checked.append((kind, text))
        if self.refusal is not None:
            raise self.refusal

    def holds(self, kind: str, text: str, answer: str) -> bool:
        self.judged.append(answer)
        if isinstance(self.verdict, GrammarError):
            raise self.verdict
        return self.verdict


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarChecker]:
    files = model_files.read(str(write_model(tmp_path_factory.mktemp("m"))))
    made = GrammarChecker(files["tokenizer.json"], [257])
    yield made
    made.close()


def serving(engine: Engine, text: TextModel, page: Metrics, checker: Any) -> Service:
    service = Service(Settings(model="/m"), engine, page)
    service.ready(text, SamplingParams())
    if checker is not None:
        service.grammars.ready(checker)
    return service


def asking(grammar: Grammar = OBJECT, **fields: Any) -> GenerationRequest:
    return GenerationRequest((TextPrompt("hi"),), SamplingParams(grammar=grammar), **fields)


def refusal(service: Service, request: GenerationRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        service.start(request, exchange())
    return caught.value


def test_a_grammar_goes_to_the_engine_as_it_was_checked(text: TextModel, page: Metrics) -> None:
    engine, checker = Engine([]), FakeChecker()
    serving(engine, text, page, checker).start(asking(), exchange())
    assert checker.checked == [("json_schema", '{"type":"object"}')]
    assert engine.sent[0]["sampling"].grammar == OBJECT


def test_requests_without_a_grammar_are_not_checked(text: TextModel, page: Metrics) -> None:
    checker = FakeChecker(GrammarError(GrammarReason.TIME))
    request = GenerationRequest((TextPrompt("hi"),), SamplingParams())
    serving(Engine([], hello=UNABLE), text, page, checker).start(request, exchange())
    assert checker.checked == []


def test_an_engine_without_grammars_is_never_asked_for_one(text: TextModel, page: Metrics) -> None:
    engine, checker = Engine([], hello=UNABLE), FakeChecker()
    error = refusal(serving(engine, text, page, checker), asking(grammar_field="grammar"))
    assert (error.code, error.status, error.param) == (Code.GRAMMAR_OFF, 400, "grammar")
    assert engine.sent == [] and checker.checked == []


def test_a_worker_that_has_no_checker_yet_says_it_is_loading(text: TextModel, page: Metrics) -> None:
    error = refusal(serving(Engine([]), text, page, None), asking())
    assert (error.code, error.retry_after_s) == (Code.LOADING, 5)


@pytest.mark.parametrize("reason", list(GrammarReason))
def test_every_reason_has_an_answer_that_shows_nothing_of_the_grammar(
    text: TextModel, page: Metrics, reason: GrammarReason
) -> None:
    engine = Engine([])
    error = refusal(serving(engine, text, page, FakeChecker(GrammarError(reason))), asking())
    assert engine.sent == []
    if reason is GrammarReason.BUSY:
        assert (error.code, error.status, error.retry_after_s) == (Code.OVERLOADED, 429, 1)
    elif reason is GrammarReason.UNAVAILABLE:
        assert error.code is Code.GRAMMAR_OFF
    else:
        assert (error.code, error.status) == (Code.GRAMMAR_INVALID, 400)
        assert error.message == f"`response_format` cannot be followed: {WORDS[reason]}"


def test_a_keyword_is_named_and_what_is_no_word_is_not_shown() -> None:
    def message(keyword: str) -> str:
        return grammar_refused(GrammarError(GrammarReason.UNKNOWN_KEYWORD, keyword), "f").message

    assert "`$ref`" in message("$ref")
    assert "`typo`" in message("typo")
    assert "`(unprintable)`" in message("<b>secret</b>")
    assert "`(unprintable)`" in message("x" * 65)


def ended(service: Service, request: GenerationRequest) -> list[Any]:
    run = service.start(request, exchange())
    try:
        return list(run.events())
    finally:
        run.close()


def violations(page: Metrics) -> tuple[float, float]:
    names = ("strongroom_grammar_violations_total", "strongroom_grammar_unjudged_total")
    return page.total(names[0]), page.total(names[1])


def test_an_answer_that_follows_its_grammar_ends_as_any_other(
    text: TextModel, page: Metrics, checker: GrammarChecker
) -> None:
    engine = Engine([[delta('{"a"')], [delta(":1}")], [delta(finish="stop_token")]])
    service = serving(engine, text, page, checker)
    events = ended(service, asking())
    assert isinstance(events[-1], ChoiceEnd)
    assert violations(page) == (0, 0)


@pytest.mark.parametrize("answer", ['{"a":', "[1]", "", '{"a": 1} x'])
def test_an_answer_that_breaks_its_grammar_is_an_error_and_counted(
    text: TextModel, page: Metrics, checker: GrammarChecker, answer: str
) -> None:
    service = serving(Engine([[delta(answer)], [delta(finish="stop_token")]]), text, page, checker)
    with pytest.raises(ApiError) as caught:
        ended(service, asking())
    assert (caught.value.code, caught.value.status) == (Code.GRAMMAR_VIOLATED, 500)
    assert violations(page) == (1, 0)


def test_an_answer_nobody_could_judge_is_an_error_and_counted_apart(text: TextModel, page: Metrics) -> None:
    checker = FakeChecker(holds=GrammarError(GrammarReason.TIME))
    service = serving(Engine([[delta("{}", finish="stop_token")]]), text, page, checker)
    with pytest.raises(ApiError) as caught:
        ended(service, asking())
    assert caught.value.code is Code.GRAMMAR_VIOLATED
    assert violations(page) == (0, 1)


def test_an_answer_cut_by_its_length_may_be_incomplete_and_says_so(text: TextModel, page: Metrics) -> None:
    checker = FakeChecker(holds=False)
    service = serving(Engine([[delta('{"a":', finish="length")]]), text, page, checker)
    events = ended(service, asking())
    assert events[-1].reason is EndReason.LENGTH
    assert checker.judged == []


def test_every_choice_is_judged_by_its_own_text_without_control_tokens(
    text: TextModel, page: Metrics
) -> None:
    checker = FakeChecker()
    batches: list[Any] = [
        [delta("{", choice=0), delta("[", choice=1)],
        [delta("}", choice=0, finish="stop_token")],
        [delta("]", choice=1, finish="stop_token")],
    ]
    service = serving(Engine(batches), text, page, checker)
    ended(service, asking(choices=2, best_of=2, skip_special_tokens=False))
    assert checker.judged == ["{}", "[]"]


def test_the_engines_own_refusal_of_a_grammar_is_the_clients_error(text: TextModel, page: Metrics) -> None:
    service = serving(Engine([[delta(error="grammar_error")]]), text, page, FakeChecker())
    with pytest.raises(ApiError) as caught:
        ended(service, asking())
    assert (caught.value.code, caught.value.status) == (Code.GRAMMAR_FAILED, 422)


def test_grammars_of_the_servers_own_making_are_checked_but_not_judged(page: Metrics) -> None:
    grammars, checker = Grammars(page), FakeChecker()
    grammars.ready(checker)
    own = Grammar(GrammarKind.LARK, 'start: "a"')
    grammars.check(own, "tools", served=True)
    assert checker.checked == [("lark", 'start: "a"')]
    assert grammars.judge(own) is None
    assert grammars.judge(OBJECT) is not None


def test_the_checker_is_started_ahead_of_its_first_use(page: Metrics) -> None:
    grammars, checker = Grammars(page), FakeChecker()
    grammars.start()
    grammars.ready(checker)
    grammars.start()
    assert checker.started == 1
