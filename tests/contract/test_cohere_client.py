"""The unmodified `cohere` client against the demo endpoint, through the emulator: all of its calls that a
text model can answer, by both of its ways to SageMaker.

Only the URL is given to it: it knows AWS's own alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import cohere
import pytest
from cohere.core.api_error import ApiError
from cohere.manually_maintained.cohere_aws.client import Client as AwsClient
from cohere.manually_maintained.cohere_aws.mode import Mode

from tests.contract.calls import QUESTION
from tests.contract.conftest import Running

pytestmark = pytest.mark.real_model
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}


@pytest.fixture
def keys(endpoint: Running, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return what the client signs with; its URL becomes the emulator's."""
    emulator = endpoint.emulator

    def url(*, platform: str, aws_region: str, model: str, stream: bool) -> str:
        operation = "invocations-response-stream" if stream else "invocations"
        return f"{emulator['endpoint_url']}/endpoints/{model}/{operation}"

    monkeypatch.setattr("cohere.aws_client.get_url", url)
    return {
        "aws_access_key": emulator["aws_access_key_id"],
        "aws_secret_key": emulator["aws_secret_access_key"],
        "aws_region": emulator["region_name"],
    }


@pytest.fixture
def v1(keys: dict[str, str]) -> Iterator[cohere.SagemakerClient]:
    client = cohere.SagemakerClient(**keys)
    yield client
    client._client_wrapper.httpx_client.httpx_client.close()


@pytest.fixture
def v2(keys: dict[str, str]) -> Iterator[cohere.SagemakerClientV2]:
    client = cohere.SagemakerClientV2(**keys)
    yield client
    client._client_wrapper.httpx_client.httpx_client.close()


@pytest.fixture
def aws(endpoint: Running) -> Iterator[AwsClient]:
    """The client that Cohere's notebooks use; made without its constructor, which asks AWS for accounts."""
    client = AwsClient.__new__(AwsClient)
    client.mode = Mode.SAGEMAKER
    client._client = boto3.client("sagemaker-runtime", **endpoint.emulator)
    client._endpoint_name = "demo"
    yield client
    client._client.close()


def test_v1_chat_answers_with_its_history(v1: cohere.SagemakerClient) -> None:
    answer = v1.chat(model="demo", message=QUESTION, preamble="You are a helpful assistant.", **GREEDY)
    assert "Paris" in answer.text and answer.finish_reason in ("COMPLETE", "MAX_TOKENS")
    again = v1.chat(
        model="demo", message="Thank you.", chat_history=answer.chat_history, **{**GREEDY, "max_tokens": 4}
    )
    assert again.text and len(again.chat_history or []) == 4


def test_v1_chat_streams_the_whole_answer(v1: cohere.SagemakerClient) -> None:
    whole = v1.chat(model="demo", message=QUESTION, **GREEDY)
    events = list(v1.chat_stream(model="demo", message=QUESTION, **GREEDY))
    kinds = [event.event_type for event in events]
    assert kinds[0] == "stream-start" and kinds[-1] == "stream-end"
    texts = [event.text for event in events if event.event_type == "text-generation"]
    assert len(texts) > 3 and "".join(texts) == whole.text == events[-1].response.text


def test_v1_generate_answers_and_streams(v1: cohere.SagemakerClient) -> None:
    fields: dict[str, Any] = {**GREEDY, "k": 0, "max_tokens": 8}
    whole = v1.generate(model="demo", prompt=PROMPT, return_likelihoods="GENERATION", **fields)
    events = list(v1.generate_stream(model="demo", prompt=PROMPT, **fields))
    text = "".join(event.text for event in events if event.event_type == "text-generation")
    assert "Paris" in text
    assert events[-1].event_type == "stream-end"
    assert events[-1].response.generations[0].text == text
    # it types a whole reply as a single generation (7.3.1), so the list is an extra to its model
    generations: Any = whole.generations  # type: ignore[attr-defined]
    assert generations[0].text == text
    assert all(each.likelihood <= 0 for each in generations[0].token_likelihoods)


def test_v2_chat_answers_in_its_own_shape(v2: cohere.SagemakerClientV2) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    answer = v2.chat(model="demo", messages=messages, k=0, **GREEDY)
    assert answer.message.content is not None and "Paris" in answer.message.content[0].text
    assert answer.usage is not None and answer.usage.tokens is not None
    assert answer.usage.tokens.output_tokens


def test_an_error_carries_our_words(v1: cohere.SagemakerClient) -> None:
    with pytest.raises(ApiError) as caught:
        v1.chat(model="demo", message=QUESTION, connectors=[cohere.ChatConnector(id="web-search")])
    assert caught.value.status_code == 424
    assert "`connectors` is not supported" in str(caught.value.body)


def test_calls_that_need_another_model_are_refused(v1: cohere.SagemakerClient) -> None:
    with pytest.raises(ApiError) as caught:
        v1.rerank(model="demo", query="x", documents=["y"])
    assert "a Cohere rerank body is not served here" in str(caught.value.body)


def test_the_notebook_client_chats_and_streams(aws: AwsClient) -> None:
    whole = aws.chat(message=QUESTION, stream=False, **GREEDY)
    assert "Paris" in whole.text and whole.response_id
    streamed = aws.chat(message=QUESTION, stream=True, **GREEDY)
    texts = [event.text for event in streamed if event.event_type == "text-generation"]
    assert "".join(texts) == whole.text
    assert streamed.finish_reason == whole.finish_reason
    assert streamed.token_count == whole.token_count


def test_the_notebook_client_generates_and_streams(aws: AwsClient) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "p": 1, "k": 0}
    whole = aws.generate(stream=False, **fields)
    streamed = aws.generate(stream=True, **fields)
    text = "".join(part.text for part in streamed)
    assert "Paris" in text and whole.generations[0]["text"] == text
    assert streamed.generations.generations[0].text == text
