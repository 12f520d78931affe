"""`InvokeEndpointWithResponseStream` with an unmodified boto3 client: timing, cuts, failures."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from botocore.eventstream import EventStreamBuffer
from botocore.exceptions import ClientError, EventStreamError

from infra.emulator import Limits
from tests.infra.calls import AUTHORIZATION, raw_request
from tests.infra.conftest import ENDPOINT, Bench
from tests.infra.scripted import Received, chunk, cut, head, reply, reset, stall, stream, wait_until

Start = Callable[..., Bench]
STREAM_PATH = f"/endpoints/{ENDPOINT}/invocations-response-stream"
SPLITS = ["none", "bytes=1", "bytes=7", "random:1", "random:42"]
EVENTS = [
    b'data: {"token": {"text": "' + text.encode() + b'"}}\n\n'
    for text in ("Paris", " ist", " schön", " ☂", " 🗼", " ja", ".")
]


def parts_of(bench: Bench, body: bytes = b"{}", **extra: Any) -> Iterator[bytes]:
    answer = bench.client.invoke_endpoint_with_response_stream(EndpointName=ENDPOINT, Body=body, **extra)
    with contextlib.closing(answer["Body"]) as events:
        for event in events:
            yield event["PayloadPart"]["Bytes"]


def error_code(bench: Bench) -> str:
    """Return the `ErrorCode` that ends another stream of the bench: boto3 shows only the exception's type."""
    buffer = EventStreamBuffer()
    connection = http.client.HTTPConnection("127.0.0.1", bench.emulator.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", STREAM_PATH, b"{}", {"Authorization": AUTHORIZATION})
        buffer.add_data(connection.getresponse().read())  # reads up to the last chunk, or raises
    code: str = json.loads(list(buffer)[-1].payload)["ErrorCode"]
    return code


def test_a_stream_arrives_with_its_types_and_part_by_flush(bench: Start) -> None:
    here = bench(stream(EVENTS, gap_s=0.01))
    answer = here.client.invoke_endpoint_with_response_stream(
        EndpointName=ENDPOINT, Body=b"{}", ContentType="application/json", Accept="text/event-stream"
    )
    assert answer["ContentType"] == "text/event-stream"
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    assert [event["PayloadPart"]["Bytes"] for event in answer["Body"]] == EVENTS
    (request,) = here.container.requests
    assert request.path == "/invocations"
    assert request.headers["accept"] == "text/event-stream"
    assert "x-amzn-sagemaker-accept" not in request.headers


@pytest.mark.parametrize("split", SPLITS)
def test_events_50_ms_apart_arrive_50_ms_apart_and_whole(bench: Start, split: str) -> None:
    sent: list[float] = []
    here = bench(stream(EVENTS, gap_s=0.05, sent=sent), split=split)
    arrived = b""
    ends_s: list[float] = []  # when the last byte of each event was here
    borders = [sum(map(len, EVENTS[: count + 1])) for count in range(len(EVENTS))]
    parts = 0
    for part in parts_of(here):
        arrived += part
        parts += 1
        while len(ends_s) < len(borders) and len(arrived) >= borders[len(ends_s)]:
            ends_s.append(time.monotonic())
    assert arrived == b"".join(EVENTS)
    assert parts == len(EVENTS) if split == "none" else parts > len(EVENTS)
    # Measured against the container's own times, so that a busy machine delays both alike. Scheduling may
    # still hold one event up; what the emulator must never do is gather them.
    late_s = sorted(there - here_s for there, here_s in zip(ends_s, sent, strict=True))
    assert late_s[len(late_s) // 2] < 0.02
    gaps_s = sorted(later - earlier for earlier, later in pairwise(ends_s))
    assert gaps_s[1] > 0.02, "more than one event came together with the one before it"


@pytest.mark.parametrize("split", SPLITS)
def test_readers_that_split_lines_again_see_every_event(bench: Start, split: str) -> None:
    """The two ways in which client libraries read: decode bit by bit, or gather bytes up to a newline."""
    here = bench(stream(EVENTS), split=split)
    wanted = [json.loads(event[6:])["token"]["text"] for event in EVENTS]

    buffer = b""
    by_line: list[str] = []
    for part in parts_of(here):
        buffer += part
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            if line.startswith(b"data: "):
                by_line.append(json.loads(line[6:])["token"]["text"])
    assert by_line == wanted

    decoder = codecs.getincrementaldecoder("utf-8")()
    text = "".join(decoder.decode(part) for part in parts_of(here)) + decoder.decode(b"", final=True)
    assert [json.loads(event[6:])["token"]["text"] for event in text.split("\n\n") if event] == wanted


@pytest.mark.parametrize("ending", [cut, reset])
def test_a_stream_cut_after_two_events_gives_two_parts_then_stream_broken(bench: Start, ending: Any) -> None:
    here = bench(stream(EVENTS[:2], ending=ending))
    seen: list[bytes] = []
    with pytest.raises(EventStreamError) as caught:
        for part in parts_of(here):
            seen.append(part)
    assert seen == EVENTS[:2]
    error = caught.value.response["Error"]
    assert error["Code"] == "ModelStreamError"
    assert error_code(here) == "StreamBroken"
    wait_until(lambda: bool(here.emulator.journal()))
    assert {entry["outcome"] for entry in here.emulator.journal()} == {"broken"}


def test_a_short_body_of_known_length_is_stream_broken(bench: Start) -> None:
    def short(request: Received, connection: socket.socket) -> None:
        connection.sendall(head(200, "Content-Length: 10") + b"four")

    seen: list[bytes] = []
    with pytest.raises(EventStreamError, match="ModelStreamError"):
        for part in parts_of(bench(short)):
            seen.append(part)
    assert seen == [b"four"]


def test_a_garbled_chunk_is_stream_broken(bench: Start) -> None:
    def garble(request: Received, connection: socket.socket) -> None:
        connection.sendall(b"not a chunk size\r\n")

    with pytest.raises(EventStreamError, match="ModelStreamError"):
        list(parts_of(bench(stream(EVENTS[:1], ending=garble))))


def test_a_stalled_stream_exceeds_its_time_by_the_clock_of_the_test(bench: Start) -> None:
    now_s = [0.0]

    def stalling(request: Received, connection: socket.socket) -> None:
        now_s[0] += 479.0
        time.sleep(0.3)
        now_s[0] += 2.0
        stall(request, connection)

    here = bench(stream(EVENTS[:2], ending=stalling), clock=lambda: now_s[0])
    seen: list[bytes] = []
    start_s = time.monotonic()
    with pytest.raises(EventStreamError) as caught:
        for part in parts_of(here):
            seen.append(part)
    assert 0.3 <= time.monotonic() - start_s < 3.0
    assert seen == EVENTS[:2]
    assert caught.value.response["Error"]["Code"] == "ModelStreamError"
    assert error_code(here) == "ModelInvocationTimeExceeded"


def test_a_stream_that_never_ends_is_ended_at_the_total_time(bench: Start) -> None:
    here = bench(stream([b"x"] * 100, gap_s=0.05), limits=Limits(stream_s=0.5))
    seen: list[bytes] = []
    with pytest.raises(EventStreamError, match="timed out"):
        for part in parts_of(here):
            seen.append(part)
    assert 2 <= len(seen) <= 12


@pytest.mark.parametrize("status", [400, 429, 503])
def test_a_status_before_the_first_byte_is_a_424_and_no_event(bench: Start, status: int) -> None:
    here = bench(reply(b"overloaded", status))
    with pytest.raises(here.client.exceptions.ModelError) as caught:
        list(parts_of(here))
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert caught.value.response["OriginalStatusCode"] == status
    assert caught.value.response["OriginalMessage"] == "overloaded"


@pytest.mark.parametrize("script", [cut, reset])
def test_a_container_that_leaves_before_the_first_byte_is_a_424(bench: Start, script: Any) -> None:
    with pytest.raises(ClientError) as caught:
        list(parts_of(bench(script)))
    assert caught.value.response["OriginalStatusCode"] == 0


def test_an_unknown_endpoint_is_a_validation_error(bench: Start) -> None:
    here = bench(reply())
    with pytest.raises(ClientError) as caught:
        here.client.invoke_endpoint_with_response_stream(EndpointName="nowhere", Body=b"{}")
    assert caught.value.response["Error"]["Code"] == "ValidationError"


def test_a_plain_answer_is_a_stream_of_its_own(bench: Start) -> None:
    body = b"x" * 200_000
    assert b"".join(parts_of(bench(reply(body)))) == body


def test_a_body_without_framing_streams_until_the_connection_ends(bench: Start) -> None:
    def unframed(request: Received, connection: socket.socket) -> None:
        connection.sendall(head(200, "Content-Type: text/plain") + b"all of it")

    assert b"".join(parts_of(bench(unframed))) == b"all of it"


def test_a_stream_may_be_longer_than_the_body_limit(bench: Start) -> None:
    here = bench(stream([b"x" * 1000] * 20), limits=Limits(body_bytes=1000))
    assert len(b"".join(parts_of(here))) == 20_000


def test_a_client_that_leaves_a_stream_is_noticed_by_the_container_within_a_second(bench: Start) -> None:
    left_s: list[float] = []

    def watched(request: Received, connection: socket.socket) -> None:
        stall(request, connection)
        left_s.append(time.monotonic())

    here = bench(stream(EVENTS[:1], ending=watched))
    answer = here.client.invoke_endpoint_with_response_stream(EndpointName=ENDPOINT, Body=b"{}")
    assert next(iter(answer["Body"]))["PayloadPart"]["Bytes"] == EVENTS[0]
    start_s = time.monotonic()
    answer["Body"].close()
    wait_until(lambda: bool(left_s))
    assert left_s[0] - start_s < 1.0


def test_a_client_that_has_sent_its_next_request_is_not_taken_for_gone(bench: Start) -> None:
    here = bench(stream(EVENTS[:2], gap_s=0.2))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(path=STREAM_PATH) * 2)
        data = b""
        while data.count(b"\r\n0\r\n\r\n") < 2:
            more = raw.recv(65536)
            assert more, "the connection ended early"
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 2
    wait_until(lambda: len(here.emulator.journal()) == 2)


def test_strict_verifies_the_stream_call_too(bench: Start) -> None:
    here = bench(stream(EVENTS), strict=True)
    assert b"".join(parts_of(here)) == b"".join(EVENTS)
    here.client.meta.events.register(
        "before-send.sagemaker-runtime", lambda request, **_: setattr(request, "body", b"[]")
    )
    with pytest.raises(ClientError, match="InvalidSignatureException"):
        list(parts_of(here, b"{}"))


def test_a_client_that_does_not_read_is_given_up_and_the_container_told(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.emulator.caller.IDLE_S", 0.3)
    broken: list[bool] = []

    def endless(request: Received, connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(chunk(b"x" * 65536))
        except OSError:
            broken.append(True)

    here = bench(stream([b"x"], ending=endless))
    with socket.create_connection(("127.0.0.1", here.emulator.port)) as raw:
        raw.sendall(raw_request(path=STREAM_PATH))
        wait_until(lambda: bool(broken) and bool(here.emulator.journal()))
    assert here.emulator.journal()[0]["outcome"] == "client_gone"


def test_a_stalled_container_holds_up_no_other_stream(bench: Start) -> None:
    def script(request: Received, connection: socket.socket) -> None:
        stream(EVENTS, ending=stall if request.body == b"stall" else None)(request, connection)

    here = bench(script)
    answers = [
        here.client.invoke_endpoint_with_response_stream(EndpointName=ENDPOINT, Body=b"stall")
        for _ in range(8)
    ]
    start_s = time.monotonic()
    assert b"".join(parts_of(here)) == b"".join(EVENTS)
    assert time.monotonic() - start_s < 1.0
    for answer in answers:
        answer["Body"].close()


def test_a_platform_that_fails_after_some_parts_says_so_in_the_stream(bench: Start) -> None:
    here = bench(stream([b"one", b"two", b"three"]), fail_after_parts=2)
    found = parts_of(here)
    assert [next(found), next(found)] == [b"one", b"two"]
    with pytest.raises(EventStreamError) as caught:
        next(found)
    assert caught.value.response["Error"]["Code"] == "InternalStreamFailure"
    assert here.emulator.journal()[-1]["outcome"] == "platform_failed"
