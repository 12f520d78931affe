"""The table of shapes on /invocations, row by row, and the fixed dialect of every other route."""

from __future__ import annotations

from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Dialect, DialectSetting, Route, choose, error_dialect
from sagemaker_entry.dialects.parse import parse
from sagemaker_entry.errors import ApiError, Code
from tests.sagemaker_entry.dialect_samples import OPTIONS

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "dialect"),
    [
        ({"inputs": "x"}, Dialect.TGI),
        ({"inputs": ["x"]}, Dialect.TGI),
        ({"inputs": "x", "messages": MESSAGES, "prompt": "x", "message": "x"}, Dialect.TGI),
        ({"message": "x"}, Dialect.COHERE),
        ({"message": "x", "messages": MESSAGES}, Dialect.COHERE),
        ({"query": "x", "documents": []}, Dialect.COHERE),
        ({"texts": []}, Dialect.COHERE),
        ({"images": []}, Dialect.COHERE),
        ({"texts": [], "model_id": "x"}, Dialect.COHERE),
        ({"messages": MESSAGES}, Dialect.OPENAI_CHAT),
        ({"messages": None}, Dialect.OPENAI_CHAT),
        ({"messages": MESSAGES, "prompt": "x"}, Dialect.OPENAI_CHAT),
        ({"messages": MESSAGES, "tool_choice": "none"}, Dialect.OPENAI_CHAT),
        ({"messages": MESSAGES, "tool_choice": {"type": "function"}}, Dialect.OPENAI_CHAT),
        ({"messages": MESSAGES, "tool_choice": "NONE"}, Dialect.COHERE),
        ({"messages": MESSAGES, "tool_choice": "REQUIRED"}, Dialect.COHERE),
        ({"messages": MESSAGES, "k": 3}, Dialect.COHERE),
        ({"messages": MESSAGES, "p": 0.5}, Dialect.COHERE),
        ({"messages": MESSAGES, "stop_sequences": []}, Dialect.COHERE),
        ({"messages": MESSAGES, "citation_options": {}}, Dialect.COHERE),
        ({"messages": MESSAGES, "safety_mode": "OFF"}, Dialect.COHERE),
        ({"messages": MESSAGES, "strict_tools": True}, Dialect.COHERE),
        ({"messages": MESSAGES, "thinking": {}}, Dialect.COHERE),
        ({"prompt": "x"}, Dialect.OPENAI_COMPLETION),
        ({"prompt": [1, 2]}, Dialect.OPENAI_COMPLETION),
        ({"prompt": "x", "k": 1}, Dialect.COHERE),
        ({"prompt": "x", "p": 1}, Dialect.COHERE),
        ({"prompt": "x", "num_generations": 1}, Dialect.COHERE),
        ({"prompt": "x", "stop_sequences": []}, Dialect.COHERE),
        ({"prompt": "x", "end_sequences": []}, Dialect.COHERE),
        ({"prompt": "x", "return_likelihoods": "NONE"}, Dialect.COHERE),
        ({"prompt": "x", "truncate": "END"}, Dialect.COHERE),
        ({"prompt": "x", "preset": "x"}, Dialect.COHERE),
        ({"prompt": "x", "raw_prompting": True}, Dialect.COHERE),
    ],
)
def test_the_first_matching_row_decides(body: dict[str, Any], dialect: Dialect) -> None:
    assert choose(Route.INVOCATIONS, body) is dialect


@pytest.mark.parametrize(
    "body",
    [{}, [], "", "x", 1, None, True, [{"inputs": "x"}], {"input": "x"}, {"message": 1}, {"query": "x"}],
)
def test_what_no_row_matches_is_refused_with_the_accepted_shapes(body: Any) -> None:
    with pytest.raises(ApiError) as caught:
        choose(Route.INVOCATIONS, body)
    assert caught.value.code is Code.UNKNOWN_SHAPE
    assert all(name in caught.value.message for name in ("`inputs`", "`messages`", "`prompt`"))


