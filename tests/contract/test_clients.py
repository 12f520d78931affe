"""Unmodified clients of other people against the demo endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import openai
import pytest
import text_generation
from botocore.exceptions import ClientError
from huggingface_hub import InferenceClient

from tests.contract.calls import QUESTION, chat, generate
from tests.contract.conftest import Running

pytestmark = [
    pytest.mark.real_model,
    # text_generation 0.7 still calls pydantic's first API; it is theirs to change
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def aws(endpoint: Running) -> Iterator[Any]:
    client = boto3.client("sagemaker-runtime", **endpoint.emulator)
    yield client
    client.close()


@pytest.fixture(scope="module")
def oai(endpoint: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_boto3_invokes_the_chat_dialect(aws: Any) -> None:
    answer = aws.invoke_endpoint(
        EndpointName="demo", ContentType="application/json", Body=json.dumps(chat()).encode()
    )
    assert answer["ContentType"] == "application/json"
    assert "Paris" in json.loads(answer["Body"].read())["choices"][0]["message"]["content"]


def test_boto3_invokes_the_tgi_dialect(aws: Any) -> None:
    body = generate("The capital of France is", 8, return_full_text=False)
    answer = aws.invoke_endpoint(
        EndpointName="demo", ContentType="application/json", Body=json.dumps(body).encode()
    )
    assert "Paris" in json.loads(answer["Body"].read())[0]["generated_text"]


def test_boto3_streams_in_parts_that_join_to_the_whole_answer(aws: Any) -> None:
    whole = aws.invoke_endpoint(
        EndpointName="demo", ContentType="application/json", Body=json.dumps(chat()).encode()
    )
    expected = json.loads(whole["Body"].read())["choices"][0]["message"]["content"]
    answer = aws.invoke_endpoint_with_response_stream(
        EndpointName="demo", ContentType="application/json", Body=json.dumps(chat(stream=True)).encode()
    )
    assert answer["ContentType"].startswith("text/event-stream")
    parts = [part["PayloadPart"]["Bytes"] for part in answer["Body"]]
    assert len(parts) > 3
    lines = b"".join(parts).decode().splitlines()
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in data[:-1]]
    assert "".join(deltas) == expected


def test_boto3_sees_our_error_inside_a_model_error(aws: Any) -> None:
    with pytest.raises(ClientError) as caught:
        aws.invoke_endpoint(
            EndpointName="demo", ContentType="application/json", Body=json.dumps(chat(max_token=3)).encode()
        )
    response: Any = caught.value.response
    assert response["Error"]["Code"] == "ModelError"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["OriginalStatusCode"] == 400
    assert json.loads(response["OriginalMessage"])["error"]["param"] == "max_token"


def test_openai_chat_answers_and_counts_tokens(oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(model="", messages=MESSAGES, temperature=0, max_tokens=32)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == "stop"


def test_openai_chat_stream_equals_the_whole_answer(oai: openai.OpenAI) -> None:
    whole = oai.chat.completions.create(model="", messages=MESSAGES, temperature=0, max_tokens=32)
    stream = oai.chat.completions.create(
        model="",
        messages=MESSAGES,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_openai_chats_and_streams_over_the_bearer_route(endpoint: Running, oai: openai.OpenAI) -> None:
    direct = oai.chat.completions.create(model="", messages=MESSAGES, temperature=0, max_tokens=16)
    with openai.OpenAI(**endpoint.openai, max_retries=0) as client:
        fields: Any = {"model": "", "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**fields)
        chunks = list(client.chat.completions.create(**fields, stream=True))
    assert whole.choices[0].message.content == direct.choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == direct.choices[0].message.content
    bad = {**endpoint.openai, "api_key": "no"}
    with openai.OpenAI(**bad, max_retries=0) as client, pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(**fields)


def test_openai_chat_logprobs_describe_every_token(oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(
        model="", messages=MESSAGES, temperature=0, max_tokens=16, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs
    assert content is not None and content.content is not None and answer.usage is not None
    text = "".join(token.token for token in content.content)
    assert (answer.choices[0].message.content or "") in text
    for token in content.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy takes the best


def test_openai_stop_string_ends_the_text_before_it(oai: openai.OpenAI) -> None:
    free = oai.chat.completions.create(model="", messages=MESSAGES, temperature=0, max_tokens=32)
    text = free.choices[0].message.content or ""
    cut = oai.chat.completions.create(
        model="", messages=MESSAGES, temperature=0, max_tokens=32, stop=[text[10:14]]
    )
    assert cut.choices[0].message.content == text[: text.index(text[10:14])]
    assert cut.choices[0].finish_reason == "stop"


def test_openai_n_choices_are_seeded_and_repeatable(oai: openai.OpenAI) -> None:
    def three(seed: int) -> list[str | None]:
        answer = oai.chat.completions.create(
            model="", messages=MESSAGES, temperature=1.5, max_tokens=12, n=3, seed=seed
        )
        return [choice.message.content for choice in answer.choices]

    first = three(7)
    assert len(first) == 3
    assert len(set(first)) > 1
    assert three(7) == first
    assert three(8) != first


def test_openai_completion_with_logprobs_echo_and_stream(oai: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    answer = oai.completions.create(
        model="", prompt=prompt, temperature=0, max_tokens=6, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith(prompt) and "Paris" in choice.text
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    stream = oai.completions.create(model="", prompt=prompt, temperature=0, max_tokens=6, stream=True)
    assert prompt + "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == choice.text


def test_openai_several_prompts_come_back_in_order(oai: openai.OpenAI) -> None:
    prompts = ["1, 2, 3,", "Monday, Tuesday,"]
    both = oai.completions.create(model="", prompt=prompts, temperature=0, max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1]
    for prompt, choice in zip(prompts, both.choices, strict=True):
        alone = oai.completions.create(model="", prompt=prompt, temperature=0, max_tokens=6)
        assert alone.choices[0].text == choice.text


def test_openai_errors_have_the_class_of_their_status(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        oai.chat.completions.create(model="", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError) as caught:
        oai.chat.completions.create(model="another", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


def test_openai_lists_the_served_model(oai: openai.OpenAI) -> None:
    models = oai.models.list().data
    assert len(models) == 1
    assert oai.models.retrieve(models[0].id).id == models[0].id


def test_text_generation_client_generates_with_details(endpoint: Running) -> None:
    client = text_generation.Client(endpoint.url, timeout=60)
    answer = client.generate("The capital of France is", max_new_tokens=8, decoder_input_details=True)
    assert "Paris" in answer.generated_text
    assert answer.details is not None and answer.details.generated_tokens == 8
    assert answer.details.prefill[0].logprob is None
    assert answer.details.prefill[1].logprob is not None and answer.details.prefill[1].logprob <= 0


def test_text_generation_client_streams_token_by_token(endpoint: Running) -> None:
    client = text_generation.Client(endpoint.url, timeout=60)
    responses = list(client.generate_stream("The capital of France is", max_new_tokens=8))
    assert len(responses) == 8
    assert responses[-1].generated_text == "".join(r.token.text for r in responses)
    assert responses[-1].details is not None
    assert all(r.generated_text is None for r in responses[:-1])


def test_text_generation_client_understands_our_validation_error(endpoint: Running) -> None:
    client = text_generation.Client(endpoint.url, timeout=60)
    with pytest.raises(text_generation.errors.ValidationError):
        client.generate("x" * 200_000, max_new_tokens=8)


@pytest.fixture
def hub_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client takes its offline switch, which this suite sets, as a ban on loopback, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_hugging_face_client_generates_and_streams(endpoint: Running, hub_online: None) -> None:
    client = InferenceClient(model=endpoint.url)
    fields: Any = {"max_new_tokens": 8, "return_full_text": False}
    text = client.text_generation("The capital of France is", **fields)
    assert "Paris" in text
    parts = list(client.text_generation("The capital of France is", stream=True, **fields))
    assert len(parts) == 8 and "".join(parts) == text


def test_hugging_face_client_chats(endpoint: Running, hub_online: None) -> None:
    client = InferenceClient(model=endpoint.url)
    answer = client.chat_completion(MESSAGES, max_tokens=32, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    stream = client.chat_completion(MESSAGES, max_tokens=32, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == answer.choices[0].message.content
