"""TGI's request, field by field: defaults, traps, and TGI's own words with status 422."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from text_generation import types as tgi_types

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.dialects.presenter import ParseOptions, status_of, tgi_error
from sagemaker_entry.errors import Code
from sagemaker_entry.generation import TextPrompt
from tests.sagemaker_entry.dialect_samples import (
    CONTEXT,
    LIMITS,
    OPTIONS,
    TGI_BODY,
    parsed,
    refused,
    requested,
    result,
    tgi,
)

CONTEXTLESS_ROUTES = (Route.ROOT, Route.INVOCATIONS, Route.GENERATE, Route.GENERATE_STREAM, Route.TOKENIZE)


def sampling(**parameters: Any) -> SamplingParams:
    return requested(Route.GENERATE, tgi(**parameters)).sampling


def test_a_full_body_is_honoured_field_by_field() -> None:
    request = requested(Route.INVOCATIONS, TGI_BODY)
    assert request.prompts == (TextPrompt("What is the capital of France?"),)
    assert request.sampling == SamplingParams(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        typical_p=0.95,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        top_logprobs=2,
    )
    assert request.seed == 7
    assert request.max_tokens == 20
    assert request.stop == ("\n\n",)
    assert request.truncate_tokens == 100
    assert request.stream
    assert (request.choices, request.best_of, request.min_tokens) == (1, 1, 0)
    assert not request.prompt_pieces and not request.ignore_eos
    assert request.skip_special_tokens


def test_the_body_of_the_tgi_client_is_accepted_with_its_nulls() -> None:
    parameters = tgi_types.Parameters(details=True, decoder_input_details=True)
    body = tgi_types.Request(inputs="hi", stream=False, parameters=parameters).model_dump()
    request = requested(Route.ROOT, body)
    assert request.max_tokens == 20
    assert request.sampling.temperature == 0.0
    assert request.prompt_pieces and request.sampling.prompt_logprobs == 0


def test_a_matched_stop_string_stays_in_the_text() -> None:
    assert requested(Route.GENERATE, tgi(stop=["x"])).include_stop


@pytest.mark.parametrize(
    ("body", "samples"),
    [
        ({"inputs": "x"}, True),
        ({"inputs": "x", "parameters": None}, True),
        ({"inputs": "x", "parameters": {}}, False),
        (tgi(do_sample=False), False),
        (tgi(do_sample=True), True),
        (tgi(temperature=1.0), False),
        (tgi(temperature=0.7), True),
        (tgi(do_sample=False, temperature=0.7), True),
        (tgi(top_k=5), True),
        (tgi(top_p=0.5), True),
        (tgi(typical_p=0.5), True),
        (tgi(repetition_penalty=1.2), False),
        (tgi(seed=3), False),
    ],
)
def test_when_it_samples(body: dict[str, Any], samples: bool) -> None:
    assert requested(Route.GENERATE, body).sampling.greedy is not samples


def test_what_is_absent_is_off_whatever_the_model_recommends() -> None:
    limits = replace(LIMITS, default_sampling=SamplingParams(temperature=0.3, top_k=7))
    request = requested(Route.GENERATE, tgi(do_sample=True), ParseOptions(limits))
    assert request.sampling == SamplingParams()
    assert request.seed is None
    assert request.max_tokens is None
    assert request.stop == ()


@pytest.mark.parametrize(
    ("route", "listed", "full_text"),
    [
        (Route.ROOT, True, True),
        (Route.INVOCATIONS, True, True),
        (Route.GENERATE, False, False),
        (Route.GENERATE_STREAM, False, False),
    ],
)
def test_list_reply_and_full_text_by_route(route: Route, listed: bool, full_text: bool) -> None:
    body = {"inputs": "Say ", "parameters": {}}
    whole = parsed(route, body).presenter.complete(result(["hi"]), CONTEXT)
    text = "Say hi" if full_text else "hi"
    expected = f'{{"generated_text":"{text}"}}'
    assert whole.decode() == (f"[{expected}]" if listed else expected)


@pytest.mark.parametrize("route", [Route.ROOT, Route.GENERATE])
@pytest.mark.parametrize("wanted", [True, False])
def test_return_full_text_given_wins_on_every_route(route: Route, wanted: bool) -> None:
    presenter = parsed(route, tgi(return_full_text=wanted)).presenter
    assert (b'"hi there"' in presenter.complete(result([" there"]), CONTEXT)) is wanted


def test_the_full_text_default_is_the_operators() -> None:
    options = replace(OPTIONS, full_text_by_default=False)
    presenter = parsed(Route.ROOT, tgi(), options).presenter
    assert presenter.complete(result(["!"]), CONTEXT) == b'[{"generated_text":"!"}]'


@pytest.mark.parametrize(
    ("route", "stream", "streams"),
    [
        (Route.GENERATE_STREAM, None, True),
        (Route.GENERATE_STREAM, False, True),
        (Route.GENERATE, None, False),
        (Route.GENERATE, True, True),
        (Route.ROOT, True, True),
        (Route.INVOCATIONS, False, False),
    ],
)
def test_it_streams_when_the_body_or_the_route_says_so(
    route: Route, stream: bool | None, streams: bool
) -> None:
    assert requested(route, {"inputs": "x", "stream": stream}).stream is streams


@pytest.mark.parametrize(
    ("parameters", "stream", "top_logprobs"),
    [
        ({}, False, None),
        ({"top_n_tokens": 3}, False, None),
        ({"details": True}, False, 0),
        ({"details": True, "top_n_tokens": 3}, False, 3),
        ({}, True, 0),
        ({"top_n_tokens": 5}, True, 5),
        ({"decoder_input_details": True}, False, 0),
        ({"best_of": 2, "do_sample": True}, False, 0),
    ],
)
def test_logprobs_are_asked_for_where_the_reply_shows_or_ranks_them(
    parameters: dict[str, Any], stream: bool, top_logprobs: int | None
) -> None:
    request = requested(Route.GENERATE, {"inputs": "x", "parameters": parameters, "stream": stream})
    assert request.sampling.top_logprobs == top_logprobs


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 10**9, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 1000000000"),
        ({"best_of": -1}, "`best_of` must be > 0 and <= 2. Given: -1"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        (
            {"best_of": 2, "do_sample": True, "seed": 1},
            "`seed` must not be set when `best_of` > 1",
        ),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"temperature": 1e-300}, "`temperature` must be >= 1e-08 and <= 100"),
        ({"temperature": 1e300}, "`temperature` must be >= 1e-08 and <= 100"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"repetition_penalty": 1e9}, "`repetition_penalty` must be >= 0.01 and <= 100"),
        ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -5}, "`top_k` must be strictly positive"),
        ({"top_k": 2**31}, "`top_k` must be <= 2147483647"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"typical_p": -0.5}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be strictly positive"),
        ({"max_new_tokens": 2049}, "`max_new_tokens` must be <= 2048. Given: 2049"),
        ({"max_new_tokens": 2**31}, "`max_new_tokens` must be <= 2048. Given: 2147483648"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` must be made of strings of 1 to 256 characters"),
        ({"stop": ["x" * 257]}, "`stop` must be made of strings of 1 to 256 characters"),
        ({"stop": "x"}, "`stop` must be a list of strings"),
        ({"stop": [1]}, "`stop` must be a list of strings"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 2000. Given: 0"),
        ({"truncate": 2001}, "`truncate` must be strictly positive and less than 2000. Given: 2001"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 5. Given: -1"),
        (
            {"grammar": {"type": "json", "value": {}}},
            "grammar is not valid: Grammar must have a 'properties' field",
        ),
        ({"watermark": True}, "`watermark` is not supported"),
        ({"adapter_id": "x"}, "`adapter_id` is not supported"),
        ({"seed": -1}, "`seed` must be from 0 to 18446744073709551615"),
        ({"seed": "abc"}, "`seed` must be an integer"),
        ({"seed": 1.0}, "`seed` must be an integer"),
        ({"do_sample": 1}, "`do_sample` must be true or false"),
        ({"details": "yes"}, "`details` must be true or false"),
        ({"watermark": 0}, "`watermark` must be true or false"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be an integer"),
        ({"temperature": "hot"}, "`temperature` must be a number"),
        ({"temperature": True}, "`temperature` must be a number"),
        ({"max_token": 5}, "`max_token` is not a known field"),
    ],
)
def test_validation_texts_are_tgis_own_with_status_422(parameters: dict[str, Any], sentence: str) -> None:
    error = refused(Route.GENERATE, tgi(**parameters))
    assert status_of(Dialect.TGI, error) == 422
    assert tgi_error(error) == {
        "error": f"Input validation error: {sentence}",
        "error_type": "validation",
    }


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"inputs": "", "parameters": {}}, "`inputs` cannot be empty"),
        ({"inputs": None}, "`inputs` is required"),
        ({"inputs": ["x"]}, "`inputs` must be a string"),
        ({"inputs": [""] * 60_000}, "`inputs` must be a string"),
        ({"inputs": 5}, "`inputs` must be a string"),
        ({"inputs": {"text": "x"}}, "`inputs` must be a string"),
        ({"inputs": "x", "parameters": []}, "`parameters` must be an object"),
        ({"inputs": "x", "parameters": "x"}, "`parameters` must be an object"),
        ({"inputs": "x", "stream": "yes"}, "`stream` must be true or false"),
        ({"inputs": "x", "stream": 1}, "`stream` must be true or false"),
        ({"inputs": "x", "options": {}}, "`options` is not a known field"),
        (
            {"inputs": "x", "stream": True, "parameters": {"best_of": 2, "do_sample": True}},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"inputs": "x", "stream": True, "parameters": {"decoder_input_details": True}},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        (
            {"inputs": "x" * (2048 * 12 + 1), "parameters": {}},
            "`inputs` must have less than 2048 tokens. Given: more than 24576 bytes",
        ),
        (
            {"inputs": "\u20ac" * (2048 * 4 + 1), "parameters": {}},
            "`inputs` must have less than 2048 tokens. Given: more than 24576 bytes",
        ),
    ],
)
@pytest.mark.parametrize("route", CONTEXTLESS_ROUTES)
def test_bodies_refused_on_every_tgi_route(route: Route, body: dict[str, Any], sentence: str) -> None:
    error = refused(route, body)
    assert tgi_error(error)["error"] == f"Input validation error: {sentence}"
    assert status_of(Dialect.TGI, error) == 422


def test_a_prompt_at_the_byte_bound_passes() -> None:
    assert requested(Route.GENERATE, {"inputs": "x" * (2048 * 12)})


def test_endpoints_without_best_of_or_top_tokens_say_so() -> None:
    options = ParseOptions(replace(LIMITS, max_best_of=1, max_top_tokens=0))
    error = refused(Route.GENERATE, tgi(best_of=2, do_sample=True), options)
    assert error.message == "`best_of` != 1 is not allowed for this endpoint"
    error = refused(Route.GENERATE, tgi(top_n_tokens=1), options)
    assert error.message == "`top_n_tokens` != 0 is not allowed for this endpoint"
    assert requested(Route.GENERATE, tgi(best_of=1, top_n_tokens=0), options)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "typical_p"])
def test_any_sampling_field_allows_best_of(name: str) -> None:
    value: float = 2 if name == "top_k" else 0.5
    assert requested(Route.GENERATE, tgi(best_of=2, **{name: value})).best_of == 2


def test_the_whole_range_of_seeds_is_accepted() -> None:
    for seed in (0, 2**63, 2**64 - 1):
        assert requested(Route.GENERATE, tgi(seed=seed)).seed == seed


def test_unknown_names_pass_where_the_operator_lets_them() -> None:
    options = replace(OPTIONS, unknown_fields="ignore")
    body = {"inputs": "x", "options": {}, "parameters": {"typo": 1}}
    assert requested(Route.ROOT, body, options)
    assert refused(Route.ROOT, body).code is Code.UNKNOWN_FIELD
