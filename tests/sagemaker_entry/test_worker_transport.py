"""Attack rows A01 to A14 and A20 to A30 on the real stack, byte for byte."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.sagemaker_entry.harness import Server, post, status_of, wait_until

CRLF = b"\r\n"
GENERATE = json.dumps({"inputs": "abc", "parameters": {"max_new_tokens": 3}}).encode()


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + end


def with_header(*lines: bytes) -> bytes:
    head = [b"POST /invocations HTTP/1.1", b"Host: x", b"Connection: close", *lines]
    return CRLF.join(head) + CRLF + CRLF


def framed(value: bytes, body: bytes = b"") -> bytes:
    return with_header(b"Content-Type: application/json", b"Transfer-Encoding: " + value) + body


def get(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *lines, "", ""]).encode(
        "latin-1"
    )


SMUGGLED = b"0\r\n\r\nGET /info HTTP/1.1\r\nHost: x\r\n\r\n"
ROWS: list[tuple[str, bytes, set[int]]] = [
    (
        "A01 both lengths",
        with_header(b"Content-Length: 6", b"Transfer-Encoding: chunked") + SMUGGLED,
        {400},
    ),
    ("A02 xchunked", framed(b"xchunked", b"{}"), {501}),
    ("A03 chunked, identity", framed(b"chunked, identity", SMUGGLED), {400}),
    ("A03 vertical tab", framed(b"\x0bchunked", SMUGGLED), {400}),
    ("A03 space before colon", with_header(b"Transfer-Encoding : chunked") + SMUGGLED, {400}),
    ("A03 two codings", with_header(*[b"Transfer-Encoding: chunked"] * 2) + SMUGGLED, {400}),
    ("A04 two lengths", with_header(b"Content-Length: 2", b"Content-Length: 3") + b"{} ", {400}),
    ("A04 same length twice", with_header(b"Content-Length: 2", b"Content-Length: 2") + b"{}", {400}),
    ("A04 list", with_header(b"Content-Length: 2, 2") + b"{}", {400}),
    ("A04 plus", with_header(b"Content-Length: +2") + b"{}", {400}),
    ("A04 negative", with_header(b"Content-Length: -1") + b"{}", {400}),
    ("A04 hexadecimal", with_header(b"Content-Length: 0x2") + b"{}", {400}),
    ("A04 4300 digits", with_header(b"Content-Length: " + b"1" * 4300) + b"{}", {400, 413, 431}),
    ("A05 negative chunk", framed(b"chunked", b"-2\r\n{}\r\n0\r\n\r\n"), {400}),
    ("A05 0x chunk", framed(b"chunked", b"0x2\r\n{}\r\n0\r\n\r\n"), {400}),
    ("A05 line feed in extension", framed(b"chunked", b"2;\n{}\r\n0\r\n\r\n"), {400}),
    ("A05 data not ended", framed(b"chunked", b"2\r\n{}xx0\r\n\r\n"), {400}),
    ("A06 long extension", framed(b"chunked", b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n"), {400}),
    ("A07 huge chunk", framed(b"chunked", b"ffffffffffffffffff\r\n{}"), {413}),
    (
        "A08 1000 trailers",
        framed(b"chunked", chunked(b"{}", end=b"0\r\n" + b"X-i: y\r\n" * 1000 + CRLF)),
        {431},
    ),
    (
        "A10 declared too large",
        with_header(b"Content-Type: application/json", b"Content-Length: 104857600") + b"{}",
        {413},
    ),
    ("A12 large header", with_header(b"X-A: " + b"a" * 20_000), {431}),
    ("A12 200 headers", with_header(*[b"X-i: y"] * 200), {431}),
    ("A12 64 KiB of headers", with_header(*[b"X-%d: " % i + b"y" * 7000 for i in range(11)]), {431}),
    ("A12 long query", get("/ping?" + "q" * 8000), {400, 431}),
    ("A12 empty name", with_header(b": value"), {400, 431}),
    ("A13 fold", with_header(b"X-A: a", b" b"), {400}),
    ("A13 NUL", with_header(b"X-A: a\x00b"), {400}),
    ("A13 bare CR", with_header(b"X-A: a\rb"), {400}),
    ("A14 line feeds only", b"GET /ping HTTP/1.1\nHost: x\n\n", {400}),
    ("A14 TLS", bytes([22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]) + bytes(50), {400}),
    ("A14 a lone CR", b"GET /ping HTTP/1.1\rHost: x\r\r", {400}),
    ("A14 binary", bytes(range(256)) * 4, {400}),
    ("A21 no Host", b"GET /ping HTTP/1.1\r\n\r\n", {400}),
    ("A21 two Hosts", b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", {400}),
    ("A21 absolute form", b"GET http://evil/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {200}),
    ("A22 HTTP/0.9", b"GET /ping\r\n\r\n", {400}),
    ("A22 HTTP/9.9", b"GET /ping HTTP/9.9\r\nHost: x\r\n\r\n", {400}),
    ("A22 h2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    ("A22 lower case", b"post /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", {400}),
    ("A22 TRACE", b"TRACE /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {405}),
    ("A22 CONNECT", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", {400, 404, 405}),
    ("A23 dots", get("/../../etc/passwd"), {404}),
    ("A23 encoded dots", get("/%2e%2e/%2e%2e/etc/passwd"), {404}),
    ("A23 two slashes", get("//ping"), {404}),
    ("A23 trailing slash", get("/ping/"), {404}),
    ("A23 upper case", get("/PING"), {404}),
    ("A23 NUL", get("/ping%00"), {404}),
    ("A24 unknown expectation", with_header(b"Expect: 200-ok", b"Content-Length: 2") + b"{}", {417}),
    (
        "A25 multipart",
        post("/invocations", b"--b\r\n" * 1000, "Content-Type: multipart/form-data; boundary=b"),
        {415},
    ),
    ("A26 text", post("/invocations", GENERATE, "Content-Type: text/plain"), {415}),
    ("A26 utf-16", post("/invocations", GENERATE, "Content-Type: application/json; charset=utf-16"), {415}),
    ("A26 twice", post("/invocations", GENERATE, *["Content-Type: application/json"] * 2), {415}),
    ("A26 utf-8", post("/invocations", GENERATE, "Content-Type: application/json; charset=utf-8"), {200}),
    ("A11 gzip", post("/invocations", GENERATE, "Content-Encoding: gzip"), {415}),
    ("A11 br", post("/invocations", GENERATE, "Content-Encoding: br"), {415}),
    (
        "A27 long attributes",
        post("/invocations", GENERATE, "X-Amzn-SageMaker-Custom-Attributes: " + "a" * 1025),
        {400},
    ),
    ("A27 not ASCII", post("/invocations", GENERATE, "X-Amzn-SageMaker-Custom-Attributes: \xe9"), {400}),
    ("A29 underscore", with_header(b"Content_Length: 9", b"Content-Length: 2") + b"{}", {400}),
    ("A29 SCRIPT_NAME", with_header(b"SCRIPT_NAME: /x", b"Content-Length: 2") + b"{}", {400}),
    ("A29 forwarded", get("/ping", "X-Forwarded-For: 1.2.3.4", "X-Tenant: other"), {200}),
    ("A30 GET with body", get("/ping", "Content-Length: 2") + b"{}", {200}),
    ("A30 OPTIONS", b"OPTIONS /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {405}),
    ("A30 empty POST", post("/invocations", b""), {400}),
    ("A30 wrong Accept", post("/invocations", GENERATE, "Accept: image/png"), {200}),
    ("control", post("/invocations", GENERATE), {200}),
    ("control chunked", framed(b"chunked", chunked(GENERATE[:5], GENERATE[5:])), {200}),
    ("control trailers", framed(b"chunked", chunked(GENERATE, end=b"0\r\nX-Sum: 1\r\n\r\n")), {200}),
]


@pytest.mark.parametrize(("data", "expected"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_hostile_bytes_get_the_designed_answer(server: Server, data: bytes, expected: set[int]) -> None:
    reply = server.raw(data)
    assert status_of(reply) in expected, reply[:200]
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"\r\nServer:" not in head
    assert b"nosniff" in head
    if status_of(reply) != 200:
        assert len(body) <= 4096
        assert json.loads(body)["error"]
        assert reply.count(b"HTTP/1.1 ") == 1, "something smuggled was answered"


def test_a_parser_error_closes_the_connection_and_the_server_goes_on(server: Server) -> None:
    for row, data, expected in ROWS[:12]:
        reply = server.raw(data + get("/info"))
        assert reply.count(b"HTTP/1.1 ") == 1, row
        assert status_of(reply) in expected
    assert server.ping() == 200


def test_a09_a_chunked_body_over_the_limit_is_refused_and_never_cut(server: Server) -> None:
    filler = b" " * 0x100000
    reply = server.raw(framed(b"chunked", chunked(GENERATE, *[filler] * 26)), 10)
    assert status_of(reply) == 413


def test_a10_a_body_really_sent_beyond_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    began = time.monotonic()
    head = with_header(b"Content-Type: application/json", b"Content-Length: 33554432")
    assert status_of(server.raw(head + b" " * 33554432, 10)) == 413
    assert time.monotonic() - began < 5


def test_a06_a_storm_of_tiny_chunks_is_refused_early(server: Server) -> None:
    began = time.monotonic()
    reply = server.raw(framed(b"chunked", chunked(*[b" "] * 200_000, GENERATE)), 10)
    assert status_of(reply) == 400
    assert time.monotonic() - began < 3


def test_a20_pipelined_requests_are_answered_in_order_and_a_bad_one_ends_the_connection(
    server: Server,
) -> None:
    one = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reply = server.raw(one + post("/invocations", GENERATE, close=False) + last)
    assert [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404]
    reply = server.raw(one + b"GET /ping HTTP/1.1\r\nHost : x\r\n\r\n" + one)
    assert [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]] == [200, 400]


def test_a24_a_client_that_waits_for_continue_gets_it_only_when_its_body_is_wanted(server: Server) -> None:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
    with server.connect() as client:
        client.settimeout(5)
        client.sendall(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(GENERATE))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(GENERATE)
        assert status_of(client.recv(10000)) == 200
    assert status_of(server.raw(head + b"Content-Type: text/plain\r\nContent-Length: 9\r\n\r\n")) == 415


def test_head_answers_without_a_body(server: Server) -> None:
    reply = server.raw(b"HEAD /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status_of(reply) == 200
    assert reply.endswith(b"\r\n\r\n")


def test_headers_and_body_leave_together(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(post("/invocations", GENERATE))
        head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert status_of(head) == 200
    assert body, "the client was woken for headers alone"


def test_a_large_body_below_the_limit_is_read_whole(server: Server) -> None:
    padded = GENERATE + b" " * (20 * 1024 * 1024)
    status, _, _ = server.request("POST", "/invocations", padded, {"Content-Type": "application/json"})
    assert status == 200


def test_a14_a_request_line_that_arrives_byte_by_byte_is_read(server: Server) -> None:
    with server.connect() as client:
        client.settimeout(5)
        for byte in b"GET /ping HTTP/1.1\r\n":
            client.sendall(bytes([byte]))
            time.sleep(0.005)
        client.sendall(b"Host: x\r\nX-A: \xc3\xa9\r\n\r\n")
        assert status_of(client.recv(1000)) == 200


def test_a14_bytes_that_are_no_request_are_refused_behind_a_good_one_too(server: Server) -> None:
    reply = server.raw(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03\x01\x02\x00")
    assert [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]] == [200, 400]


def test_many_large_bodies_at_once_are_refused_before_they_take_all_memory(tmp_path: Path) -> None:
    size = 20 * 1024 * 1024
    with Server(tmp_path, STRONGROOM_WORKERS="1") as server:
        clients = [server.connect() for _ in range(14)]
        replies: list[bytes] = []

        def send(client: socket.socket) -> None:
            with contextlib.suppress(OSError):  # refused while it still sends
                client.sendall(post("/invocations", b" " * (size - 1), f"Content-Length: {size}"))
            replies.append(client.recv(100) if client in readable([client]) else b"")

        def readable(sockets: list[socket.socket]) -> list[socket.socket]:
            return select.select(sockets, [], [], 0.5)[0]

        senders = [threading.Thread(target=send, args=(client,)) for client in clients]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert b"429" in b"".join(replies)
        assert server.ping() == 200
        for client in clients:
            client.close()
        large = GENERATE + b" " * (size - len(GENERATE))
        wait_until(lambda: status_of(server.raw(post("/invocations", large), 10)) == 200, 20, "room again")


def test_a_client_that_says_nothing_takes_no_place_and_is_served_when_it_speaks(server: Server) -> None:
    before = server.metric("strongroom_connections_open")
    with server.connect() as silent:
        time.sleep(0.3)
        assert server.metric("strongroom_connections_open") == before
        silent.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert silent.recv(65536).startswith(b"HTTP/1.1 200 ")
    with server.connect() as late:
        time.sleep(2.5)  # longer than it is kept from the workers
        late.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert late.recv(65536).startswith(b"HTTP/1.1 200 ")
