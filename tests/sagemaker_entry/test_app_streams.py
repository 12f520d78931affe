"""Streams and what the engine can do to a request, through the whole front."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.sagemaker_entry.harness import Server, post, status_of, wait_until


def chunks(reply: bytes) -> tuple[list[bytes], bool]:
    """Return the chunks of a chunked reply and whether the last chunk ended it."""
    body = reply.split(b"\r\n\r\n", 1)[1]
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return found, rest == b"\r\n"
        found.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        body = rest[length + 2 :]
    return found, False


def stream(
    server: Server, body: dict[str, Any], path: str = "/invocations"
) -> tuple[bytes, list[bytes], bool]:
    reply = server.raw(post(path, json.dumps(body | {"stream": True}).encode()), 10)
    head = reply.split(b"\r\n\r\n", 1)[0]
    return head, *chunks(reply)


def test_every_chunk_of_a_stream_is_one_whole_event(server: Server) -> None:
    for path, body, done in (
        ("/v1/completions", {"prompt": "hello ", "max_tokens": 5}, True),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "h"}], "max_tokens": 5}, True),
        ("/invocations", {"inputs": "hello ", "parameters": {"max_new_tokens": 5}}, False),
    ):
        head, events, ended = stream(server, body, path)
        assert ended
        assert b"Content-Type: text/event-stream" in head
        assert b"Cache-Control: no-cache" in head
        assert b"X-Accel-Buffering: no" in head
        assert len(events) >= 5
        for event in events:
            assert event.startswith(b"data:")
            assert event.endswith(b"\n\n")
            assert event.count(b"\n\n") == 1
        assert (events[-1] == b"data: [DONE]\n\n") is done


def test_the_first_part_leaves_before_the_last_token_is_made(server: Server) -> None:
    with server.connect() as client:
        client.settimeout(5)
        body = json.dumps({"prompt": "ab wait=100 ", "max_tokens": 8, "stream": True}).encode()
        client.sendall(post("/v1/completions", body))
        first = client.recv(4096)
        assert b"data:" in first or b"data:" in client.recv(4096)
        assert server.engine["running"] == 1


def test_generate_stream_streams_without_being_asked(server: Server) -> None:
    reply = server.raw(post("/generate_stream", b'{"inputs": "ab", "parameters": {"max_new_tokens": 2}}'))
    events, ended = chunks(reply)
    assert ended
    assert json.loads(events[-1].removeprefix(b"data:"))["generated_text"] == "ab"


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        ("error=kv_exhausted", 507, "kv_exhausted"),
        ("error=numerical_error", 422, "numerical_error"),
        ("error=internal", 500, "internal"),
        ("error=draining", 503, "draining"),
        ("error=never_heard_of", 500, "internal"),
        ("full=1", 429, "overloaded"),
    ],
)
def test_an_error_before_the_first_token_has_its_own_status(
    server: Server, words: str, status: int, code: str
) -> None:
    for streamed in (False, True):
        body = {"prompt": f"ab {words} ", "max_tokens": 5, "stream": streamed}
        got, headers, reply = server.request("POST", "/v1/completions", body)
        assert (got, json.loads(reply)["error"]["code"]) == (status, code)
        if code == "overloaded":
            assert headers["Retry-After"] == "7"


def test_an_error_in_mid_stream_is_an_event_and_then_the_body_breaks_off(server: Server) -> None:
    body = {"prompt": "ab error=kv_exhausted at=2 ", "max_tokens": 5}
    head, events, ended = stream(server, body, "/v1/completions")
    assert status_of(head) == 200
    assert not ended, "the last chunk was sent"
    assert json.loads(events[-1].removeprefix(b"data:"))["error"]["code"] == "kv_exhausted"
    assert not any(b"[DONE]" in event for event in events)


def test_choices_and_prompts_run_together_and_keep_their_indices(server: Server) -> None:
    body = {"prompt": ["ab ", "cd "], "max_tokens": 2, "n": 2}
    status, answer = server.invoke(body, "/v1/completions")
    assert status == 200
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "cd"),
        (3, "cd"),
    ]
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 6, "completion_tokens": 8}
    _, events, ended = stream(server, body, "/v1/completions")
    assert ended
    texts = ["", "", "", ""]
    for event in events[:-1]:
        for choice in json.loads(event.removeprefix(b"data:"))["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["ab", "ab", "cd", "cd"]


def test_a_stop_string_ends_the_answer_and_the_engines_work(server: Server) -> None:
    cancels = server.engine["cancels"]
    body = {"prompt": "hello world wait=5 ", "max_tokens": 1000, "stop": ["lo w"]}
    status, answer = server.invoke(body, "/v1/completions")
    assert (status, answer["choices"][0]["text"]) == (200, "hel")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 7
    wait_until(lambda: server.engine["cancels"] == cancels + 1, what="the cancel")
    assert server.engine["running"] == 0


def test_best_of_and_logprobs_reach_the_reply(server: Server) -> None:
    body = {
        "inputs": "ab",
        "parameters": {"max_new_tokens": 2, "best_of": 2, "do_sample": True, "details": True},
    }
    status, answer = server.invoke(body, "/generate")
    assert status == 200
    assert len(answer["details"]["best_of_sequences"]) == 1
    assert answer["details"]["tokens"][0]["logprob"] == -0.5
    status, answer = server.invoke(
        {"prompt": "ab", "max_tokens": 1, "logprobs": 1, "echo": True}, "/v1/completions"
    )
    assert status == 200
    assert answer["choices"][0]["text"] == "aba"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -0.5]


def test_the_same_seed_is_reported_back_and_a_missing_one_is_drawn(server: Server) -> None:
    parameters = {"max_new_tokens": 1, "do_sample": True, "details": True}
    drawn = {
        server.invoke({"inputs": "a", "parameters": parameters}, "/generate")[1]["details"]["seed"]
        for _ in range(3)
    }
    assert len(drawn) == 3
    given = {"inputs": "a", "parameters": parameters | {"seed": 7}}
    assert server.invoke(given, "/generate")[1]["details"]["seed"] == 7


def test_a_cohere_body_streams_when_the_platform_says_its_caller_does(server: Server) -> None:
    body = json.dumps({"message": "hello ", "max_tokens": 3}).encode()
    operation = "X-Amzn-SageMaker-Forwarded-Api: InvokeEndpointWithResponseStream"
    reply = server.raw(post("/invocations", body, operation), 10)
    head, found, ended = reply.split(b"\r\n\r\n", 1)[0], *chunks(reply)
    assert ended and b"Content-Type: application/json" in head
    assert len(found) >= 4 and all(set(json.loads(piece)) == {"bytes"} for piece in found)
    plain = server.raw(post("/invocations", body), 10)
    assert json.loads(plain.split(b"\r\n\r\n", 1)[1])["finish_reason"] == "MAX_TOKENS"


def test_another_body_never_streams_because_of_that_header(server: Server) -> None:
    status, reply = server.invoke(
        {"prompt": "hello ", "max_tokens": 3},
        **{"X-Amzn-SageMaker-Forwarded-Api": "InvokeEndpointWithResponseStream"},
    )
    assert status == 200 and reply["object"] == "text_completion"
