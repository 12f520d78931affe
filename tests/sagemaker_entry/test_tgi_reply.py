"""TGI's replies: shapes, the held-back last token, and real clients reading every byte."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from huggingface_hub.inference._common import _stream_text_generation_response
from huggingface_hub.inference._generated.types.text_generation import TextGenerationOutput
from text_generation import types as tgi_types

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.dialects.presenter import Presenter
from sagemaker_entry.dialects.tgi_reply import chat_tokenize_body, tokenize_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    EndReason,
    GenerationResult,
    PromptInfo,
    TextDelta,
    TokenSpan,
)
from tests.sagemaker_entry.dialect_samples import (
    CONTEXT,
    events,
    parsed,
    payloads,
    piece,
    result,
    stream,
    tgi,
)


def presenter(route: Route = Route.GENERATE_STREAM, **parameters: Any) -> Presenter:
    return parsed(route, tgi(**parameters)).presenter


def choice(number: int, text: str, reason: EndReason = EndReason.EOS, tokens: int = 1) -> Choice:
    pieces = (piece(10 + number, text, top=((10 + number, text, -0.5), (2, "</s>", -1.5))),)
    return Choice(0, number, text, pieces, reason, tokens, seed=99)


def test_each_token_is_one_event_and_the_last_carries_the_text() -> None:
    sent = payloads(stream(presenter(details=True), events(["Pa", "ris", "."])))
    assert [event["index"] for event in sent] == [1, 2, 3]
    assert [event["token"]["text"] for event in sent] == ["Pa", "ris", "."]
    assert [event["generated_text"] for event in sent] == [None, None, "Paris."]
    assert [event["details"] for event in sent[:2]] == [None, None]
    assert sent[2]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 3,
        "seed": 99,
        "input_length": 5,
    }
    assert sent[0]["token"] == {"id": 10, "text": "Pa", "logprob": -0.5, "special": False}


def test_exactly_one_token_is_held_back() -> None:
    made = events(["a", "b", "c"])
    reply = presenter()
    assert reply.open(CONTEXT) == []
    counts = [len(reply.event(event)) for event in made]
    assert counts == [0, 0, 1, 1, 1]
    assert reply.close() == []


def test_events_are_framed_as_tgi_frames_them() -> None:
    sent = stream(presenter(), events(["a"]))
    assert sent == [
        b'data:{"index":1,"token":{"id":10,"text":"a","logprob":-0.5,"special":false},'
        b'"generated_text":"a","details":null}\n\n'
    ]


def test_the_stream_has_no_done_event() -> None:
    assert not any(b"[DONE]" in event for event in stream(presenter(), events(["a"])))


def test_full_text_goes_into_the_last_event_only() -> None:
    sent = payloads(stream(presenter(Route.ROOT), events(["a", "b"])))
    assert [event["generated_text"] for event in sent] == [None, "hiab"]


def test_several_tokens_in_one_delta_are_several_events() -> None:
    made = events([])
    delta = TextDelta(0, 0, "ab", (piece(1, "a"), piece(2, "b")))
    sent = payloads(stream(presenter(), [made[0], delta, made[1]]))
    assert [event["token"]["id"] for event in sent] == [1, 2]
    assert sent[-1]["generated_text"] == "ab"


def test_text_without_a_token_joins_the_token_beside_it() -> None:
    info, end = events([])
    late = [info, TextDelta(0, 0, "a", (piece(1, "a"),)), TextDelta(0, 0, "!"), end]
    sent = payloads(stream(presenter(), late))
    assert [event["token"]["text"] for event in sent] == ["a!"]
    early = [info, TextDelta(0, 0, "?"), TextDelta(0, 0, "a", (piece(1, "a"),)), end]
    sent = payloads(stream(presenter(), early))
    assert [event["token"]["text"] for event in sent] == ["?a"]
    assert sent[-1]["generated_text"] == "?a"


def test_an_answer_without_any_token_still_ends_with_a_whole_event() -> None:
    sent = payloads(stream(presenter(details=True), events([])))
    assert len(sent) == 1
    assert sent[0]["generated_text"] == ""
    assert sent[0]["token"] == {"id": 0, "text": "", "logprob": None, "special": True}


def test_special_tokens_are_shown_but_not_part_of_the_text() -> None:
    info, end = events([])
    made = [
        info,
        TextDelta(0, 0, "a", (piece(1, "a"),)),
        TextDelta(0, 0, "", (piece(2, "</s>", special=True),)),
        end,
    ]
    sent = payloads(stream(presenter(), made))
    assert sent[-1]["token"] == {"id": 2, "text": "</s>", "logprob": -0.5, "special": True}
    assert sent[-1]["generated_text"] == "a"


def test_top_tokens_appear_when_asked_for_and_mark_special_ones() -> None:
    info, end = events([])
    top = ((1, "a", -0.5), (2, "</s>", -1.0))
    made = [info, TextDelta(0, 0, "a", (piece(1, "a", top=top),)), end]
    sent = payloads(stream(presenter(top_n_tokens=2), made))
    assert sent[0]["top_tokens"] == [
        {"id": 1, "text": "a", "logprob": -0.5, "special": False},
        {"id": 2, "text": "</s>", "logprob": -1.0, "special": True},
    ]
    assert "top_tokens" not in payloads(stream(presenter(), made))[0]


@pytest.mark.parametrize(
    ("reason", "tokens", "finish"),
    [
        (EndReason.EOS, 2, "eos_token"),
        (EndReason.STOP_TOKEN, 2, "eos_token"),
        (EndReason.STOP_STRING, 2, "stop_sequence"),
        (EndReason.LENGTH, 3, "length"),
        (EndReason.EOS, 3, "length"),
        (EndReason.STOP_STRING, 3, "length"),
        (EndReason.LENGTH, 2, "length"),
    ],
)
def test_finish_reasons_with_length_looked_at_first(reason: EndReason, tokens: int, finish: str) -> None:
    reply = presenter(Route.GENERATE, details=True, max_new_tokens=3)
    answer = GenerationResult((PromptInfo(0, 5, 0),), (choice(0, "a", reason, tokens),))
    assert json.loads(reply.complete(answer, CONTEXT))["details"]["finish_reason"] == finish
    streamed = presenter(details=True, max_new_tokens=3)
    streamed.open(CONTEXT)
    (last,) = payloads(streamed.event(ChoiceEnd(0, 0, reason, tokens, seed=1)))
    assert last["details"]["finish_reason"] == finish


def test_details_are_whole_and_only_there_when_asked_for() -> None:
    assert json.loads(presenter(Route.GENERATE).complete(result(["a"]), CONTEXT)) == {"generated_text": "a"}
    whole = json.loads(presenter(Route.GENERATE, details=True).complete(result(["a"]), CONTEXT))
    assert whole["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 1,
        "seed": 99,
        "prefill": [],
        "tokens": [{"id": 10, "text": "a", "logprob": -0.5, "special": False}],
    }


def test_prefill_lists_the_prompt_only_when_asked_for() -> None:
    pieces = (piece(1, "<s>", None), piece(3, "hi", -2.0))
    answer = GenerationResult((PromptInfo(0, 2, 0, pieces),), (choice(0, "a"),))
    asked = json.loads(presenter(Route.GENERATE, decoder_input_details=True).complete(answer, CONTEXT))
    assert asked["details"]["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": 3, "text": "hi", "logprob": -2.0},
    ]
    other = json.loads(presenter(Route.GENERATE, details=True).complete(answer, CONTEXT))
    assert other["details"]["prefill"] == []


def test_best_of_lists_the_other_sequences() -> None:
    answer = GenerationResult((PromptInfo(0, 2, 0),), (choice(1, "best"),), rest=(choice(0, "other"),))
    reply = presenter(Route.ROOT, best_of=2, do_sample=True, details=True, top_n_tokens=2)
    (body,) = json.loads(reply.complete(answer, CONTEXT))
    assert body["generated_text"] == "hibest"
    (other,) = body["details"]["best_of_sequences"]
    assert other["generated_text"] == "hiother"
    assert other["tokens"][0]["id"] == 10
    assert other["top_tokens"][0][1] == {"id": 2, "text": "</s>", "logprob": -1.5, "special": True}
    parsed_reply = tgi_types.Response(**body)
    assert parsed_reply.details.best_of_sequences is not None


def test_the_tgi_client_reads_the_whole_answer() -> None:
    body = json.loads(presenter(Route.ROOT, details=True).complete(result(["Paris"]), CONTEXT))
    answer = tgi_types.Response(**body[0])
    assert answer.generated_text == "hiParis"
    assert answer.details.finish_reason is tgi_types.FinishReason.EndOfSequenceToken


def test_the_tgi_client_reads_every_streamed_event() -> None:
    sent = stream(presenter(details=True), events(["Pa", "ris"]))
    answers = []
    for line in b"".join(sent).split(b"\n"):  # as its loop over resp.iter_lines() does
        payload = line.decode("utf-8")
        if payload.startswith("data:"):
            answers.append(tgi_types.StreamResponse(**json.loads(payload.removeprefix("data:"))))
    assert [answer.token.text for answer in answers] == ["Pa", "ris"]
    assert answers[-1].generated_text == "Paris"
    assert answers[-1].details is not None and answers[-1].details.generated_tokens == 2


@pytest.mark.parametrize("breaker", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n", "\r\n"])
def test_the_hub_client_reads_text_that_looks_like_line_breaks(breaker: str) -> None:
    text = f"a{breaker}b"
    sent = b"".join(stream(presenter(details=True), events([text, "c"])))
    for lines in (httpx2.Response(200, content=sent).iter_lines(), sent.decode().splitlines()):
        outputs = list(_stream_text_generation_response(lines, details=True))
        assert [output.token.text for output in outputs] == [text, "c"]
        assert outputs[-1].generated_text == text + "c"


def test_the_hub_client_reads_the_whole_answer() -> None:
    body = presenter(Route.ROOT, details=True).complete(result(["Paris"]), CONTEXT)
    assert TextGenerationOutput.parse_obj_as_list(json.loads(body))[0].generated_text == "hiParis"


def test_a_failed_stream_ends_with_an_error_event_of_both_fields() -> None:
    reply = presenter()
    reply.open(CONTEXT)
    event = reply.stream_error(ApiError(Code.ENGINE_DOWN))
    assert payloads([event]) == [{"error": "unhealthy", "error_type": "healthcheck"}]
    with pytest.raises(Exception, match="unhealthy"):
        list(_stream_text_generation_response([event.decode()], details=False))


def test_tokenize_bodies() -> None:
    spans = [TokenSpan(5, "he", 0, 2), TokenSpan(6, "y\u00e9", 2, 4)]
    listed = [
        {"id": 5, "text": "he", "start": 0, "stop": 2},
        {"id": 6, "text": "y\u00e9", "start": 2, "stop": 4},
    ]
    assert json.loads(tokenize_body(spans)) == listed
    assert json.loads(chat_tokenize_body(spans, "hey\u00e9")) == {
        "tokenize_response": listed,
        "templated_text": "hey\u00e9",
    }
