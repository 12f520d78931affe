"""Cohere's v1 generate: its body, answers and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import EndReason, TextPrompt
from tests.sagemaker_entry.cohere_samples import (
    AWS_GENERATE,
    GENERATE,
    STREAMED,
    bare,
    refusal_of,
    request_of,
    unwrapped,
)
from tests.sagemaker_entry.dialect_samples import CONTEXT, events, parsed, result


def test_every_field_reaches_the_request() -> None:
    request = request_of(GENERATE)
    assert request.prompts == (TextPrompt("The capital of France is"),)
    assert (request.choices, request.best_of, request.max_tokens) == (2, 2, 8)
    assert request.stop == (".",) and request.include_stop
    assert request.sampling.top_logprobs == 0
    assert (request.sampling.top_k, request.sampling.top_p) == (0, 0.75)


def test_end_sequences_are_cut_and_stop_sequences_are_kept() -> None:
    request = request_of({"prompt": "x", "end_sequences": ["."]})
    assert request.stop == (".",) and not request.include_stop
    error = refusal_of({"prompt": "x", "end_sequences": ["."], "stop_sequences": ["!"]})
    assert error.param == "end_sequences"


def test_truncation_keeps_the_end_of_the_prompt_or_is_refused() -> None:
    assert request_of({"prompt": "x", "truncate": "NONE"}).truncate_tokens is None
    assert request_of({"prompt": "x", "truncate": "START", "max_tokens": 48}).truncate_tokens == 2000
    assert request_of({"prompt": "x", "truncate": "START", "max_tokens": 148}).truncate_tokens == 1900
    assert refusal_of({"prompt": "x", "truncate": "END"}).param == "truncate"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"preset": "x"}, "preset"),
        ({"return_likelihoods": "ALL"}, "return_likelihoods"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_generations": 17}, "num_generations"),
        ({"return_prompt": True}, "return_prompt"),
        ({"k": 1, "temprature": 1}, "temprature"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal_of({"prompt": "x", "k": 0, **fields}).param == param


def test_a_whole_answer_lists_the_generations_with_their_likelihoods() -> None:
    presenter = parsed(Route.INVOCATIONS, GENERATE).presenter
    reply = json.loads(presenter.complete(result([" Paris.", " Rome."]), CONTEXT))
    assert reply["id"] == CONTEXT.id and reply["prompt"] == GENERATE["prompt"]
    assert [g["text"] for g in reply["generations"]] == [" Paris.", " Rome."]
    assert [g["index"] for g in reply["generations"]] == [0, 1]
    assert reply["generations"][0]["token_likelihoods"] == [{"token": " Paris.", "likelihood": -0.5}]
    assert reply["generations"][0]["likelihood"] == -0.5
    assert len({g["id"] for g in reply["generations"]}) == 2


@pytest.mark.parametrize("wrapped", [True, False])
def test_both_streams_end_once_with_the_whole_reply(wrapped: bool) -> None:
    body = {**GENERATE, "num_generations": 1} if wrapped else AWS_GENERATE
    read = unwrapped if wrapped else bare
    presenter = parsed(Route.INVOCATIONS, body, STREAMED).presenter
    assert presenter.open(CONTEXT) == []
    pieces = [p for e in events([" Pa", "ris"], reason=EndReason.STOP_STRING) for p in presenter.event(e)]
    found = [read(piece) for piece in [*pieces, *presenter.close()]]
    assert [(e["text"], e["index"], e["is_finished"]) for e in found[:-1]] == [
        (" Pa", 0, False),
        ("ris", 0, False),
    ]
    end = found[-1]
    assert end["event_type"] == "stream-end" and end["is_finished"] is True
    assert end["finish_reason"] == "STOP_SEQUENCE"
    assert end["response"]["generations"][0]["text"] == " Paris"
    assert end["response"]["generations"][0]["finish_reason"] == "STOP_SEQUENCE"


def test_the_stream_type_tells_wrapped_from_bare() -> None:
    assert parsed(Route.INVOCATIONS, GENERATE, STREAMED).presenter.stream_type == "application/json"
    assert parsed(Route.INVOCATIONS, AWS_GENERATE).presenter.stream_type == "application/jsonlines"


def test_a_stream_that_failed_ends_with_its_own_event() -> None:
    event = bare(parsed(Route.INVOCATIONS, AWS_GENERATE).presenter.stream_error(ApiError(Code.DEADLINE)))
    assert event["event_type"] == "stream-error" and "deadline" in event["err"]
