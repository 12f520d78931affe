"""The error table is whole and closed, and each dialect words it in its own shape and status."""

from __future__ import annotations

import json
from string import Formatter
from typing import Any

import pytest
from huggingface_hub.inference._common import _parse_text_generation_error
from text_generation import errors as tgi_errors

from sagemaker_entry.dialects.choose import Dialect
from sagemaker_entry.dialects.presenter import (
    JSON_TYPE,
    MAX_ERROR_BYTES,
    error_body,
    openai_error,
    status_of,
    tgi_error,
)
from sagemaker_entry.errors import TABLE, ApiError, Code, Rule

FILL: dict[str, Any] = {
    "limit": 10,
    "prompt_tokens": 12,
    "expected": "an integer",
    "rule": "small",
    "shape": "Cohere chat",
    "reason": "it is too large",
}


def sample(code: Code) -> ApiError:
    """An error of `code` with every place of its message filled."""
    names = {name for _, name, _, _ in Formatter().parse(TABLE[code].message) if name}
    numbers = {name: FILL[name] for name in names - {"param"}}
    return ApiError(code, param="field", **numbers)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_a_rule_with_a_sane_status_and_message(code: Code) -> None:
    rule = TABLE[code]
    assert isinstance(rule, Rule)
    assert 400 <= rule.status < 600
    assert rule.type in {
        "invalid_request_error",
        "authentication_error",
        "rate_limit_error",
        "server_error",
    }
    message = sample(code).message
    assert message and not message.endswith(".") and "{" not in message


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_code_has_a_small_body_in_every_dialect(dialect: Dialect, code: Code) -> None:
    body, content_type = error_body(dialect, sample(code), "\x00" * 5_000)
    assert content_type == JSON_TYPE
    assert len(body) <= MAX_ERROR_BYTES
    assert isinstance(json.loads(body), dict)


def test_the_canonical_body_has_exactly_the_documented_fields() -> None:
    body, _ = error_body(Dialect.OPENAI_CHAT, ApiError(Code.MISSING_FIELD, param="messages"), "id-7")
    assert json.loads(body) == {
        "error": {
            "message": "`messages` is required",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "missing_field",
            "request_id": "id-7",
        }
    }


def test_the_tgi_body_has_error_and_error_type_side_by_side() -> None:
    body, _ = error_body(Dialect.TGI, ApiError(Code.MISSING_FIELD, param="inputs"), "id-7")
    assert json.loads(body) == {
        "error": "Input validation error: `inputs` is required",
        "error_type": "validation",
    }


def test_the_cohere_body_is_a_message_alone() -> None:
    body, _ = error_body(Dialect.COHERE, ApiError(Code.UNSUPPORTED_SHAPE, shape="Cohere rerank"), "id-7")
    assert json.loads(body) == {"message": "a Cohere rerank body is not served here"}