@pytest.mark.parametrize("kind", ["NEW_SESSION", "CLOSE", "x", 1])
def test_session_control_says_that_sessions_are_off(kind: object) -> None:
    with pytest.raises(ApiError) as caught:
        choose(Route.INVOCATIONS, {"requestType": kind, "inputs": "x"})
    assert caught.value.status == 400
    assert caught.value.message == "Invalid payload. stateful sessions not enabled"


@pytest.mark.parametrize(
    ("setting", "body", "dialect"),
    [
        ("openai", {"messages": MESSAGES, "k": 1}, Dialect.OPENAI_CHAT),
        ("openai", {"prompt": "x", "truncate": "END"}, Dialect.OPENAI_COMPLETION),
        ("openai", {"prompt": "x", "inputs": "x"}, Dialect.OPENAI_COMPLETION),
        ("tgi", {"messages": MESSAGES}, Dialect.TGI),
        ("tgi", {"message": "x"}, Dialect.TGI),
        ("tgi", {}, Dialect.TGI),
        ("cohere", {"messages": MESSAGES}, Dialect.COHERE),
        ("cohere", {"prompt": "x"}, Dialect.COHERE),
        ("cohere", {"inputs": "x"}, Dialect.COHERE),
    ],
)
def test_the_setting_overrules_the_table(
    setting: DialectSetting, body: dict[str, Any], dialect: Dialect
) -> None:
    assert choose(Route.INVOCATIONS, body, setting) is dialect


@pytest.mark.parametrize("body", [{"inputs": "x"}, {"message": "x"}, {}])
def test_the_openai_setting_takes_openai_shapes_alone(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        choose(Route.INVOCATIONS, body, "openai")
    assert caught.value.code is Code.UNKNOWN_SHAPE


@pytest.mark.parametrize(
    ("route", "dialect", "errors"),
    [
        (Route.ROOT, Dialect.TGI, Dialect.TGI),
        (Route.GENERATE, Dialect.TGI, Dialect.TGI),
        (Route.GENERATE_STREAM, Dialect.TGI, Dialect.TGI),
        (Route.TOKENIZE, Dialect.TGI, Dialect.TGI),
        (Route.CHAT_TOKENIZE, Dialect.OPENAI_CHAT, Dialect.TGI),
        (Route.CHAT, Dialect.OPENAI_CHAT, Dialect.OPENAI_CHAT),
        (Route.COMPLETIONS, Dialect.OPENAI_COMPLETION, Dialect.OPENAI_COMPLETION),
    ],
)
def test_other_routes_have_one_dialect_whatever_the_body(
    route: Route, dialect: Dialect, errors: Dialect
) -> None:
    assert choose(route, {"message": "x", "k": 1}) is dialect
    assert choose(route, {"inputs": "x"}, "openai") is dialect
    assert error_dialect(route) is errors
    with pytest.raises(ApiError):
        choose(route, [])


def test_errors_before_a_body_is_known_follow_the_setting() -> None:
    assert error_dialect(Route.INVOCATIONS) is Dialect.OPENAI_CHAT
    assert error_dialect(Route.INVOCATIONS, "tgi") is Dialect.TGI
    assert error_dialect(Route.INVOCATIONS, "cohere") is Dialect.COHERE
    assert error_dialect(None) is Dialect.OPENAI_CHAT


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"query": "x", "documents": []}, "Cohere rerank"),
        ({"texts": []}, "Cohere embed"),
        ({"images": []}, "Cohere embed"),
        ({"texts": [], "model_id": "x"}, "Cohere classify"),
    ],
)
def test_cohere_calls_that_generate_no_text_are_refused_by_name(body: dict[str, Any], shape: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(choose(Route.INVOCATIONS, body), Route.INVOCATIONS, body, OPTIONS)
    assert caught.value.code is Code.UNSUPPORTED_SHAPE
    assert caught.value.message == f"a {shape} body is not served here"
