"""Cohere's v2 chat: its body, answers and server-sent events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import EndReason
from tests.sagemaker_entry.cohere_samples import (
    CHAT_V2,
    LOOK_V2,
    STREAMED,
    chat_prompt,
    refusal_of,
    request_of,
)
from tests.sagemaker_entry.dialect_samples import CONTEXT, events, parsed, result
from tests.sagemaker_entry.tool_samples import options as tool_options

SAID = '<tool_call>\n{"name": "look", "arguments": {"place": "north"}}\n</tool_call>'
USER = {"role": "user", "content": "go"}


def v2(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "k": 0, **fields}


def test_every_field_reaches_the_request() -> None:
    request = request_of(CHAT_V2)
    assert (request.max_tokens, request.seed, request.stop) == (20, 7, ("\n\n",))
    assert (request.sampling.top_k, request.sampling.top_p) == (40, 0.9)
    assert chat_prompt(CHAT_V2).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
    )


def test_a_conversation_with_tools_reads_as_the_reply_wrote_it() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"place":"n"}'}}
    document = {"type": "document", "document": {"id": "1", "data": {"seen": "snow"}}}
    messages = [
        USER,
        {"role": "assistant", "tool_plan": "I look.", "tool_calls": [call], "content": [], "citations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": [document]},
    ]
    _, assistant, tool = chat_prompt(v2(messages=messages)).messages
    assert assistant["content"] == "I look."
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"place": "n"}
    assert tool == {"role": "tool", "content": '{"seen":"snow"}', "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["x"]}, "documents"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "disabled", "token_budget": 3}}, "token_budget"),
        ({"citation_options": {"mode": "LOUD"}}, "citation_options.mode"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "REQUIRED"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "CHATBOT", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{**USER, "content": [{"type": "document"}]}]}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal_of(v2(**fields)).param == param


def test_what_asks_for_nothing_is_taken() -> None:
    body = v2(documents=[], citation_options={"mode": "OFF"}, priority=1, thinking={"type": "disabled"})
    assert chat_prompt(body).template_kwargs == {"enable_thinking": False}


def test_tool_choice_and_strict_tools_hold_the_answer() -> None:
    held = request_of(v2(tools=[LOOK_V2], tool_choice="REQUIRED"), tool_options(grammar=True))
    assert held.sampling.grammar is not None and held.grammar_fallback is not None
    strict = {**LOOK_V2["function"], "parameters": {**_schema(), "additionalProperties": False}}
    body = v2(tools=[{"type": "function", "function": strict}], strict_tools=True)
    assert request_of(body, tool_options(grammar=True)).grammar_fallback is None
    none = request_of(v2(tools=[LOOK_V2], tool_choice="NONE"), tool_options())
    assert none.sampling.grammar is None


def _schema() -> dict[str, Any]:
    parameters: dict[str, Any] = LOOK_V2["function"]["parameters"]  # type: ignore[index]
    return parameters


def test_a_whole_answer_has_the_v2_shape() -> None:
    reply = json.loads(parsed(Route.INVOCATIONS, CHAT_V2).presenter.complete(result(["Paris."]), CONTEXT))
    assert reply == {
        "id": CONTEXT.id,
        "finish_reason": "COMPLETE",
        "message": {"role": "assistant", "content": [{"type": "text", "text": "Paris."}]},
        "usage": {"tokens": {"input_tokens": 5, "output_tokens": 1}},
    }


def test_calls_and_logprobs_are_part_of_the_answer() -> None:
    body = v2(tools=[LOOK_V2], logprobs=True, safety_mode="STRICT")
    presenter = parsed(Route.INVOCATIONS, body, tool_options()).presenter
    reply = json.loads(presenter.complete(result([SAID]), CONTEXT))
    assert reply["finish_reason"] == "TOOL_CALL" and "content" not in reply["message"]
    (call,) = reply["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"place": "north"}
    assert reply["logprobs"][0] == {"text": SAID, "token_ids": [10], "logprobs": [-0.5]}
    assert len(reply["meta"]["warnings"]) == 1


def streamed(body: dict[str, Any], texts: list[str], reason: EndReason, **more: Any) -> list[dict[str, Any]]:
    presenter = parsed(Route.INVOCATIONS, body, **more).presenter
    assert presenter.stream_type == "text/event-stream"
    pieces = presenter.open(CONTEXT)
    for event in events(texts, reason=reason):
        pieces += presenter.event(event)
    found = []
    for piece in [*pieces, *presenter.close()]:
        kind, data, *rest = piece.decode().split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {value['type']}" and rest == ["", ""]
        found.append(value)
    return found


def test_a_stream_opens_and_closes_its_content() -> None:
    found = streamed(v2(stream=True, logprobs=True), ["Pa", "ris"], EndReason.EOS)
    assert [e["type"] for e in found] == [
        "message-start",
        "content-start",
        "content-delta",
        "content-delta",
        "content-end",
        "message-end",
    ]
    texts = [e["delta"]["message"]["content"]["text"] for e in found if e["type"] == "content-delta"]
    assert "".join(texts) == "Paris"
    assert found[2]["logprobs"] == {"text": "Pa", "token_ids": [10], "logprobs": [-0.5]}
    assert found[-1]["delta"]["finish_reason"] == "COMPLETE"
    assert found[-1]["delta"]["usage"]["tokens"] == {"input_tokens": 5, "output_tokens": 2}


def test_a_stream_announces_a_call_before_its_arguments() -> None:
    body = v2(stream=True, tools=[LOOK_V2])
    found = streamed(body, ["I look.", SAID], EndReason.EOS, options=tool_options())
    kinds = [e["type"] for e in found]
    assert kinds[0] == "message-start" and kinds[-1] == "message-end"
    assert kinds.index("content-end") < kinds.index("tool-call-start") < kinds.index("tool-call-delta")
    assert kinds[-2] == "tool-call-end" and found[-1]["delta"]["finish_reason"] == "TOOL_CALL"
    arguments = [e for e in found if e["type"] == "tool-call-delta"]
    joined = "".join(e["delta"]["message"]["tool_calls"]["function"]["arguments"] for e in arguments)
    assert json.loads(joined) == {"place": "north"}


def test_v2_streams_only_when_the_body_says_so() -> None:
    assert not request_of(CHAT_V2, STREAMED).stream
    assert request_of({**CHAT_V2, "stream": True}).stream


def test_a_stream_that_failed_says_so_at_its_end() -> None:
    event = parsed(Route.INVOCATIONS, v2(stream=True)).presenter.stream_error(ApiError(Code.INTERNAL))
    value = json.loads(event.decode().split("data: ")[1])
    assert value["delta"] == {"finish_reason": "ERROR", "error": "the server failed"}
