"""Completion requests: the four shapes of a prompt, best_of, logprobs, echo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.dialects.presenter import ParseOptions
from sagemaker_entry.errors import Code
from sagemaker_entry.generation import TextPrompt, TokenPrompt
from tests.sagemaker_entry.dialect_samples import COMPLETION_BODY, LIMITS, completion, refused, requested


def test_a_full_body_is_honoured_field_by_field() -> None:
    request = requested(Route.COMPLETIONS, COMPLETION_BODY)
    assert request.prompts == (TextPrompt("one"), TextPrompt("two"))
    assert request.sampling == SamplingParams(
        temperature=0.0, top_k=5, min_p=0.1, top_logprobs=1, prompt_logprobs=1
    )
    assert (request.choices, request.best_of, request.seed, request.max_tokens) == (1, 2, 1, 4)
    assert request.stop == ("!",)
    assert request.prompt_pieces
    assert not request.stream and not request.include_stop


def test_the_invocations_route_parses_alike() -> None:
    assert requested(Route.INVOCATIONS, COMPLETION_BODY) == requested(Route.COMPLETIONS, COMPLETION_BODY)


def test_sixteen_tokens_unless_told() -> None:
    assert requested(Route.COMPLETIONS, completion()).max_tokens == 16
    assert requested(Route.COMPLETIONS, completion(max_tokens=None)).max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", (TextPrompt("hi"),)),
        (["hi"], (TextPrompt("hi"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([0, 999], (TokenPrompt((0, 999)),)),
        ([[1, 2], [3]], (TokenPrompt((1, 2)), TokenPrompt((3,)))),
        (["x"] * 64, (TextPrompt("x"),) * 64),
        ([1] * 2048, (TokenPrompt((1,) * 2048),)),
    ],
)
def test_the_four_shapes_of_a_prompt(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert requested(Route.COMPLETIONS, {"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("row", "prompt", "code"),
    [
        ("A40", None, Code.MISSING_FIELD),
        ("A40", "", Code.INVALID_VALUE),
        ("A40", [], Code.INVALID_VALUE),
        ("A40", [""], Code.INVALID_VALUE),
        ("A40", ["x", ""], Code.INVALID_VALUE),
        ("A40", [[]], Code.INVALID_VALUE),
        ("A37", 5, Code.INVALID_TYPE),
        ("A37", True, Code.INVALID_TYPE),
        ("A37", {"text": "x"}, Code.INVALID_TYPE),
        ("A37", [None], Code.INVALID_TYPE),
        ("A37", [True], Code.INVALID_TYPE),
        ("A37", [1.0], Code.INVALID_TYPE),
        ("A37", [1, True], Code.INVALID_TYPE),
        ("A37", [{"text": "x"}], Code.INVALID_TYPE),
        ("A44", ["x", 1], Code.INVALID_TYPE),
        ("A44", [1, "x"], Code.INVALID_TYPE),
        ("A44", ["x", [1]], Code.INVALID_TYPE),
        ("A44", [[1], "x"], Code.INVALID_TYPE),
        ("A44", [[1], [[2]]], Code.INVALID_TYPE),
        ("A44", [""] * 60_000, Code.INVALID_VALUE),
        ("A44", ["x"] * 65, Code.INVALID_VALUE),
        ("A44", [[1]] * 65, Code.INVALID_VALUE),
        ("A59", [1000], Code.INVALID_VALUE),
        ("A59", [-1], Code.INVALID_VALUE),
        ("A59", [2**40], Code.INVALID_VALUE),
        ("A59", [[1], [1000]], Code.INVALID_VALUE),
        ("A48", "x" * 24_577, Code.CONTEXT_LENGTH),
        ("A48", ["x", "x" * 24_577], Code.CONTEXT_LENGTH),
        ("A48", [1] * 2049, Code.CONTEXT_LENGTH),
    ],
)
def test_hostile_prompts_are_refused(row: str, prompt: Any, code: Code) -> None:
    error = refused(Route.COMPLETIONS, {"prompt": prompt})
    assert error.code is code
    assert error.status == 400
    assert error.param in ("prompt", None)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"best_of": 10**9}, Code.INVALID_VALUE, "best_of"),
        ({"best_of": 17}, Code.INVALID_VALUE, "best_of"),
        ({"best_of": 0}, Code.INVALID_VALUE, "best_of"),
        ({"best_of": 1, "n": 2}, Code.INVALID_VALUE, "best_of"),
        ({"best_of": 2, "stream": True}, Code.INVALID_REQUEST, "best_of"),
        ({"best_of": True}, Code.INVALID_TYPE, "best_of"),
        ({"prompt": ["x"] * 64, "n": 3}, Code.INVALID_VALUE, "prompt"),
        ({"prompt": ["x"] * 64, "best_of": 3}, Code.INVALID_VALUE, "prompt"),
        ({"logprobs": 21}, Code.INVALID_VALUE, "logprobs"),
        ({"logprobs": -1}, Code.INVALID_VALUE, "logprobs"),
        ({"logprobs": True}, Code.INVALID_TYPE, "logprobs"),
        ({"top_logprobs": 2}, Code.UNKNOWN_FIELD, "top_logprobs"),
        ({"echo": "x"}, Code.INVALID_TYPE, "echo"),
        ({"suffix": "x"}, Code.UNSUPPORTED_FIELD, "suffix"),
        ({"suffix": 5}, Code.INVALID_TYPE, "suffix"),
        ({"max_completion_tokens": 5}, Code.UNKNOWN_FIELD, "max_completion_tokens"),
        ({"tools": []}, Code.UNKNOWN_FIELD, "tools"),
        ({"chat_template_kwargs": {}}, Code.UNKNOWN_FIELD, "chat_template_kwargs"),
    ],
)
def test_what_completions_refuse_and_how_they_name_it(fields: dict[str, Any], code: Code, param: str) -> None:
    error = refused(Route.COMPLETIONS, completion(**fields))
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize("suffix", ["", None])
def test_an_empty_suffix_asks_for_nothing(suffix: str | None) -> None:
    assert requested(Route.COMPLETIONS, completion(suffix=suffix))


def test_sequences_of_one_request_are_bounded_together() -> None:
    assert requested(Route.COMPLETIONS, completion(prompt=["x"] * 64, n=2))
    options = ParseOptions(replace(LIMITS, max_sequences=3))
    assert refused(Route.COMPLETIONS, completion(prompt=["a", "b"], n=2), options).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "top", "prompt_top", "pieces"),
    [
        ({}, None, None, False),
        ({"logprobs": 0}, 0, None, False),
        ({"logprobs": 20}, 20, None, False),
        ({"echo": True}, None, None, False),
        ({"echo": True, "prompt": [1, 2]}, None, None, True),
        ({"echo": True, "logprobs": 0}, 0, 0, True),
        ({"echo": True, "logprobs": 3, "prompt": [1, 2]}, 3, 3, True),
        ({"best_of": 2}, 0, None, False),
        ({"best_of": 2, "logprobs": 4}, 4, None, False),
        ({"best_of": 2, "n": 2}, None, None, False),
    ],
)
def test_what_is_asked_of_the_engine_for_logprobs_echo_and_ranking(
    fields: dict[str, Any], top: int | None, prompt_top: int | None, pieces: bool
) -> None:
    request = requested(Route.COMPLETIONS, completion(**fields))
    assert request.sampling.top_logprobs == top
    assert request.sampling.prompt_logprobs == prompt_top
    assert request.prompt_pieces is pieces


def test_a_best_of_that_asks_for_no_more_than_n_can_be_streamed() -> None:
    wanted = requested(Route.COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 2, "stream": True})
    assert (wanted.choices, wanted.best_of, wanted.stream) == (2, 2, True)
