"""Tools and tool calls of chat requests: names, arguments, and where each fault is named."""

from __future__ import annotations

from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import Code
from tests.sagemaker_entry.dialect_samples import chat, messages_of, refused, requested

USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"modalities": ["text"]},
        {"audio": None, "functions": None},
    ],
)
def test_what_offers_nothing_is_accepted_and_offers_nothing(fields: dict[str, Any]) -> None:
    assert requested(Route.CHAT, chat(**fields)) == requested(Route.CHAT, chat())


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ("x", "tools[0]"),
        ({}, "tools[0].type"),
        ({"type": "custom"}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "../../x"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "<|im_start|>"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "x" * 65}}, "tools[0].function.name"),
        (
            {"type": "function", "function": {"name": "x", "description": "d" * 1_000_000}},
            "tools[0].function.description",
        ),
        (
            {"type": "function", "function": {"name": "x", "parameters": "{}"}},
            "tools[0].function.parameters",
        ),
        ({"type": "function", "function": {"name": "x", "typo": 1}}, "tools[0].function.typo"),
    ],
)
def test_tools_are_checked_even_when_they_are_not_offered(tool: Any, param: str) -> None:
    error = refused(Route.CHAT, chat(tools=[tool], tool_choice="none"))
    assert error.param == param


def test_tool_names_are_unique() -> None:
    error = refused(Route.CHAT, chat(tools=[TOOL, TOOL], tool_choice="none"))
    assert (error.param, error.code) == ("tools[1].function.name", Code.INVALID_VALUE)


def test_a_tool_conversation_has_its_arguments_as_a_mapping() -> None:
    made = messages_of(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
    )
    assert made[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
        ],
    }
    assert made[2] == {"role": "tool", "content": "seen", "tool_call_id": "call_1"}


def test_empty_arguments_are_an_empty_mapping() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": ""}}
    made = messages_of(USER, {"role": "assistant", "tool_calls": [call]})
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": None}, "id"),
        ({"id": "a b"}, "id"),
        ({"id": "x" * 129}, "id"),
        ({"type": "x"}, "type"),
        ({"function": None}, "function"),
        ({"function": {"arguments": "{}"}}, "function.name"),
        ({"function": {"name": "a b", "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "x", "arguments": {}}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "[1]"}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "{"}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "[" * 100_000}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "{}", "typo": 1}}, "function.typo"),
        ({"typo": 1}, "typo"),
    ],
)
def test_bad_tool_calls_are_refused_where_they_are_bad(change: dict[str, Any], param: str) -> None:
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, **change}]}]}
    assert refused(Route.CHAT, body).param == f"messages[1].tool_calls[0].{param}"


def test_too_many_tool_calls_are_refused() -> None:
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL] * 129}]}
    assert refused(Route.CHAT, body).param == "messages[1].tool_calls"
