"""The OpenAI route with the unmodified OpenAI SDK, and its bearer tokens."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.emulator import LOCAL_KEYS, Emulator, tokens
from infra.emulator.errors import ServiceError
from infra.emulator.sigv4 import Keys
from tests.infra.conftest import Bench
from tests.infra.scripted import ScriptedContainer, cut, reply, reset, stall, stream, wait_until

Start = Callable[..., Bench]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
NOW_S = 1_790_000_000.0


def completion(text: str) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    document = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(document).encode()


def event(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    document = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    return b"data: " + json.dumps(document).encode() + b"\n\n"


@contextlib.contextmanager
def sdk(
    emulator: Emulator, token: str | None = None, component: str | None = None
) -> Iterator[openai.OpenAI]:
    base_url = emulator.openai_base_url(component=component)
    with openai.OpenAI(base_url=base_url, api_key=token or emulator.token(), max_retries=0) as client:
        yield client


def sdk_token(secret: str = LOCAL_KEYS.secret_access_key, expires_s: int = 600, **query: str) -> str:
    """The token generator of the SageMaker SDK, step by step, on botocore's signer."""
    request = AWSRequest(
        method="POST",
        url="https://sagemaker.amazonaws.com/",
        headers={"host": "sagemaker.amazonaws.com"},
        params={"Action": "CallWithBearerToken", **query},
    )
    credentials = Credentials(LOCAL_KEYS.access_key_id, secret)
    SigV4QueryAuth(credentials, "sagemaker", "us-east-1", expires=expires_s).add_auth(request)
    url = str(request.url).replace("https://", "") + "&Version=1"
    return "sagemaker-api-key-" + base64.b64encode(url.encode()).decode()


def test_chat_reaches_the_containers_chat_route_and_comes_back(bench: Start) -> None:
    here = bench(reply(completion("Paris"), 200, "Content-Type: application/json", "X-Request-Id: r1"))
    with sdk(here.emulator) as client:
        raw = client.chat.completions.with_raw_response.create(model="", messages=MESSAGES)
    assert raw.headers["x-request-id"] == "r1"
    assert raw.parse().choices[0].message.content == "Paris"
    (request,) = here.container.requests
    assert request.path == "/v1/chat/completions"
    assert json.loads(request.body)["model"] == ""
    assert "authorization" not in request.headers


def test_a_chat_stream_arrives_as_it_is_made(bench: Start) -> None:
    sent: list[float] = []
    texts = ["Pa", "ris", " ☂"]
    events = [*map(event, texts), b"data: [DONE]\n\n"]
    here = bench(stream(events, gap_s=0.05, sent=sent))
    seen: list[str | None] = []
    at_s: list[float] = []
    with (
        sdk(here.emulator) as client,
        client.chat.completions.create(model="", messages=MESSAGES, stream=True) as chunks,
    ):
        for chunk in chunks:
            seen.append(chunk.choices[0].delta.content)
            at_s.append(time.monotonic())
    assert seen == texts
    assert at_s[0] < sent[-1], "the first event waited for the last one"


def test_a_containers_error_passes_unchanged(bench: Start) -> None:
    document = b'{"error": {"message": "too long", "type": "invalid_request_error", "code": "c"}}'
    here = bench(reply(document, 400))
    with sdk(here.emulator) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="", messages=MESSAGES)
    assert caught.value.code == "c"


@pytest.mark.parametrize("ending", [cut, reset])
def test_a_broken_chat_stream_ends_broken(bench: Start, ending: Any) -> None:
    here = bench(stream([event("Pa")], ending=ending))
    seen: list[str | None] = []
    with sdk(here.emulator) as client, pytest.raises(openai.APIConnectionError):
        for chunk in client.chat.completions.create(model="", messages=MESSAGES, stream=True):
            seen.append(chunk.choices[0].delta.content)
    assert seen == ["Pa"]


def test_a_container_without_an_answer_is_a_424(bench: Start) -> None:
    here = bench(cut)
    with sdk(here.emulator) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="", messages=MESSAGES)
    assert caught.value.status_code == 424


def test_a_silent_container_times_out_after_60_s_and_a_stream_after_480_s(bench: Start) -> None:
    now_s = [0.0]

    def silent(request: Any, connection: Any) -> None:
        now_s[0] += 61
        stall(request, connection)

    here = bench(silent, clock=lambda: now_s[0])
    with sdk(here.emulator) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="", messages=MESSAGES)
    assert "timed out" in caught.value.response.json()["OriginalMessage"]
    heard = threading.Event()

    def silent_once_heard(request: Any, connection: Any) -> None:
        heard.wait(10)  # the clock jumps only after the head is known to be a stream's
        silent(request, connection)

    here.container.script = stream([event("Pa")], ending=silent_once_heard)
    with sdk(here.emulator) as client:
        chunks = client.chat.completions.create(model="", messages=MESSAGES, stream=True)
        assert next(iter(chunks)).choices[0].delta.content == "Pa"
        heard.set()
        time.sleep(0.3)
        assert len(here.emulator.journal()) == 1, "the stream ended at the limit of a plain answer"
        now_s[0] += 420
        wait_until(lambda: len(here.emulator.journal()) == 2)
        chunks.close()
    assert here.emulator.journal()[1]["outcome"] == "timed_out"


