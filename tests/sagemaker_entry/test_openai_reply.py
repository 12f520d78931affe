"""OpenAI replies, whole and streamed, read back by the unmodified client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from text_generation import types as tgi_types

from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    EndReason,
    Event,
    GenerationResult,
    PromptInfo,
    TextDelta,
)
from tests.sagemaker_entry.dialect_samples import (
    CONTEXT,
    chat_presenter,
    completion_presenter,
    events,
    payloads,
    piece,
    result,
    stream,
)

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def test_a_chat_body_field_by_field() -> None:
    body = json.loads(chat_presenter().complete(result(["Paris"]), CONTEXT))
    assert body == {
        "id": "reply-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "smol",
        "system_fingerprint": "strongroom",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {**USAGE, "completion_tokens": 1, "total_tokens": 6},
    }
    ChatCompletion.model_validate(body, strict=True)
    tgi_types.ChatComplete(**body)


def test_a_chat_stream_event_by_event() -> None:
    reply = chat_presenter(stream=True, stream_options={"include_usage": True})
    sent = stream(reply, events(["Pa", "ris"], reason=EndReason.LENGTH))
    chunks = payloads(sent)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Pa"}, {"content": "ris"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, None, USAGE]
    assert chunks[-1]["choices"] == []
    assert {chunk["id"] for chunk in chunks} == {"reply-1"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert sent[-1] == b"data: [DONE]\n\n"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)


def test_usage_is_absent_from_chunks_unless_asked_for() -> None:
    for chunk in payloads(stream(chat_presenter(stream=True), events(["a"]))):
        assert "usage" not in chunk
    for chunk in payloads(stream(completion_presenter(stream=True), events(["a"]))):
        assert "usage" not in chunk


def test_choices_of_a_stream_keep_their_index() -> None:
    first, second = events(["a"], choice=0), events(["b"], choice=1, with_info=False)
    mixed = [first[0], second[0], first[1], first[2], second[1]]
    chunks = payloads(stream(chat_presenter(n=2, stream=True), mixed))
    seen = [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks]
    assert seen == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (1, {"content": "b"}),
        (0, {"content": "a"}),
        (0, {}),
        (1, {}),
    ]


def test_usage_of_several_choices_is_added_up() -> None:
    reply = chat_presenter(n=2, stream=True, stream_options={"include_usage": True})
    made = events(["a", "b"], choice=0) + events(["c"], choice=1, with_info=False)
    usage = payloads(stream(reply, made))[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 3, 8)


def test_usage_counts_discarded_candidates() -> None:
    answer = result(["a"])
    rest = (Choice(0, 1, "b", (), EndReason.EOS, 4, seed=1),)
    whole = GenerationResult(answer.prompts, answer.choices, rest)
    body = json.loads(completion_presenter(best_of=2).complete(whole, CONTEXT))
    assert body["usage"]["completion_tokens"] == 5
    assert len(body["choices"]) == 1


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        (EndReason.EOS, "stop"),
        (EndReason.STOP_TOKEN, "stop"),
        (EndReason.STOP_STRING, "stop"),
        (EndReason.LENGTH, "length"),
    ],
)
def test_finish_reasons(reason: EndReason, finish: str) -> None:
    for reply in (chat_presenter(stream=True), completion_presenter(stream=True)):
        assert payloads(stream(reply, events(["a"], reason=reason)))[-1]["choices"][0]["finish_reason"] == (
            finish
        )
    choice = Choice(0, 0, "a", (), reason, 1, seed=1)
    whole = GenerationResult((PromptInfo(0, 5, 0),), (choice,))
    for made in (chat_presenter(), completion_presenter()):
        assert json.loads(made.complete(whole, CONTEXT))["choices"][0]["finish_reason"] == finish


def test_chat_logprobs_have_text_bytes_and_alternatives() -> None:
    pieces = (
        piece(1, "\u20ac", -0.25, top=((1, "\u20ac", -0.25), (2, "x", -float("inf")))),
        piece(3, "", -1.0, raw=b"\xf0\x9f"),
        piece(4, "", -1.0),
        piece(5, "b", float("nan")),
    )
    choice = Choice(0, 0, "\u20acb", pieces, EndReason.EOS, 4, seed=1)
    whole = GenerationResult((PromptInfo(0, 5, 0),), (choice,))
    body = json.loads(chat_presenter(logprobs=True, top_logprobs=2).complete(whole, CONTEXT))
    euro = [0xE2, 0x82, 0xAC]
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "\u20ac",
                "logprob": -0.25,
                "bytes": euro,
                "top_logprobs": [
                    {"token": "\u20ac", "logprob": -0.25, "bytes": euro},
                    {"token": "x", "logprob": -9999.0, "bytes": [120]},
                ],
            },
            {"token": "", "logprob": -1.0, "bytes": [0xF0, 0x9F], "top_logprobs": []},
            {"token": "", "logprob": -1.0, "bytes": None, "top_logprobs": []},
            {"token": "b", "logprob": -9999.0, "bytes": [98], "top_logprobs": []},
        ],
        "refusal": None,
    }
    ChatCompletion.model_validate(body, strict=True)


def test_streamed_chat_logprobs_come_with_their_text_even_when_it_is_empty() -> None:
    info, end = events([])
    made: list[Event] = [info, TextDelta(0, 0, "", (piece(1, ""),)), TextDelta(0, 0, "a", ()), end]
    chunks = payloads(stream(chat_presenter(stream=True, logprobs=True), made))
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.5
    assert chunks[1]["choices"][0]["delta"] == {"content": ""}
    assert chunks[2]["choices"][0]["logprobs"] is None
    without = payloads(stream(chat_presenter(stream=True), made))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in without] == ["", "a", None]


def test_a_completion_body_field_by_field() -> None:
    body = json.loads(completion_presenter().complete(result([" Paris"]), CONTEXT))
    assert body == {
        "id": "reply-1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "smol",
        "system_fingerprint": "strongroom",
        "choices": [{"text": " Paris", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {**USAGE, "completion_tokens": 1, "total_tokens": 6},
    }
    Completion.model_validate(body, strict=True)


def test_completion_index_is_prompt_times_n_plus_rank() -> None:
    def made(prompt: int, choice: int) -> Choice:
        return Choice(prompt, choice, f"{prompt}{choice}", (), EndReason.EOS, 1, seed=1)

    infos = (PromptInfo(0, 1, 0), PromptInfo(1, 1, 0))
    whole = GenerationResult(infos, (made(0, 0), made(0, 3), made(1, 1), made(1, 0)))
    body = json.loads(completion_presenter(prompt=["a", "b"], n=2, best_of=4).complete(whole, CONTEXT))
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "00"),
        (1, "03"),
        (2, "11"),
        (3, "10"),
    ]
    assert body["usage"]["prompt_tokens"] == 2


def test_streamed_completion_index_is_prompt_times_n_plus_choice() -> None:
    made = events(["a"], prompt=1, choice=1)
    chunks = payloads(stream(completion_presenter(prompt=["a", "b"], n=2, stream=True), made))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [3, 3]
    for chunk in chunks:
        Completion.model_construct(**chunk)


def echo_answer() -> tuple[PromptInfo, Choice]:
    info = PromptInfo(
        0,
        3,
        0,
        (
            piece(1, "<s>", None, special=True),
            piece(5, "h", -1.0),
            piece(6, "i", -2.0, top=((7, "o", -0.1),)),
        ),
    )
    pieces = (piece(8, " yo", -0.5, top=((8, " yo", -0.5), (9, " ya", -0.9))), piece(2, "", -3.0))
    return info, Choice(0, 0, " yo", pieces, EndReason.EOS, 2, seed=1)


ECHO_LOGPROBS = {
    "tokens": ["<s>", "h", "i", " yo", ""],
    "token_logprobs": [None, -1.0, -2.0, -0.5, -3.0],
    "top_logprobs": [
        None,
        {"h": -1.0},
        {"o": -0.1, "i": -2.0},
        {" yo": -0.5, " ya": -0.9},
        {"": -3.0},
    ],
    "text_offset": [0, 0, 1, 2, 5],
}


@pytest.mark.parametrize("prompt", ["hi", [1, 5, 6]])
def test_echo_gives_the_prompt_its_logprobs_and_offsets(prompt: Any) -> None:
    info, choice = echo_answer()
    reply = completion_presenter(prompt=prompt, echo=True, logprobs=2)
    body = json.loads(reply.complete(GenerationResult((info,), (choice,)), CONTEXT))
    assert body["choices"][0]["text"] == "hi yo"
    assert body["choices"][0]["logprobs"] == ECHO_LOGPROBS


def test_a_streamed_echo_adds_up_to_the_whole_one() -> None:
    info, choice = echo_answer()
    reply = completion_presenter(echo=True, logprobs=2, stream=True)
    made: list[Event] = [
        info,
        TextDelta(0, 0, " yo", choice.pieces[:1]),
        TextDelta(0, 0, "", choice.pieces[1:]),
        ChoiceEnd(0, 0, EndReason.EOS, 2, seed=1),
    ]
    chunks = [chunk["choices"][0] for chunk in payloads(stream(reply, made))]
    assert "".join(chunk["text"] for chunk in chunks) == "hi yo"
    for name, values in ECHO_LOGPROBS.items():
        joined = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]]
        assert joined == values


def test_echo_without_logprobs_is_text_alone() -> None:
    info = PromptInfo(0, 3, 0)
    made: list[Event] = [info, *events(["!"], with_info=False)]
    chunks = [c["choices"][0] for c in payloads(stream(completion_presenter(echo=True, stream=True), made))]
    assert [chunk["text"] for chunk in chunks] == ["hi", "!", ""]
    assert all(chunk["logprobs"] is None for chunk in chunks)


def test_echo_goes_to_every_choice_of_its_prompt() -> None:
    reply = completion_presenter(prompt=["a", "b"], n=2, echo=True, stream=True)
    reply.open(CONTEXT)
    chunks = payloads(reply.event(PromptInfo(1, 1, 0)))
    assert [(c["choices"][0]["index"], c["choices"][0]["text"]) for c in chunks] == [(2, "b"), (3, "b")]


def test_zero_logprobs_have_no_alternatives() -> None:
    _, choice = echo_answer()
    whole = GenerationResult((PromptInfo(0, 3, 0),), (choice,))
    body = json.loads(completion_presenter(logprobs=0).complete(whole, CONTEXT))
    assert body["choices"][0]["logprobs"]["top_logprobs"] is None
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 3]
    Completion.model_validate(body, strict=True)


def test_special_tokens_count_in_offsets_when_they_are_in_the_text() -> None:
    pieces = (piece(2, "<x>", special=True), piece(3, "a"))
    choice = Choice(0, 0, "<x>a", pieces, EndReason.EOS, 2, seed=1)
    whole = GenerationResult((PromptInfo(0, 3, 0),), (choice,))
    reply = completion_presenter(logprobs=0, skip_special_tokens=False)
    assert json.loads(reply.complete(whole, CONTEXT))["choices"][0]["logprobs"]["text_offset"] == [0, 3]
