"""The unmodified OpenAI client reads calls, whole and streamed; every cut of an answer says the same."""

from __future__ import annotations

import json
import random
from typing import Any

import openai
import pydantic
import pytest

from container.text.tool_format import Shape, ToolFormat
from sagemaker_entry.generation import Choice, EndReason, GenerationResult, PromptInfo, TokenPiece
from tests.sagemaker_entry.dialect_samples import CONTEXT, payloads, stream
from tests.sagemaker_entry.test_openai_client import client
from tests.sagemaker_entry.tool_samples import FORMS, HERMES, HERMES_TOKENS, asked, call_text, pieces_of, told

FOUND = ("look", '{"at": "x", "times": 2}')
WENT = ("go", "{}")
MESSAGES: Any = [{"role": "user", "content": "x"}]


class look(pydantic.BaseModel):  # its name is the function's
    at: str
    times: int


def whole(
    form: ToolFormat, pieces: list[TokenPiece], reason: EndReason = EndReason.EOS, **fields: Any
) -> bytes:
    text = "".join(piece.text for piece in pieces)
    choice = Choice(0, 0, text, tuple(pieces), reason, len(pieces), 9)
    answer = GenerationResult((PromptInfo(0, 5, 0),), (choice,))
    return asked(form, **fields).presenter.complete(answer, CONTEXT)


def message(body: bytes) -> tuple[Any, str]:
    (choice,) = json.loads(body)["choices"]
    return choice["message"], choice["finish_reason"]


def streamed(
    form: ToolFormat, pieces: list[TokenPiece], reason: EndReason = EndReason.EOS, **fields: Any
) -> bytes:
    return b"".join(stream(asked(form, stream=True, **fields).presenter, told(pieces, reason)))


def joined(body: bytes) -> tuple[str, list[tuple[str, str, str]], str]:
    """Return content, calls (id, name, arguments) and finish reason of a stream."""
    content, calls, finish = "", [], ""
    for chunk in payloads([event + b"\n\n" for event in body.split(b"\n\n")[:-1]]):
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls) and call["type"] == "function"
                    calls.append([call["id"], call["function"]["name"], ""])
                calls[call["index"]][2] += call["function"]["arguments"]
            finish = choice["finish_reason"] or finish
    return content, [tuple(call) for call in calls], finish


@pytest.mark.parametrize("name", sorted(FORMS))
def test_the_client_reads_whole_and_streamed_calls(name: str) -> None:
    form = FORMS[name]
    wanted = [FOUND] if form.shape is Shape.BARE else [FOUND, WENT]
    pieces = pieces_of(form, call_text(form, *wanted), list(range(500)))
    body = whole(form, pieces)
    (choice,) = client(body, "application/json").chat.completions.create(model="", messages=MESSAGES).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    calls = choice.message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in calls if c.type == "function"] == wanted
    sent = streamed(form, pieces)
    fields: Any = {"model": "", "messages": MESSAGES}
    with client(sent, "text/event-stream").chat.completions.stream(**fields) as events:
        final = events.get_final_completion()
    (last,) = final.choices
    assert last.finish_reason == "tool_calls" and not last.message.content
    assert [(c.function.name, c.function.arguments) for c in last.message.tool_calls or []] == wanted
    assert all(c.id.startswith("call_") for c in last.message.tool_calls or [])


def test_the_client_parses_arguments_into_a_model() -> None:
    tool: Any = openai.pydantic_function_tool(look)
    assert tool["function"]["strict"] is True
    pieces = pieces_of(HERMES, call_text(HERMES, FOUND), list(range(500)))
    body = whole(HERMES, pieces, tools=[tool])
    fields: Any = {"model": "", "messages": MESSAGES, "tools": [tool]}
    (choice,) = client(body, "application/json").chat.completions.parse(**fields).choices
    (call,) = choice.message.tool_calls or []
    assert call.function.parsed_arguments == look(at="x", times=2)
    sent = streamed(HERMES, pieces, tools=[tool])
    kinds = []
    with client(sent, "text/event-stream").chat.completions.stream(**fields) as events:
        for event in events:
            kinds.append(event.type)
            if event.type == "tool_calls.function.arguments.done":
                assert event.name == "look" and event.parsed_arguments == look(at="x", times=2)
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds


