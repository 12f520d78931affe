"""JSON lines: one answer line for every line, in order, whatever is wrong with any of them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Exchange, StreamBroken
from sagemaker_entry.lifetime import End, Lifetime
from sagemaker_entry.lines import Lines, count, split
from tests.sagemaker_entry.harness import Server, post, read_all, wait_until

LINES = {"Content-Type": "application/jsonlines"}


def invoke(server: Server, *lines: Any, **headers: str) -> list[Any]:
    body = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    status, got, reply = server.request("POST", "/invocations", body, LINES | headers)
    assert status == 200
    assert got["Content-Type"] == "application/jsonlines"
    return [json.loads(line) for line in reply.splitlines()]


def test_every_dialect_may_stand_in_a_line_and_streams_in_none(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
    tgi = {"inputs": "bc", "parameters": {"max_new_tokens": 2, "return_full_text": False}, "stream": True}
    cohere = {"message": "d", "max_tokens": 2, "stream": True}
    completion = {"prompt": "ef", "max_tokens": 2}
    found = invoke(server, chat, tgi, cohere, completion)
    assert found[0]["object"] == "chat.completion"
    assert found[1] == [{"generated_text": "bc"}]
    assert found[2]["finish_reason"] == "MAX_TOKENS"
    assert found[3]["choices"][0]["text"] == "ef"


def test_a_bad_line_has_an_error_line_and_the_others_their_answers(server: Server) -> None:
    good = {"prompt": "ab", "max_tokens": 2}
    session = {"requestType": "NEW_SESSION"}
    found = invoke(server, good, b"{", b"\xff", [], {"prompt": 3}, {"inputs": ""}, session, good)
    assert [set(line) == {"error"} for line in found] == [False, *[True] * 6, False]
    codes = [line["error"]["code"] for line in found[1:-1]]
    assert codes == [
        "invalid_json",
        "invalid_utf8",
        "unknown_shape",
        "invalid_type",
        "invalid_request",
        "sessions_not_enabled",
    ]
    assert found[0]["choices"] == found[-1]["choices"]


def test_the_log_counts_the_tokens_of_all_lines(server: Server) -> None:
    invoke(server, {"prompt": "ab", "max_tokens": 3}, {"prompt": "cde", "max_tokens": 4})
    wait_until(lambda: server.events("request")[-1]["completion_tokens"] == 7)
    assert server.events("request")[-1]["prompt_tokens"] == 5


def test_blank_lines_yield_nothing_and_carriage_returns_are_no_part_of_a_line(server: Server) -> None:
    body = b'\r\n\n {"prompt":"a","max_tokens":1}\t\r\n\n'
    assert len(invoke(server, body)) == 1
    assert invoke(server, b"") == []
    assert invoke(server, b" \n\n") == []


def test_answers_keep_the_order_of_the_lines_whichever_is_done_first(server: Server) -> None:
    lines = [{"prompt": f"{n:02d} wait={40 - n} ", "max_tokens": 2} for n in range(40)]
    found = invoke(server, *lines)
    assert [line["choices"][0]["text"] for line in found] == [f"{n:02d}" for n in range(40)]


def test_lines_run_together_up_to_the_engine_s_bound(server: Server) -> None:
    seen: list[float] = []
    body = b"\n".join([json.dumps({"prompt": "x wait=100 ", "max_tokens": 5}).encode()] * 24)
    with server.connect() as client:
        client.sendall(post("/invocations", body, "Content-Type: application/jsonlines", "Connection: close"))
        for _ in range(40):
            seen.append(server.engine["running"])
            time.sleep(0.02)
        client.settimeout(30)
        read_all(client)
    assert 1 < max(seen) <= 8  # what the fake engine says it runs at once


def test_a_client_that_leaves_ends_all_of_its_lines(server: Server) -> None:
    before = server.engine["adds"]
    cancelled = server.metric("strongroom_requests_cancelled_total")
    body = b"\n".join([json.dumps({"prompt": "x wait=200 ", "max_tokens": 200}).encode()] * 4)
    with server.connect() as client:
        client.sendall(post("/invocations", body, "Content-Type: application/jsonlines"))
        wait_until(lambda: server.engine["adds"] == before + 4)
    wait_until(lambda: server.engine["running"] == 0)
    wait_until(lambda: server.metric("strongroom_requests_cancelled_total") == cancelled + 4)


def test_a_line_waits_while_the_engine_is_full(server: Server) -> None:
    full = {"prompt": "full=1 ", "max_tokens": 2}
    with server.connect() as client:
        client.settimeout(2.5)
        body = json.dumps(full).encode()
        client.sendall(post("/invocations", body, "Content-Type: application/jsonlines"))
        adds = server.engine["adds"]
        wait_until(lambda: server.engine["adds"] >= adds + 2)  # it is tried again, not answered
        with pytest.raises(TimeoutError):
            while client.recv(65536).count(b"error") == 0:
                continue


def test_only_invocations_takes_lines(server: Server) -> None:
    for path in ("/v1/completions", "/generate", "/tokenize"):
        status, _, _ = server.request("POST", path, b'{"prompt":"a"}', LINES)
        assert status == 415
    status, _, _ = server.request(
        "POST", "/invocations", b'{"prompt":"a"}', {"Content-Type": "application/x-ndjson; charset=utf-8"}
    )
    assert status == 200


# The order of things, without a server


def exchange() -> Exchange:
    body: Any = None
    return Exchange("POST", body, Lifetime(), lambda: False)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\nb\n", [b"a", b"b"]),
        (b"\n\na\r\n \t\nb", [b"a", b"b"]),
        (b"a\x0bb\x85\nc", [b"a\x0bb\x85", b"c"]),
    ],
)
def test_only_a_line_feed_ends_a_line(body: bytes, expected: list[bytes]) -> None:
    assert list(split(body)) == expected
    assert count(body) == len(expected)


def test_a_drain_breaks_the_body_off_so_that_it_is_sent_again() -> None:
    def draining(line: bytes, _: Exchange) -> bytes:
        if line == b"b":
            raise ApiError(Code.DRAINING)
        return line

    lines = Lines(draining, b"a\nb\nc", exchange(), 8, 5)
    chunks = iter(lines)
    assert next(chunks) == b"a\n"
    with pytest.raises(StreamBroken):
        next(chunks)
    lines.close()


def test_the_end_of_the_exchange_reaches_every_line() -> None:
    ended: list[End | None] = []

    def waits(_: bytes, part: Exchange) -> bytes:
        left = gevent.event.Event()
        part.lifetime.on_end(left.set)
        left.wait(5)
        ended.append(part.lifetime.reason)
        raise ClientLeft

    outer = exchange()
    lines = Lines(waits, b"a\nb\nc", outer, 2, 5)
    gevent.spawn_later(0.05, outer.lifetime.end, End.CLIENT_LEFT)
    with pytest.raises(ClientLeft):
        list(lines)
    lines.close()
    assert ended == [End.CLIENT_LEFT, End.CLIENT_LEFT]


def test_what_passes_is_tried_again_until_the_line_s_time_is_over() -> None:
    tries: list[bytes] = []

    def overloaded(line: bytes, _: Exchange) -> bytes:
        tries.append(line)
        raise ApiError(Code.OVERLOADED if len(tries) < 3 else Code.ENGINE_DOWN)

    (answer,) = Lines(overloaded, b"a", exchange(), 1, 1.6)
    assert json.loads(answer)["error"]["code"] == "engine_down"
    assert len(tries) in (3, 4)


def test_a_fault_of_ours_is_one_line_s_error() -> None:
    def fails(line: bytes, _: Exchange) -> bytes:
        if line == b"a":
            raise KeyError("secret")
        return b"{}"

    first, second = Lines(fails, b"a\nb", exchange(), 1, 5)
    assert json.loads(first)["error"]["code"] == "internal" and b"secret" not in first
    assert second == b"{}\n"


@pytest.fixture
def metering(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, STRONGROOM_METERING="inference", STRONGROOM_WORKERS="1") as running:
        yield running


def header_of(server: Server, body: Any, path: str = "/invocations", **headers: str) -> Any:
    _, got, _ = server.request("POST", path, body, headers)
    text = got["X-Amzn-Inference-Metering"]
    return None if text is None else json.loads(text)


def test_metering_counts_requests_prompts_and_lines_and_only_what_succeeds(metering: Server) -> None:
    def unit(units: int) -> dict[str, Any]:
        return {"Dimension": "inference.count", "ConsumedUnits": units}

    assert header_of(metering, {"prompt": "ab", "max_tokens": 2}) == unit(1)
    assert header_of(metering, {"prompt": ["ab", "cd"], "max_tokens": 2}) == unit(2)
    assert header_of(metering, {"prompt": "ab", "max_tokens": 2, "stream": True}) == unit(1)
    lines = b'{"prompt":"a","max_tokens":1}\n\n{\n'
    assert header_of(metering, lines, **LINES) == unit(2)
    assert header_of(metering, {"prompt": 3}) is None
    assert header_of(metering, {"prompt": "ab", "max_tokens": 2}, "/v1/completions") is None
    assert header_of(metering, b"\n", **LINES) is None
    assert metering.metric("strongroom_metered_units_total") == 6


def test_nothing_is_metered_unless_asked_for(server: Server) -> None:
    assert header_of(server, {"prompt": "ab", "max_tokens": 2}) is None


def test_the_metering_header_leads_a_stream_that_is_not_finished(metering: Server) -> None:
    body = json.dumps({"prompt": "ab wait=300 ", "max_tokens": 4, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", metering.port), timeout=5) as client:
        client.sendall(post("/invocations", body))
        first = client.recv(4096)
        assert b"X-Amzn-Inference-Metering" in first and b"[DONE]" not in first
