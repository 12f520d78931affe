"""Cohere's v1 chat: its body, its history, its tools, its answers and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import EndReason, TextPrompt
from tests.sagemaker_entry.cohere_samples import (
    CHAT,
    LOOK_V1,
    STREAMED,
    bare,
    chat_prompt,
    refusal_of,
    request_of,
    unwrapped,
)
from tests.sagemaker_entry.dialect_samples import CONTEXT, events, parsed, result
from tests.sagemaker_entry.tool_samples import options as tool_options

CALL = {"name": "look", "parameters": {"place": "north"}}
SAID = '<tool_call>\n{"name": "look", "arguments": {"place": "north"}}\n</tool_call>'


def complete(body: dict[str, Any], text: str, **more: Any) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(
        parsed(Route.INVOCATIONS, body, **more).presenter.complete(result([text]), CONTEXT)
    )
    return reply


def test_every_field_reaches_the_request() -> None:
    request = request_of(CHAT)
    assert request.max_tokens == 20 and request.seed == 7 and request.stop == ("\n\n",)
    assert not request.include_stop and not request.stream
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 40, 0.9)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.25, 0.5)


def test_preamble_history_and_message_become_messages_in_that_order() -> None:
    assert chat_prompt(CHAT).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    )


def test_raw_prompting_leaves_the_template_out() -> None:
    body = {"message": "1, 2,", "raw_prompting": True}
    assert request_of(body).prompts == (TextPrompt("1, 2,"),)
    assert refusal_of({**CHAT, "raw_prompting": True}).param == "preamble"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conversation_id", "x"),
        ("max_input_tokens", 5),
        ("connectors", [{"id": "web-search"}]),
        ("search_queries_only", True),
        ("documents", [{"text": "x"}]),
        ("prompt_truncation", "AUTO"),
        ("return_prompt", True),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, value: object) -> None:
    error = refusal_of({"message": "x", name: value})
    assert (error.code, error.param) == (Code.UNSUPPORTED_FIELD, name)


def test_values_that_ask_for_nothing_are_taken() -> None:
    body = {
        "message": "x",
        "connectors": [],
        "documents": [],
        "search_queries_only": False,
        "prompt_truncation": "OFF",
        "citation_quality": "accurate",
        "force_single_step": True,
        "conversation_id": None,
    }
    assert chat_prompt(body).messages == ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"message": ""}, "message"),
        ({"temperature": 5.1}, "temperature"),
        ({"temperature": 1e-12}, "temperature"),
        ({"k": 501}, "k"),
        ({"k": -1}, "k"),
        ({"p": 0}, "p"),
        ({"p": 1.1}, "p"),
        ({"frequency_penalty": 1.1}, "frequency_penalty"),
        ({"presence_penalty": -0.1}, "presence_penalty"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"safety_mode": "EXTREME"}, "safety_mode"),
        ({"max_token": 3}, "max_token"),
        ({"chat_history": [{"role": "user", "message": "x"}]}, "chat_history[0].role"),
        ({"chat_history": [{"role": "USER"}]}, "chat_history[0].message"),
        ({"chat_history": [{"role": "TOOL"}]}, "chat_history[0].tool_results"),
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**LOOK_V1, "parameters": {}}]}, "tools[0].parameters"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_it_was_sent_under(fields: dict[str, Any], param: str) -> None:
    assert refusal_of({"message": "x", **fields}).param == param


def test_a_whole_answer_has_what_the_clients_read() -> None:
    reply = complete(CHAT, "Rome.")
    assert reply["text"] == "Rome." and reply["finish_reason"] == "COMPLETE"
    assert reply["response_id"] == reply["generation_id"] == CONTEXT.id
    assert reply["chat_history"] == [
        *CHAT["chat_history"],
        {"role": "USER", "message": "And of Italy?"},
        {"role": "CHATBOT", "message": "Rome."},
    ]
    assert reply["meta"]["tokens"] == {"input_tokens": 5, "output_tokens": 1}
    assert "tool_calls" not in reply and "warnings" not in reply["meta"]


@pytest.mark.parametrize(("mode", "said"), [("STRICT", 1), ("CONTEXTUAL", 1), ("OFF", 0), ("NONE", 0)])
def test_a_safety_mode_that_adds_nothing_here_is_said_in_the_reply(mode: str, said: int) -> None:
    reply = complete({"message": "x", "safety_mode": mode}, "y")
    assert len(reply["meta"].get("warnings", [])) == said


def streamed(body: dict[str, Any], read: Any, texts: list[str], **more: Any) -> list[dict[str, Any]]:
    presenter = parsed(Route.INVOCATIONS, body, **more).presenter
    pieces = presenter.open(CONTEXT)
    for event in events(texts, reason=EndReason.LENGTH):
        pieces += presenter.event(event)
    return [read(piece) for piece in [*pieces, *presenter.close()]]


@pytest.mark.parametrize("wrapped", [True, False])
def test_both_streams_begin_once_and_end_once_with_the_whole_reply(wrapped: bool) -> None:
    body, options = (CHAT, STREAMED) if wrapped else ({**CHAT, "stream": True}, STREAMED)
    found = streamed(body, unwrapped if wrapped else bare, ["Ro", "me."], options=options)
    assert [e["event_type"] for e in found] == [
        "stream-start",
        "text-generation",
        "text-generation",
        "stream-end",
    ]
    assert [e["is_finished"] for e in found] == [False, False, False, True]
    assert found[-1]["finish_reason"] == found[-1]["response"]["finish_reason"] == "MAX_TOKENS"
    assert found[-1]["response"]["text"] == "Rome."


def test_only_a_body_without_stream_follows_the_forwarded_operation() -> None:
    assert request_of(CHAT, STREAMED).stream
    assert not request_of({**CHAT, "stream": False}, STREAMED).stream
    assert not request_of(CHAT).stream


def test_a_stream_that_failed_ends_with_its_own_event() -> None:
    presenter = parsed(Route.INVOCATIONS, CHAT, STREAMED).presenter
    event = unwrapped(presenter.stream_error(ApiError(Code.INTERNAL)))
    assert event["event_type"] == "stream-error" and event["finish_reason"] == "ERROR"
    assert event["err"] == "the server failed"


def test_tools_are_offered_as_schemas_and_calls_come_back_as_objects() -> None:
    body = {"message": "go", "tools": [LOOK_V1]}
    prompt = chat_prompt(body, tool_options())
    schema = prompt.tools[0]["function"]["parameters"]
    assert schema["properties"]["place"] == {"type": "string", "description": "where"}
    assert schema["properties"]["times"] == {"type": "array", "items": {"type": "integer"}}
    assert schema["required"] == ["place"]
    reply = complete(body, f"I look.{SAID}", options=tool_options())
    assert reply["tool_calls"] == [CALL] and reply["text"] == "I look."
    assert reply["chat_history"][-1]["tool_calls"] == [CALL]


def test_calls_are_streamed_once_before_the_end() -> None:
    body = {"message": "go", "tools": [LOOK_V1], "stream": True}
    found = streamed(body, bare, ["I look.", *SAID], options=tool_options())
    kinds = [e["event_type"] for e in found if e["event_type"] != "text-generation"]
    assert kinds == ["stream-start", "tool-calls-generation", "stream-end"]
    assert found[-2]["tool_calls"] == found[-1]["response"]["tool_calls"] == [CALL]


def test_a_call_that_the_length_cut_is_left_out() -> None:
    body = {"message": "go", "tools": [LOOK_V1], "stream": True}
    found = streamed(body, bare, [SAID[: SAID.index("north")]], options=tool_options(grammar=True))
    assert found[-1]["finish_reason"] == "MAX_TOKENS" and "tool_calls" not in found[-1]["response"]


def test_results_answer_the_calls_of_the_history() -> None:
    history = [
        {"role": "USER", "message": "go"},
        {"role": "CHATBOT", "message": "", "tool_calls": [CALL]},
    ]
    results = [{"call": CALL, "outputs": [{"seen": "snow"}]}]
    body = {"message": "", "chat_history": history, "tool_results": results}
    user, call, tool = chat_prompt(body).messages
    assert user == {"role": "user", "content": "go"}
    assert call["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "north"}}
    assert tool["tool_call_id"] == call["tool_calls"][0]["id"]
    assert json.loads(tool["content"]) == [{"seen": "snow"}]
    # the same conversation one turn later, as the reply returned it
    later = [*history, {"role": "TOOL", "tool_results": results}, {"role": "CHATBOT", "message": "Snow."}]
    assert chat_prompt({"message": "thanks", "chat_history": later}).messages[:3] == (user, call, tool)


def test_results_without_their_call_bring_it_along() -> None:
    body = {"message": "go", "tool_results": [{"call": CALL, "outputs": [{"seen": "snow"}]}] * 2}
    _, calls, first, second = chat_prompt(body).messages
    assert [c["id"] for c in calls["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    assert first["tool_call_id"] != second["tool_call_id"]


def test_a_schema_is_followed() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    body = {"message": "x", "response_format": {"type": "json_object", "schema": schema}}
    grammar = request_of(body).sampling.grammar
    assert grammar is not None and "city" in grammar.text
    assert request_of({"message": "x", "response_format": {"type": "text"}}).sampling.grammar is None
    assert refusal_of({**body, "stop_sequences": ["x"]}).param == "stop"
