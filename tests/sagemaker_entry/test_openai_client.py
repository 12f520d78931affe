"""The unmodified OpenAI client reads what the presenters write, errors and failed streams included."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from sagemaker_entry.dialects.choose import Dialect
from sagemaker_entry.dialects.presenter import error_body, status_of
from sagemaker_entry.errors import ApiError, Code
from tests.sagemaker_entry.dialect_samples import (
    CONTEXT,
    chat_presenter,
    completion_presenter,
    events,
    payloads,
    result,
    stream,
)


def client(body: bytes, content_type: str, status: int = 200) -> openai.OpenAI:
    """The real client over a transport that answers every request with `body`."""
    reply = httpx2.Response(status, content=body, headers={"content-type": content_type})
    transport = httpx2.MockTransport(lambda request: reply)
    return openai.OpenAI(
        api_key="x",
        base_url="http://localhost/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    )


@pytest.mark.parametrize("breaker", ["\u2028", "\u2029", "\x85", "\r", "\n\n", "\r\n"])
def test_no_event_is_cut_by_a_line_reader(breaker: str) -> None:
    text = f"a{breaker}b\U0001f600"
    for reply in (chat_presenter(stream=True), completion_presenter(stream=True)):
        for event in stream(reply, events([text])):
            assert len(event.decode().splitlines()) == 2
    sent = b"".join(stream(chat_presenter(stream=True), events([text])))
    answer = client(sent, "text/event-stream").chat.completions.create(
        model="", messages=[{"role": "user", "content": "x"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == text


def test_the_openai_client_reads_a_whole_chat_answer() -> None:
    body = chat_presenter(logprobs=True).complete(result(["Paris"]), CONTEXT)
    answer = client(body, "application/json").chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "x"}]
    )
    assert answer.choices[0].message.content == "Paris"
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_the_openai_client_reads_a_completion_stream() -> None:
    reply = completion_presenter(stream=True, logprobs=0, stream_options={"include_usage": True})
    sent = b"".join(stream(reply, events([" Pa", "ris"])))
    answer = client(sent, "text/event-stream").completions.create(model="smol", prompt="x", stream=True)
    chunks = list(answer)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " Paris"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 7
    offsets = [c.choices[0].logprobs.text_offset for c in chunks[:2] if c.choices[0].logprobs]
    assert offsets == [[0], [3]]


@pytest.mark.parametrize("make", [chat_presenter, completion_presenter])
def test_the_openai_client_raises_on_a_failed_stream(make: Any) -> None:
    reply = make(stream=True)
    sent = reply.open(CONTEXT)
    for event in events(["a"])[:-1]:
        sent.extend(reply.event(event))
    sent.append(reply.stream_error(ApiError(Code.ENGINE_DOWN)))
    assert b"[DONE]" not in b"".join(sent)
    (error,) = payloads(sent[-1:])
    assert error["error"]["request_id"] == "reply-1"
    answer = client(b"".join(sent), "text/event-stream").chat.completions.create(
        model="", messages=[{"role": "user", "content": "x"}], stream=True
    )
    with pytest.raises(openai.APIError, match="the engine restarted"):
        list(answer)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ApiError(Code.MISSING_FIELD, param="messages"), openai.BadRequestError),
        (ApiError(Code.MODEL_NOT_FOUND, param="model"), openai.NotFoundError),
        (ApiError(Code.UNAUTHORIZED), openai.AuthenticationError),
        (ApiError(Code.OVERLOADED, retry_after_s=1), openai.RateLimitError),
        (ApiError(Code.LOADING), openai.InternalServerError),
    ],
)
def test_the_openai_client_raises_its_own_class_for_each_status(
    error: ApiError, kind: type[openai.APIStatusError]
) -> None:
    body, content_type = error_body(Dialect.OPENAI_CHAT, error, "id-1")
    status = status_of(Dialect.OPENAI_CHAT, error)
    with pytest.raises(kind) as caught:
        client(body, content_type, status).chat.completions.create(
            model="", messages=[{"role": "user", "content": "x"}]
        )
    assert caught.value.code == error.code.value
    assert caught.value.param == error.param
