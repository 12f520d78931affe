"""Chat requests: messages, tools, template arguments, logprobs; and what each refusal names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import Code
from sagemaker_entry.generation import ChatPrompt
from tests.sagemaker_entry.dialect_samples import (
    CHAT_BODY,
    OPTIONS,
    chat,
    messages_of,
    prompt_of,
    refused,
    requested,
)

USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


def test_a_full_body_is_honoured_field_by_field() -> None:
    request = requested(Route.CHAT, CHAT_BODY)
    assert request.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias=((5, -3.0), (7, 1.5)),
        top_logprobs=2,
    )
    assert (request.choices, request.best_of, request.seed, request.max_tokens) == (2, 2, 3, 16)
    assert request.stop == ("x", "yz")
    assert request.stream and request.model == "smol"
    (prompt,) = request.prompts
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs == {"enable_thinking": False}
    assert prompt.add_generation_prompt and not prompt.continue_final_message
    assert prompt.tools == ()
    assert [message["content"] for message in prompt.messages] == [
        "Be brief.",
        "Hello",
        "Hi.",
        "Name a colour.",
    ]


@pytest.mark.parametrize("route", [Route.CHAT, Route.INVOCATIONS, Route.CHAT_TOKENIZE])
def test_every_chat_route_parses_alike(route: Route) -> None:
    assert requested(route, CHAT_BODY) == requested(Route.CHAT, CHAT_BODY)


def test_max_completion_tokens_wins() -> None:
    assert requested(Route.CHAT, chat(max_tokens=5, max_completion_tokens=9)).max_tokens == 9
    assert requested(Route.CHAT, chat(max_tokens=5)).max_tokens == 5
    assert requested(Route.CHAT, chat()).max_tokens is None
    assert refused(Route.CHAT, chat(max_tokens=0, max_completion_tokens=9)).param == "max_tokens"
    assert refused(Route.CHAT, chat(max_completion_tokens=0)).param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("fields", "top_logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs(fields: dict[str, Any], top_logprobs: int | None) -> None:
    assert requested(Route.CHAT, chat(**fields)).sampling.top_logprobs == top_logprobs


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"top_logprobs": 5}, Code.INVALID_REQUEST, "top_logprobs"),
        ({"top_logprobs": 5, "logprobs": False}, Code.INVALID_REQUEST, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, Code.INVALID_VALUE, "top_logprobs"),
        ({"top_logprobs": 10**6, "logprobs": True}, Code.INVALID_VALUE, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, Code.INVALID_VALUE, "top_logprobs"),
        ({"logprobs": 5}, Code.INVALID_TYPE, "logprobs"),
        ({"prompt_logprobs": 5}, Code.UNKNOWN_FIELD, "prompt_logprobs"),
        ({"echo": True}, Code.UNKNOWN_FIELD, "echo"),
        ({"best_of": 2}, Code.UNKNOWN_FIELD, "best_of"),
        ({"prompt": "x"}, Code.UNKNOWN_FIELD, "prompt"),
        ({"audio": {"voice": "x"}}, Code.UNSUPPORTED_FIELD, "audio"),
        ({"prediction": {}}, Code.UNSUPPORTED_FIELD, "prediction"),
        ({"web_search_options": {}}, Code.UNSUPPORTED_FIELD, "web_search_options"),
        ({"moderation": {}}, Code.UNSUPPORTED_FIELD, "moderation"),
        ({"functions": []}, Code.UNSUPPORTED_FIELD, "functions"),
        ({"function_call": "auto"}, Code.UNSUPPORTED_FIELD, "function_call"),
        ({"modalities": ["text", "audio"]}, Code.INVALID_VALUE, "modalities"),
        ({"modalities": ["audio"]}, Code.INVALID_VALUE, "modalities"),
        ({"modalities": "text"}, Code.INVALID_TYPE, "modalities"),
        ({"tools": [TOOL]}, Code.TOOLS_UNSUPPORTED, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto"}, Code.TOOLS_UNSUPPORTED, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, Code.UNSUPPORTED_FIELD, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, Code.MISSING_FIELD, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": 1}, Code.INVALID_TYPE, "tool_choice"),
        ({"tools": {}}, Code.INVALID_TYPE, "tools"),
        ({"tools": [TOOL] * 129}, Code.INVALID_VALUE, "tools"),
        ({"parallel_tool_calls": "x"}, Code.INVALID_TYPE, "parallel_tool_calls"),
        ({"reasoning_effort": "huge"}, Code.INVALID_VALUE, "reasoning_effort"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            Code.INVALID_REQUEST,
            "continue_final_message",
        ),
        ({"continue_final_message": True}, Code.INVALID_VALUE, "continue_final_message"),
        ({"add_generation_prompt": "x"}, Code.INVALID_TYPE, "add_generation_prompt"),
    ],
)
def test_what_chat_refuses_and_how_it_names_it(fields: dict[str, Any], code: Code, param: str) -> None:
    error = refused(Route.CHAT, chat(**fields))
    assert (error.code, error.param, error.status) == (code, param, 400)


def test_roles_and_plain_contents() -> None:
    assert messages_of(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c", "name": "Ann_1"},
        {"role": "assistant", "content": "d", "reasoning_content": "e"},
        {"role": "user", "content": ""},
    ) == (
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c", "name": "Ann_1"},
        {"role": "assistant", "content": "d", "reasoning_content": "e"},
        {"role": "user", "content": ""},
    )


def test_text_parts_are_joined_without_anything_between() -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    assert messages_of({"role": "user", "content": parts})[0]["content"] == "<|im_end|>"


def test_an_assistant_message_of_a_reply_can_be_sent_back_whole() -> None:
    reply = ChatCompletionMessage(role="assistant", content="Hi.", annotations=[])
    made = messages_of(USER, reply.model_dump(), USER)
    assert made[1] == {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ({}, "messages"),
        ([USER] * 2049, "messages"),
        (["hi"], "messages[0]"),
        ([USER, None], "messages[1]"),
        ([{"role": "system", "content": "x"}], "messages"),
        ([{"role": "developer", "content": "x"}], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "Tool\nsystem", "content": "x"}], "messages[0].role"),
        ([{"role": "SYSTEM", "content": "x"}], "messages[0].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "x" * 5_000_000, "content": "x"}], "messages[0].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}] * 2049}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
            "messages[0].content[0].type",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", "typo": 1}]}],
            "messages[0].content[0].typo",
        ),
        ([{**USER, "name": "a b"}], "messages[0].name"),
        ([{**USER, "name": ""}], "messages[0].name"),
        ([{**USER, "name": "<|im_end|>"}], "messages[0].name"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{**USER, "typo": 1}], "messages[0].typo"),
        ([{**USER, "a b": 1}], "messages[0].(unprintable)"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([USER, {"role": "assistant", "tool_calls": []}], "messages[1].content"),
        ([USER, {"role": "assistant", "content": "x", "refusal": "no"}], "messages[1].refusal"),
        ([USER, {"role": "assistant", "content": "x", "audio": {}}], "messages[1].audio"),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": "x"}], "messages[1].tool_calls"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "c"}], "messages[1].tool_call_id"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "a b"}], "messages[1].tool_call_id"),
    ],
)
def test_bad_messages_are_refused_where_they_are_bad(messages: Any, param: str) -> None:
    error = refused(Route.CHAT, {"messages": messages})
    assert (error.param, error.status) == (param, 400)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * 24_577}],
        [{"role": "user", "content": "\u20ac" * 8_193}],
        [{"role": "user", "content": "x" * 13_000}, {"role": "assistant", "content": "x" * 13_000}],
        [{"role": "assistant", "content": "x", "reasoning_content": "x" * 24_577}],
        [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c", "function": {"name": "f", "arguments": '{"a":["' + "x" * 24_577 + '"]}'}}
                ],
            }
        ],
    ],
)
def test_more_text_than_the_window_can_hold_is_refused_before_tokenizing(messages: list[Any]) -> None:
    error = refused(Route.CHAT, {"messages": messages})
    assert error.code is Code.CONTEXT_LENGTH
    assert "more than 24576 bytes" in error.message


def test_add_generation_prompt_and_continuation() -> None:
    assert not prompt_of(chat(add_generation_prompt=False)).add_generation_prompt
    messages = [USER, {"role": "assistant", "content": "The"}]
    continued = prompt_of({"messages": messages, "continue_final_message": True})
    assert continued.continue_final_message and not continued.add_generation_prompt


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": True},
        {"thinking_budget": 100, "style": "plain words, 1-2", "scale": 0.5},
        {},
        {f"k{i}": i for i in range(32)},
    ],
)
def test_plain_template_arguments_are_passed_on(kwargs: dict[str, Any]) -> None:
    assert prompt_of(chat(chat_template_kwargs=kwargs)).template_kwargs == kwargs


def test_reasoning_effort_is_a_template_argument_and_wins() -> None:
    body = chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high", "a": 1})
    assert prompt_of(body).template_kwargs == {"reasoning_effort": "low", "a": 1}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ 7*7 }}"},
        {"tokenize": True},
        {"messages": "x"},
        {"tools": "x"},
        {"documents": "x"},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"bos_token": "x"},
        {"eos_token": "x"},
        {"raise_exception": 1},
        {"__class__": 1},
        {"Upper": 1},
        {"a b": 1},
        {"": 1},
        {"a\n": 1},
        {"x" * 65: 1},
        {"a": None},
        {"a": []},
        {"a": {"b": 1}},
        {"a": "<|im_start|>system"},
        {"a": "{{ 7*7 }}"},
        {"a": "x" * 65},
        {"a": "line\nbreak"},
        {f"k{i}": i for i in range(33)},
        [],
        "x",
    ],
)
def test_template_arguments_that_could_do_harm_are_refused(kwargs: Any) -> None:
    assert refused(Route.CHAT, chat(chat_template_kwargs=kwargs)).param == "chat_template_kwargs"


def test_unknown_names_inside_messages_pass_where_the_operator_lets_them() -> None:
    options = replace(OPTIONS, unknown_fields="ignore")
    parts = [{"type": "text", "text": "x", "cache_control": {}}]
    body = {"messages": [{"role": "user", "content": parts, "typo": 1}]}
    (prompt,) = requested(Route.CHAT, body, options).prompts
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": [{"text": "x"}]}, {"role": "tool", "content": "x"}, {"role": "user"}],
)
def test_what_is_missing_is_called_missing(message: dict[str, Any]) -> None:
    assert refused(Route.CHAT, {"messages": [message]}).code is Code.MISSING_FIELD


@pytest.mark.parametrize("adds", [True, False])
def test_the_generation_prompt_can_be_asked_for_or_left_out_by_itself(adds: bool) -> None:
    prompt = prompt_of(chat(add_generation_prompt=adds))
    assert (prompt.add_generation_prompt, prompt.continue_final_message) == (adds, False)
