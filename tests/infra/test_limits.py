"""Sizes: the body limit to the byte, and memory that stays flat whatever a client sends."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from infra.emulator import Emulator, Limits
from tests.infra.calls import AUTHORIZATION, raw_request
from tests.infra.conftest import ENDPOINT, Bench
from tests.infra.scripted import reply, wait_until

Start = Callable[..., Bench]
LIMIT_BYTES = 6_291_456
PATHS = ["invocations", "invocations-response-stream"]
MEMORY_BYTES = 24 * 1024 * 1024  # of growth allowed: a few bodies at the limit and the allocator's slack


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not tell the memory in use")


def chunked_status(bench: Bench, pieces: Iterator[bytes], path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", bench.emulator.port, timeout=10)
    try:
        url = f"/endpoints/{ENDPOINT}/{path}"
        headers = {"Authorization": AUTHORIZATION, "Transfer-Encoding": "chunked"}
        connection.request("POST", url, pieces, headers, encode_chunked=True)
        return connection.getresponse().status
    finally:
        connection.close()


def pieces_of(total_bytes: int) -> Iterator[bytes]:
    piece = b"x" * 65536
    for _ in range(total_bytes // len(piece)):
        yield piece
    if total_bytes % len(piece):
        yield piece[: total_bytes % len(piece)]


def operation(bench: Bench, path: str) -> Any:
    if path == "invocations":
        return bench.client.invoke_endpoint
    return bench.client.invoke_endpoint_with_response_stream


@pytest.mark.parametrize("path", PATHS)
def test_a_body_at_the_limit_passes_and_one_byte_more_is_a_413(bench: Start, path: str) -> None:
    here = bench(reply(b"{}"))
    call = operation(here, path)
    answer = call(EndpointName=ENDPOINT, Body=b"x" * LIMIT_BYTES)["Body"]
    assert answer.read() == b"{}" if path == "invocations" else len(list(answer)) == 1
    with pytest.raises(ClientError) as caught:
        call(EndpointName=ENDPOINT, Body=b"x" * (LIMIT_BYTES + 1))
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert caught.value.response["Error"]["Code"] == "413"
    assert str(LIMIT_BYTES) in caught.value.response["Error"]["Message"]
    assert [len(request.body) for request in here.container.requests] == [LIMIT_BYTES]


@pytest.mark.parametrize("path", PATHS)
def test_the_limit_holds_for_chunked_bodies_too(bench: Start, path: str) -> None:
    here = bench(reply(b"{}"))
    assert chunked_status(here, pieces_of(LIMIT_BYTES), path) == 200
    assert chunked_status(here, pieces_of(LIMIT_BYTES + 1), path) == 413
    assert [len(request.body) for request in here.container.requests] == [LIMIT_BYTES]


def test_memory_stays_flat_under_oversized_bodies(bench: Start) -> None:
    here = bench(reply(b"{}"))
    assert chunked_status(here, pieces_of(LIMIT_BYTES), "invocations") == 200  # warm up
    before = resident_bytes()
    peaks: list[int] = []

    def send(announced: bool) -> None:
        framing = f"Content-Length: {200 * 1024 * 1024}" if announced else "Transfer-Encoding: chunked"
        with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
            raw.sendall(raw_request(b"", framing))
            piece = b"x" * 65536 if announced else b"10000\r\n" + b"x" * 65536 + b"\r\n"
            for _ in range(400):  # 25 MiB, four times the limit
                raw.sendall(piece)
            raw.shutdown(socket.SHUT_WR)
            peaks.append(resident_bytes())
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")

    for announced in (True, False, True, False):
        send(announced)
    assert max(peaks) - before < MEMORY_BYTES
    assert here.container.requests and len(here.container.requests) == 1


def test_a_body_above_the_limit_is_refused_before_it_is_sent(bench: Start) -> None:
    here = bench(reply(b"{}"))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"", f"Content-Length: {LIMIT_BYTES + 1}"))
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"", "Transfer-Encoding: chunked") + b"fffffff\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"-1\r\n", b"2\r\nabc\r\n0\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 100 + b"\r\n", b"1" * 2000],
)
def test_a_chunked_body_that_is_malformed_is_refused(bench: Start, body: bytes) -> None:
    here = bench(reply(b"{}"))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"", "Transfer-Encoding: chunked") + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    assert here.container.requests == []


def test_a_body_that_does_not_arrive_is_a_408(bench: Start) -> None:
    here = bench(reply(b"{}"), limits=Limits(response_s=0.2))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"ab", "Content-Length: 3"))
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")
    assert here.container.requests == []


def test_a_client_that_leaves_while_sending_reaches_no_container(bench: Start) -> None:
    here = bench(reply(b"{}"))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"ab", "Content-Length: 3"))
    wait_until(lambda: bool(here.emulator.journal()))
    assert here.emulator.journal()[0]["outcome"] == "client_gone"
    assert here.container.requests == []


def test_an_emulator_leaves_no_thread_and_no_port_behind(bench: Start) -> None:
    before = threading.active_count()
    emulator = Emulator("127.0.0.1:1", "demo")
    idle = socket.create_connection(("127.0.0.1", emulator.port))
    wait_until(lambda: threading.active_count() == before + 2)
    emulator.close()
    assert threading.active_count() == before
    with idle, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", emulator.port), timeout=1)


def test_the_emulator_listens_on_the_loopback_address_only(bench: Start) -> None:
    here = bench(reply(b"{}"))
    assert here.emulator.url == f"http://127.0.0.1:{here.emulator.port}"
    listening = [
        line.split()[1].split(":")
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    addresses = {address for address, port in listening if int(port, 16) == here.emulator.port}
    assert addresses == {"0100007F"}


@pytest.mark.parametrize(
    ("upstream", "endpoint"),
    [("nohost", "demo"), (":1", "demo"), ("h:0", "demo"), ("h:70000", "demo"), ("h:x", "demo")]
    + [("unix:", "demo"), ("unix:run/s", "demo"), ("/run/s", "demo")]
    + [("h:1", name) for name in ("", "-a", "a-", "a_b", "x" * 64, "a/b")],
)
def test_malformed_upstreams_and_names_are_refused(upstream: str, endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"must be HOST:PORT|a name has"):
        Emulator(upstream, endpoint)
