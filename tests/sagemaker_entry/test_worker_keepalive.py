"""One connection for many requests, and request ids: nothing of one exchange reaches another."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.sagemaker_entry.harness import Server, post, read_all, status_of

INFERENCE_ID = "X-Amzn-SageMaker-Inference-Id"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def line(server: Server) -> Iterator[http.client.HTTPConnection]:
    """One connection that fails instead of opening another behind our back."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.connect()
    connection.auto_open = 0
    yield connection
    connection.close()


def ask(
    line: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    line.request(method, path, data, JSON | headers)
    reply = line.getresponse()
    return reply.status, reply.read()


def completion(text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": text, "max_tokens": len(text), **fields}


def test_many_streams_on_one_connection_each_tell_their_own_text(line: http.client.HTTPConnection) -> None:
    for number in range(12):
        text = f"number {number}. "
        status, reply = ask(line, "POST", "/v1/completions", completion(text, stream=True))
        assert status == 200
        events = reply.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
        assert "".join(choice["text"] for part in told for choice in part["choices"]) == text
        assert len({part["id"] for part in told}) == 1


# What is answered after a body that was read to its end leaves the connection open; the rest closes it.
REPLIES: list[tuple[str, str, str, Any, dict[str, str], int]] = [
    ("an answer", "POST", "/v1/completions", completion("ab"), {}, 200),
    ("a stream", "POST", "/v1/completions", completion("ab", stream=True), {}, 200),
    ("a listing", "GET", "/v1/models", None, {}, 200),
    ("a ping", "GET", "/ping", None, {}, 200),
    ("bad JSON", "POST", "/invocations", b"{", {}, 400),
    ("an unknown field", "POST", "/invocations", completion("ab", nothing=1), {}, 400),
    ("a large refused body", "POST", "/invocations", b"[" + b" " * 300_000, {}, 400),
    ("TGI's 422", "POST", "/generate", {"inputs": ""}, {}, 422),
    ("an unknown route", "GET", "/nothing", None, {}, 404),
    ("an unknown model", "GET", "/v1/models/other", None, {}, 404),
    ("a wrong method", "GET", "/invocations", None, {}, 405),
    ("an engine's error", "POST", "/v1/completions", completion("ab error=kv_exhausted "), {}, 507),
    ("a full queue", "POST", "/v1/completions", completion("ab full=1 "), {}, 429),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected"), [r[1:] for r in REPLIES], ids=[r[0] for r in REPLIES]
)
def test_the_connection_serves_the_next_request_after_every_kind_of_reply(
    line: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    expected: int,
) -> None:
    for _ in range(2):
        assert ask(line, method, path, body, **headers)[0] == expected
        status, reply = ask(line, "POST", "/v1/completions", completion("after"))
        assert (status, json.loads(reply)["choices"][0]["text"]) == (200, "after")


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/invocations", ["Content-Type: text/plain"], 415),
        ("/invocations", ["Content-Encoding: gzip"], 415),
        ("/nothing", [], 404),
        ("/ping", [], 200),
    ],
)
def test_a_body_nobody_read_is_never_taken_for_a_request(
    server: Server, path: str, headers: list[str], expected: int
) -> None:
    smuggled = b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n"
    reply = server.raw(post(path, smuggled, *headers, close=False))
    assert status_of(reply) == expected
    assert reply.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in reply


def test_requests_pipelined_behind_a_stream_are_answered_after_it(server: Server) -> None:
    streamed = json.dumps(completion("abcd", stream=True)).encode()
    plain = json.dumps(completion("wxyz")).encode()
    with server.connect() as client:
        client.settimeout(5)
        client.sendall(
            post("/v1/completions", streamed, close=False)
            + post("/invocations", b"{", close=False)
            + post("/v1/completions", streamed, close=False)
            + post("/v1/completions", plain)
        )
        reply = read_all(client)
    parts = reply.split(b"HTTP/1.1 ")[1:]
    assert [int(part[:3]) for part in parts] == [200, 400, 200, 200]
    assert parts[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert parts[2].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"wxyz" in parts[3] and b"wxyz" not in b"".join(parts[:3])


def test_a_connection_is_closed_after_a_stream_that_broke_off(server: Server) -> None:
    failing = json.dumps(completion("ab error=internal at=2 ", stream=True)).encode()
    reply = server.raw(
        post("/v1/completions", failing, close=False) + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert reply.count(b"HTTP/1.1 ") == 1, "the next reply would be read as part of the broken stream"
    assert b'"internal"' in reply


def test_http_1_0_is_answered_and_closed(server: Server) -> None:
    body = json.dumps(completion("ab", stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    reply = server.raw(head.encode() + b"\r\n\r\n" + body)
    assert reply.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Transfer-Encoding" not in reply
    assert reply.endswith(b"data: [DONE]\n\n")


# Request ids (row A28)

IDS = ["a" * 65, "host:1234___addr", "x\ty", "../../etc", "\u00e9\u00ff", "a" * 8000, '"}{', "%0d%0aX: y"]


@pytest.mark.parametrize("given", IDS)
def test_a28_an_id_that_is_not_a_plain_word_is_not_used(server: Server, given: str) -> None:
    data = post("/invocations", b'{"nothing": 1}', f"{INFERENCE_ID}: {given}", f"X-Request-Id: {given}")
    reply = server.raw(data)
    assert status_of(reply) == 400
    shown = json.loads(reply.split(b"\r\n\r\n", 1)[1])["error"]["request_id"]
    assert len(shown) == 24 and shown.isalnum()
    assert given.encode("latin-1") not in reply
    assert given not in server.log


def test_a28_an_id_of_10_kb_is_refused_with_its_header(server: Server) -> None:
    for header in (INFERENCE_ID, "X-Request-Id"):
        assert status_of(server.raw(post("/invocations", b"{}", f"{header}: {'a' * 10_240}"))) == 431
    assert server.ping() == 200


def test_a28_the_same_id_twice_at_once_is_two_requests(server: Server) -> None:
    replies: dict[str, bytes] = {}

    def run(text: str) -> None:
        body = completion(f"{text} wait=10 ", stream=True)
        _, _, replies[text] = server.request(
            "POST", "/v1/completions", body, {INFERENCE_ID: "same", "X-Request-Id": "same"}
        )

    threads = [threading.Thread(target=run, args=(text,)) for text in ("aaaa", "bbbb", "cccc")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = set()
    for text, reply in replies.items():
        told = [json.loads(event[6:]) for event in reply.split(b"\n\n")[:-2]]
        assert "".join(choice["text"] for part in told for choice in part["choices"]) == f"{text} wait=10 "
        ids |= {part["id"] for part in told}
    assert len(ids) == 3, "the client's id became the reply's"


def test_a28_one_client_that_leaves_does_not_cancel_the_other_with_its_id(server: Server) -> None:
    cancels = server.engine["cancels"]
    body = json.dumps(completion("abcdef wait=20 ")).encode()
    leaving, staying = server.connect(), server.connect()
    for client in (leaving, staying):
        client.sendall(post("/v1/completions", body, f"{INFERENCE_ID}: same"))
    leaving.close()
    reply = read_all(staying)
    staying.close()
    assert status_of(reply) == 200 and b"abcdef" in reply
    assert server.engine["cancels"] <= cancels + 1