def test_a_stream_names_a_call_before_its_arguments_and_once() -> None:
    pieces = pieces_of(HERMES, "Wait.\n" + call_text(HERMES, FOUND), list(range(500)))
    chunks = payloads(stream(asked(stream=True).presenter, told(pieces)))
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "look" and set(calls[0]) == {"index", "id", "type", "function"}
    assert all(
        set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:]
    )
    assert len(calls) > 5, "arguments come as they are written"
    assert deltas[-1] == {}


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("grammar", [True, False])
def test_every_cut_into_tokens_says_the_same_whole_and_streamed(name: str, grammar: bool) -> None:
    form = FORMS[name]
    dice = random.Random(name)
    texts = [
        call_text(form, FOUND),
        call_text(form, FOUND, WENT) if form.many else call_text(form, WENT),
        "Just <words> { and [ more",
        "Look: " + call_text(form, WENT),
        call_text(form, FOUND)[:-5],
        call_text(form, ("fly", "{}")),
        call_text(form, FOUND) + " after",
    ]
    for text in texts:
        told_whole, finish = message(whole(form, pieces_of(form, text, []), grammar=grammar))
        calls = [
            (c["function"]["name"], c["function"]["arguments"]) for c in told_whole.get("tool_calls", ())
        ]
        assert finish == ("tool_calls" if calls else "stop")
        for _ in range(6):
            cuts = dice.choices(range(len(text) + 1), k=dice.randrange(1, 20))
            pieces = pieces_of(form, text, cuts)
            again, _ = message(whole(form, pieces, grammar=grammar))
            content, parts, end = joined(streamed(form, pieces, grammar=grammar))
            assert [
                (c["function"]["name"], c["function"]["arguments"]) for c in again.get("tool_calls", ())
            ] == calls
            assert again["content"] == told_whole["content"]
            assert [part[1:] for part in parts] == calls and end == finish
            assert content == (told_whole["content"] or "")


def test_random_tokens_always_word_a_reply() -> None:
    dice = random.Random(3)
    for form in FORMS.values():
        marks = [mark.token for mark in form.marks if mark.token is not None]
        for _ in range(60):
            pieces = []
            for _ in range(dice.randrange(1, 15)):
                if marks and dice.random() < 0.3:
                    pieces.append(
                        TokenPiece(dice.choice(marks), dice.choice(["", "\ufffd", "<tool_call>"]), True)
                    )
                else:
                    text = "".join(
                        chr(dice.choice([*range(32, 127), 10, 0, 0xE9, 0x1F600])) for _ in range(5)
                    )
                    pieces.append(
                        TokenPiece(5, dice.choice([text, '{"name": "go", ', '"arguments": {', "}"]))
                    )
            for grammar in (True, False):
                told_whole, finish = message(whole(form, pieces, grammar=grammar))
                content, calls, end = joined(streamed(form, pieces, grammar=grammar))
                assert (told_whole["content"] or "") == content and finish == end
                assert len(told_whole.get("tool_calls", ())) == len(calls)


def test_a_call_cut_off_by_length_says_length() -> None:
    pieces = pieces_of(HERMES, call_text(HERMES, FOUND)[:60], list(range(99)))
    told_whole, finish = message(whole(HERMES, pieces, EndReason.LENGTH))
    assert finish == "length"
    assert FOUND[1].startswith(told_whole["tool_calls"][0]["function"]["arguments"])
    assert joined(streamed(HERMES, pieces, EndReason.LENGTH))[2] == "length"


def test_ids_are_new_for_every_call_and_never_the_models() -> None:
    text = call_text(HERMES, WENT, WENT).replace('{"name"', '{"id": "call_mine", "name"')
    seen = set()
    for _ in range(50):
        told_whole, _ = message(whole(HERMES, pieces_of(HERMES, text, [])))
        seen |= {call["id"] for call in told_whole["tool_calls"]}
    assert len(seen) == 100 and all(len(call) == len("call_") + 24 for call in seen)


def test_logprobs_of_every_token_come_once() -> None:
    form = HERMES_TOKENS
    pieces = pieces_of(form, "Hm. " + call_text(form, FOUND), [3, 9, 20, 30])
    (choice,) = json.loads(whole(form, pieces, logprobs=True))["choices"]
    assert len(choice["logprobs"]["content"]) == len(pieces)
    chunks = payloads(stream(asked(form, stream=True, logprobs=True).presenter, told(pieces)))
    streamed_ones = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert sum(len(each["content"]) for each in streamed_ones) == len(pieces)


def test_choices_are_read_apart() -> None:
    reply = asked(n=2, stream=True).presenter
    sent = reply.open(CONTEXT)
    for choice, text in ((0, "<tool_"), (1, "plain"), (0, "call>"), (0, '{"name": "go", "arguments": {}}')):
        for event in told([TokenPiece(5, text)])[1:2]:
            sent += reply.event(event.__class__(0, choice, text, (TokenPiece(5, text),)))  # type: ignore[call-arg]
    deltas = [(c["index"], c["delta"]) for chunk in payloads(sent[2:]) for c in chunk["choices"]]
    assert (1, {"content": "plain"}) in deltas
    assert [index for index, delta in deltas if "tool_calls" in delta] == [0]


def test_an_answer_without_a_call_is_worded_as_ever() -> None:
    told_whole, finish = message(whole(HERMES, [TokenPiece(5, "Paris")]))
    assert told_whole == {"role": "assistant", "content": "Paris", "refusal": None} and finish == "stop"
    told_whole, _ = message(whole(HERMES, []))
    assert told_whole["content"] == ""