@pytest.mark.parametrize(
    ("code", "tgi", "openai"),
    [
        (Code.INVALID_VALUE, 422, 400),
        (Code.INVALID_TYPE, 422, 400),
        (Code.INVALID_REQUEST, 422, 400),
        (Code.MISSING_FIELD, 422, 400),
        (Code.UNKNOWN_FIELD, 422, 400),
        (Code.UNSUPPORTED_FIELD, 422, 400),
        (Code.CONTEXT_LENGTH, 422, 400),
        (Code.CONTROL_TOKEN, 422, 400),
        (Code.TEMPLATE_FAILED, 422, 400),
        (Code.INVALID_JSON, 400, 400),
        (Code.TOO_DEEP, 400, 400),
        (Code.TOO_MANY_KEYS, 400, 400),
        (Code.TOO_MANY_VALUES, 400, 400),
        (Code.DUPLICATE_KEY, 400, 400),
        (Code.INVALID_NUMBER, 400, 400),
        (Code.INVALID_UTF8, 400, 400),
        (Code.LONE_SURROGATE, 400, 400),
        (Code.BAD_REQUEST, 400, 400),
        (Code.MODEL_NOT_FOUND, 404, 404),
        (Code.NOT_FOUND, 404, 404),
        (Code.UNAUTHORIZED, 401, 401),
        (Code.METHOD_NOT_ALLOWED, 405, 405),
        (Code.READ_TIMEOUT, 408, 408),
        (Code.BODY_TOO_LARGE, 413, 413),
        (Code.MEDIA_TYPE, 415, 415),
        (Code.OVERLOADED, 429, 429),
        (Code.LOADING, 503, 503),
        (Code.DRAINING, 503, 503),
        (Code.ENGINE_DOWN, 503, 503),
        (Code.DEADLINE, 504, 504),
        (Code.NUMERICAL, 424, 422),
        (Code.KV_EXHAUSTED, 424, 507),
        (Code.INTERNAL, 424, 500),
    ],
)
def test_status_by_dialect(code: Code, tgi: int, openai: int) -> None:
    error = sample(code)
    assert status_of(Dialect.TGI, error) == tgi
    assert status_of(Dialect.OPENAI_CHAT, error) == openai
    assert status_of(Dialect.OPENAI_COMPLETION, error) == openai
    assert status_of(Dialect.COHERE, error) == openai


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (ApiError(Code.OVERLOADED), "Model is overloaded", "overloaded"),
        (ApiError(Code.LOADING), "unhealthy", "healthcheck"),
        (
            ApiError(Code.INTERNAL),
            "Request failed during generation: the server failed",
            "generation",
        ),
        (
            ApiError(Code.NO_TEMPLATE),
            "Template error: this model has no chat template",
            "template_error",
        ),
        (
            ApiError(Code.CONTEXT_LENGTH, limit=2000, prompt_tokens=2001),
            "Input validation error: `inputs` must have less than 2000 tokens. Given: 2001",
            "validation",
        ),
        (
            ApiError(Code.CONTEXT_LENGTH, limit=2048, prompt_tokens=2000, max_tokens=100),
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. "
            "Given: 2000 `inputs` tokens and 100 `max_new_tokens`",
            "validation",
        ),
    ],
)
def test_tgi_words_the_same_facts_as_tgi_does(error: ApiError, text: str, kind: str) -> None:
    assert tgi_error(error) == {"error": text, "error_type": kind}


def test_the_tgi_client_raises_its_own_class_for_each_kind() -> None:
    def raised(code: Code) -> type[Exception]:
        error = sample(code)
        return type(tgi_errors.parse_error(status_of(Dialect.TGI, error), tgi_error(error)))

    assert raised(Code.INVALID_VALUE) is tgi_errors.ValidationError
    assert raised(Code.OVERLOADED) is tgi_errors.OverloadedError
    assert raised(Code.INTERNAL) is tgi_errors.GenerationError


def test_the_hub_client_knows_the_error_types() -> None:
    for code, name in ((Code.OVERLOADED, "OverloadedError"), (Code.INVALID_VALUE, "ValidationError")):
        error = tgi_error(sample(code))
        made = _parse_text_generation_error(error["error"], error["error_type"])
        assert type(made).__name__ == name


def test_an_error_keeps_numbers_and_shows_only_its_code() -> None:
    error = ApiError(Code.CONTEXT_LENGTH, limit=5, prompt_tokens=6, retry_after_s=None)
    assert error.numbers == {"limit": 5, "prompt_tokens": 6}
    assert str(error) == "context_length_exceeded"
    assert error.status == 400


def test_a_long_request_id_is_cut() -> None:
    assert len(openai_error(ApiError(Code.INTERNAL), "r" * 5_000)["request_id"]) == 256


def test_an_error_body_that_grew_too_large_is_our_own_fault() -> None:
    with pytest.raises(AssertionError):
        error_body(Dialect.OPENAI_CHAT, ApiError(Code.UNKNOWN_FIELD, param="x" * 5_000), "id")
