"""Fields chat and completions share, one table: what each value becomes, or which error it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.dialects.presenter import ParseOptions, status_of
from sagemaker_entry.errors import Code
from tests.sagemaker_entry.dialect_samples import LIMITS, OPTIONS, chat, completion, refused, requested

Make = Callable[..., dict[str, Any]]
SHAPES = [
    pytest.param(Route.CHAT, chat, id="chat"),
    pytest.param(Route.COMPLETIONS, completion, id="completion"),
]


@pytest.mark.parametrize(("route", "make"), SHAPES)
@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": -0.0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"temperature": 1e-8}, "temperature", 1e-8),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 1}, "top_p", 1.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 0}, "top_k", 0),
        ({"top_k": 50}, "top_k", 50),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"typical_p": 0.9}, "typical_p", 0.9),
        ({"repetition_penalty": 1.3}, "repetition_penalty", 1.3),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"logit_bias": {"0": -100, "999": 100}}, "logit_bias", ((0, -100.0), (999, 100.0))),
        ({"logit_bias": {}}, "logit_bias", ()),
    ],
)
def test_sampling_fields_reach_the_sampler(
    route: Route, make: Make, fields: dict[str, Any], attribute: str, value: object
) -> None:
    assert getattr(requested(route, make(**fields)).sampling, attribute) == value


@pytest.mark.parametrize(("route", "make"), SHAPES)
@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"seed": 0}, "seed", 0),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"seed": None}, "seed", None),
        ({"n": 16}, "choices", 16),
        ({"n": 2}, "best_of", 2),
        ({"n": None}, "choices", 1),
        ({"max_tokens": 2048}, "max_tokens", 2048),
        ({"min_tokens": 3, "max_tokens": 3}, "min_tokens", 3),
        ({"stop": "a"}, "stop", ("a",)),
        ({"stop": ["a", "bc"]}, "stop", ("a", "bc")),
        ({"stop": []}, "stop", ()),
        ({"stop": None}, "stop", ()),
        ({"stop": ["x" * 256] * 16}, "stop", ("x" * 256,) * 16),
        ({"include_stop_str_in_output": True}, "include_stop", True),
        ({}, "include_stop", False),
        ({"stop_token_ids": [0, 999]}, "stop_token_ids", (0, 999)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({}, "skip_special_tokens", True),
        ({"cache_salt": "aZ0_-"}, "cache_salt", "aZ0_-"),
        ({"stream": True}, "stream", True),
        ({"stream": None}, "stream", False),
        ({"model": "smol"}, "model", "smol"),
        ({"model": ""}, "model", None),
        ({"model": None}, "model", None),
        ({}, "model", None),
        ({"model": "dummy"}, "model", "smol"),
        ({"model": "tgi"}, "model", "smol"),
    ],
)
def test_other_shared_fields_reach_the_request(
    route: Route, make: Make, fields: dict[str, Any], attribute: str, value: object
) -> None:
    assert getattr(requested(route, make(**fields)), attribute) == value


@pytest.mark.parametrize(("route", "make"), SHAPES)
def test_what_is_absent_comes_from_the_model(route: Route, make: Make) -> None:
    base = SamplingParams(temperature=0.3, top_k=7, top_p=0.8, min_p=0.05, repetition_penalty=1.1)
    options = ParseOptions(replace(LIMITS, default_sampling=base))
    assert requested(route, make(), options).sampling == base
    assert requested(route, make(top_k=-1), options).sampling == replace(base, top_k=0)
    assert requested(route, make(temperature=1), options).sampling == replace(base, temperature=1.0)


@pytest.mark.parametrize(("route", "make"), SHAPES)
@pytest.mark.parametrize(
    ("row", "fields", "code"),
    [
        ("A45", {"n": 10**9}, Code.INVALID_VALUE),
        ("A45", {"n": 17}, Code.INVALID_VALUE),
        ("A45", {"n": 0}, Code.INVALID_VALUE),
        ("A45", {"n": -1}, Code.INVALID_VALUE),
        ("A45", {"n": 2.5}, Code.INVALID_TYPE),
        ("A37", {"n": True}, Code.INVALID_TYPE),
        ("A37", {"n": 1.0}, Code.INVALID_TYPE),
        ("A37", {"n": "1"}, Code.INVALID_TYPE),
        ("A47", {"max_tokens": 2**31}, Code.INVALID_VALUE),
        ("A47", {"max_tokens": -1}, Code.INVALID_VALUE),
        ("A47", {"max_tokens": 0}, Code.INVALID_VALUE),
        ("A47", {"max_tokens": 2049}, Code.INVALID_VALUE),
        ("A47", {"min_tokens": 5, "max_tokens": 4}, Code.INVALID_VALUE),
        ("A47", {"min_tokens": -1}, Code.INVALID_VALUE),
        ("A49", {"temperature": -1}, Code.INVALID_VALUE),
        ("A49", {"temperature": 1e308}, Code.INVALID_VALUE),
        ("A49", {"temperature": 1e-300}, Code.INVALID_VALUE),
        ("A49", {"temperature": 2.1}, Code.INVALID_VALUE),
        ("A49", {"top_p": 0}, Code.INVALID_VALUE),
        ("A49", {"top_p": 1e-300}, Code.INVALID_VALUE),
        ("A49", {"top_p": 1.1}, Code.INVALID_VALUE),
        ("A49", {"typical_p": 0}, Code.INVALID_VALUE),
        ("A49", {"top_k": -5}, Code.INVALID_VALUE),
        ("A49", {"top_k": 2**31}, Code.INVALID_VALUE),
        ("A49", {"min_p": 2}, Code.INVALID_VALUE),
        ("A49", {"min_p": -0.1}, Code.INVALID_VALUE),
        ("A49", {"repetition_penalty": 0}, Code.INVALID_VALUE),
        ("A49", {"repetition_penalty": 1e9}, Code.INVALID_VALUE),
        ("A49", {"repetition_penalty": -1e9}, Code.INVALID_VALUE),
        ("A49", {"frequency_penalty": 1e9}, Code.INVALID_VALUE),
        ("A49", {"presence_penalty": -1e9}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"1000": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"1001": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"-1": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {str(2**31): 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"01": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"1.0": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"\u0661": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"": 1}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"1": 101}}, Code.INVALID_VALUE),
        ("A51", {"logit_bias": {"1": "5"}}, Code.INVALID_TYPE),
        ("A51", {"logit_bias": {"1": True}}, Code.INVALID_TYPE),
        ("A51", {"logit_bias": [1.0]}, Code.INVALID_TYPE),
        ("A51", {"stop_token_ids": [1000]}, Code.INVALID_VALUE),
        ("A51", {"stop_token_ids": [-1]}, Code.INVALID_VALUE),
        ("A51", {"stop_token_ids": [True]}, Code.INVALID_TYPE),
        ("A51", {"stop_token_ids": [1] * 65}, Code.INVALID_VALUE),
        ("A51", {"allowed_token_ids": [1]}, Code.UNKNOWN_FIELD),
        ("A51", {"bad_words": ["x"]}, Code.UNKNOWN_FIELD),
        ("A54", {"stop": ["x"] * 10_000}, Code.INVALID_VALUE),
        ("A54", {"stop": ["x"] * 17}, Code.INVALID_VALUE),
        ("A54", {"stop": ""}, Code.INVALID_VALUE),
        ("A54", {"stop": ["a", ""]}, Code.INVALID_VALUE),
        ("A54", {"stop": "x" * 257}, Code.INVALID_VALUE),
        ("A54", {"stop": "x" * 1_000_000}, Code.INVALID_VALUE),
        ("A54", {"stop": [1]}, Code.INVALID_TYPE),
        ("A54", {"stop": {"a": 1}}, Code.INVALID_TYPE),
        ("A55", {"seed": 2**63}, Code.INVALID_VALUE),
        ("A55", {"seed": -1}, Code.INVALID_VALUE),
        ("A55", {"seed": "abc"}, Code.INVALID_TYPE),
        ("A56", {"cache_salt": ""}, Code.INVALID_VALUE),
        ("A56", {"cache_salt": "x" * 65}, Code.INVALID_VALUE),
        ("A56", {"cache_salt": "a\nb"}, Code.INVALID_VALUE),
        ("A56", {"cache_salt": "ab\n"}, Code.INVALID_VALUE),
        ("A56", {"cache_salt": "x" * 1_000_000}, Code.INVALID_VALUE),
        ("A58", {"stream": "yes"}, Code.INVALID_TYPE),
        ("A58", {"stream": 1}, Code.INVALID_TYPE),
        ("A58", {"stream_options": {"include_usage": True}}, Code.INVALID_REQUEST),
        ("A58", {"stream": True, "stream_options": True}, Code.INVALID_TYPE),
        ("A58", {"stream": True, "stream_options": {"include_usage": "x"}}, Code.INVALID_TYPE),
        ("A58", {"stream": True, "stream_options": {"typo": 1}}, Code.UNKNOWN_FIELD),
        (
            "A58",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            Code.UNSUPPORTED_FIELD,
        ),
        ("A60", {"prompt_embeds": "gASV"}, Code.UNKNOWN_FIELD),
        ("A61", {"mm_hashes": []}, Code.UNKNOWN_FIELD),
        ("A61", {"kv_transfer_params": {}}, Code.UNKNOWN_FIELD),
        ("A61", {"extra_args": {}}, Code.UNKNOWN_FIELD),
        ("A66", {"chat_template": "{{ 7*7 }}"}, Code.UNKNOWN_FIELD),
        ("A66", {"tokenize": True}, Code.UNKNOWN_FIELD),
        ("A38", {"max_token": 5}, Code.UNKNOWN_FIELD),
        ("A38", {"__class__": 5}, Code.UNKNOWN_FIELD),
        ("A38", {"constructor": {}}, Code.UNKNOWN_FIELD),
        ("A38", {f"k{i}": 1 for i in range(10_000)}, Code.TOO_MANY_KEYS),
        ("A75", {"response_format": {"type": "grammar"}}, Code.INVALID_VALUE),
        ("A75", {"response_format": {}}, Code.MISSING_FIELD),
        ("A75", {"response_format": "text"}, Code.INVALID_TYPE),
        ("A75", {"structured_outputs": {"regex": "a"}}, Code.UNSUPPORTED_FIELD),
    ],
)
def test_hostile_values_are_refused_with_the_field_named(
    row: str, route: Route, make: Make, fields: dict[str, Any], code: Code
) -> None:
    error = refused(route, make(**fields))
    assert error.code is code
    assert status_of(Dialect.OPENAI_CHAT, error) == 400
    if code is not Code.TOO_MANY_KEYS:
        assert error.param is not None
        assert error.param.partition(".")[0] in fields


@pytest.mark.parametrize(("route", "make"), SHAPES)
@pytest.mark.parametrize("name", ["gpt-4", "smol ", "SMOL", "../smol", "\x00", "x" * 10_000])
def test_any_other_model_is_not_found(route: Route, make: Make, name: str) -> None:
    error = refused(route, make(model=name))
    assert (error.code, error.status, error.param) == (Code.MODEL_NOT_FOUND, 404, "model")


@pytest.mark.parametrize(("route", "make"), SHAPES)
def test_a_model_of_the_wrong_type_is_a_type_error(route: Route, make: Make) -> None:
    assert refused(route, make(model=5)).code is Code.INVALID_TYPE


@pytest.mark.parametrize(("route", "make"), SHAPES)
@pytest.mark.parametrize(
    "fields",
    [
        {"user": "someone"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
        {"prompt_cache_options": {}},
        {"prompt_cache_retention": "24h"},
        {"verbosity": "low"},
        {"priority": -(10**9)},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"stream_options": None},
        {"logit_bias": None},
    ],
)
def test_fields_that_ask_nothing_change_nothing(route: Route, make: Make, fields: dict[str, Any]) -> None:
    assert requested(route, make(**fields)) == requested(route, make())


@pytest.mark.parametrize(("route", "make"), SHAPES)
def test_banning_every_token_is_refused_where_it_can_be_seen(route: Route, make: Make) -> None:
    options = ParseOptions(replace(LIMITS, vocabulary=4))
    every = {str(token): -100 for token in range(4)}
    assert refused(route, make(logit_bias=every), options).param == "logit_bias"
    assert requested(route, make(logit_bias={**every, "2": -99}), options)


@pytest.mark.parametrize(("route", "make"), SHAPES)
def test_unknown_names_pass_where_the_operator_lets_them(route: Route, make: Make) -> None:
    options = replace(OPTIONS, unknown_fields="ignore")
    assert requested(route, make(typo=1), options) == requested(route, make())


@pytest.mark.parametrize(("route", "make"), SHAPES)
def test_content_is_in_no_repr(route: Route, make: Make) -> None:
    request = requested(route, make(stop="canary-stop", cache_salt="canary-salt"))
    assert "canary" not in repr(request)
    assert "'hi'" not in repr(request)