def test_a_component_is_reached_by_its_own_path(bench: Start) -> None:
    here = bench(reply(completion("wrong")))
    with ScriptedContainer(reply(completion("right"))) as other:
        here.emulator.add("demo", here.container.address, {"adapter-1": other.address})
        with sdk(here.emulator, component="adapter-1") as client:
            answer = client.chat.completions.create(model="", messages=MESSAGES)
        assert answer.choices[0].message.content == "right"
        assert other.requests[0].headers["x-amzn-sagemaker-inference-component"] == "adapter-1"
        with sdk(here.emulator, component="adapter-2") as client, pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="", messages=MESSAGES)
    assert here.container.requests == []


@pytest.mark.parametrize("strict", [False, True])
def test_tokens_of_the_sdk_and_of_ours_are_both_accepted(bench: Start, strict: bool) -> None:
    here = bench(reply(completion("ok")), strict=strict)
    for token in (sdk_token(), here.emulator.token(), here.emulator.token(60)):
        with sdk(here.emulator, token) as client:
            answer = client.chat.completions.create(model="", messages=MESSAGES)
        assert answer.choices[0].message.content == "ok"


def test_our_token_and_the_sdks_differ_in_date_and_signature_only() -> None:
    ours = tokens.make(LOCAL_KEYS, "us-east-1", 600, time.time())
    shapes = []
    for token in (ours, sdk_token()):
        url = base64.b64decode(token.removeprefix("sagemaker-api-key-")).decode()
        pairs = [pair.split("=") for pair in url.split("?")[1].split("&")]
        varying = ("X-Amz-Date", "X-Amz-Signature", "X-Amz-Credential")
        shapes.append([(name, "" if name in varying else value) for name, value in pairs])
    assert shapes[0] == shapes[1]


def bad_tokens() -> dict[str, str]:
    good = sdk_token()
    body = base64.b64decode(good.removeprefix(tokens.PREFIX))

    def wrap(url: bytes) -> str:
        return tokens.PREFIX + base64.b64encode(url).decode()

    return {
        "not a token": "sk-abc",
        "no base64": tokens.PREFIX + "***",
        "not ascii": wrap(b"\xff" + body),
        "no query": wrap(b"sagemaker.amazonaws.com/"),
        "another host": wrap(body.replace(b"sagemaker.", b"bedrock.", 1)),
        "another action": wrap(body.replace(b"CallWithBearerToken", b"DeleteEndpoint")),
        "a repeated field": wrap(body + b"&X-Amz-Expires=43200"),
        "over-long life": wrap(body.replace(b"Expires=600", b"Expires=43201")),
        "no life": wrap(body.replace(b"Expires=600", b"Expires=0")),
        "a life that is no number": wrap(body.replace(b"Expires=600", b"Expires=-60")),
        "no date": wrap(body.replace(b"X-Amz-Date=2", b"X-Amz-Date=x")),
        "too large": good + "A" * 10_000,
    }


@pytest.mark.parametrize("name", list(bad_tokens()))
def test_a_bad_token_is_denied(bench: Start, name: str) -> None:
    here = bench(reply(completion("no")))
    with sdk(here.emulator, bad_tokens()[name]) as client, pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model="", messages=MESSAGES)
    assert here.container.requests == []


def test_a_token_is_accepted_from_its_date_until_its_life_is_over() -> None:
    bearer = "Bearer " + tokens.make(LOCAL_KEYS, "us-east-1", 100, NOW_S)
    for now_s in (NOW_S, NOW_S + 99, NOW_S - 299):
        tokens.check(bearer, now_s, LOCAL_KEYS)
    for now_s in (NOW_S + 100, NOW_S + 1e6, NOW_S - 301):
        with pytest.raises(ServiceError) as caught:
            tokens.check(bearer, now_s, None)
        assert (caught.value.status, caught.value.kind) == (403, "AccessDeniedException")
        assert bearer not in caught.value.message


def test_strict_checks_who_signed_the_token_and_what() -> None:
    changed = sdk_token().removeprefix(tokens.PREFIX)
    url = base64.b64decode(changed).decode().replace("Expires=600", "Expires=601")
    longer = tokens.PREFIX + base64.b64encode(url.encode()).decode()
    other_id = tokens.make(Keys("other", "x"), "us-east-1", 100, time.time())
    for token in (sdk_token(secret="wrong"), longer, other_id):
        tokens.check(f"Bearer {token}", time.time(), None)
        with pytest.raises(ServiceError, match="AccessDenied"):
            tokens.check(f"Bearer {token}", time.time(), LOCAL_KEYS)


def test_a_session_token_is_part_of_what_is_signed() -> None:
    keys = Keys("id", "secret", "session/+=")
    token = tokens.make(keys, "eu-west-1", 100, NOW_S)
    tokens.check(f"Bearer {token}", NOW_S, keys)
    url = base64.b64decode(token.removeprefix(tokens.PREFIX)).decode().replace("session", "another")
    forged = tokens.PREFIX + base64.b64encode(url.encode()).decode()
    with pytest.raises(ServiceError, match="AccessDenied"):
        tokens.check(f"Bearer {forged}", NOW_S, keys)


def test_a_request_without_a_token_is_refused() -> None:
    for missing in (None, ""):
        with pytest.raises(ServiceError, match="MissingAuthenticationToken"):
            tokens.check(missing, NOW_S, None)


def test_a_token_is_not_made_for_a_life_out_of_range() -> None:
    for expires_s in (0, -1, 43_201):
        with pytest.raises(ValueError, match="lives"):
            tokens.make(LOCAL_KEYS, "us-east-1", expires_s, NOW_S)
    with pytest.raises(ValueError, match="region"):
        tokens.make(LOCAL_KEYS, "", 1, NOW_S)


def test_keys_show_no_secret() -> None:
    shown = repr(Keys("id", "the-secret", "the-session"))
    assert "the-secret" not in shown
    assert "the-session" not in shown
