"""Who is let in: signatures, routes, headers, names, and how many at once."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.infra.calls import answer_to, invoke, raw_request, refused
from tests.infra.conftest import ENDPOINT, Bench, closing_client
from tests.infra.scripted import Received, ScriptedContainer, head, reply, wait_until

Start = Callable[..., Bench]


def test_a_request_without_signature_is_refused(bench: Start) -> None:
    here = bench(reply())
    lines = f"POST /endpoints/{ENDPOINT}/invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    status, document = answer_to(here, lines.encode())
    assert (status, document["Message"]) == (403, "Missing Authentication Token")
    garbled = lines.replace("Host: x", "Host: x\r\nAuthorization: Basic abc")
    assert answer_to(here, garbled.encode())[0] == 403
    assert here.container.requests == []
    wait_until(lambda: len(here.emulator.journal()) == 2)
    assert [entry["outcome"] for entry in here.emulator.journal()] == [
        "MissingAuthenticationTokenException",
        "IncompleteSignatureException",
    ]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /endpoints/demo/other HTTP/1.1", 404),
        ("GET /endpoints/demo/invocations HTTP/1.1", 405),
        ("PUT /endpoints/demo/invocations HTTP/1.1", 501),
        ("POST /endpoints/demo/invocations HTTP/1.0", 505),
        ("GET /_local/secrets HTTP/1.1", 404),
        ("NONSENSE", 400),
        (f"POST /endpoints/{'x' * 70} HTTP/1.1", 404),
    ],
)
def test_other_requests_are_refused_without_an_echo(bench: Start, request_line: str, status: int) -> None:
    got, document = answer_to(bench(reply()), f"{request_line}\r\nHost: x\r\n\r\n".encode())
    assert got == status
    assert "demo" not in json.dumps(document)
    assert "NONSENSE" not in json.dumps(document)


@pytest.mark.parametrize(
    "extra",
    [
        ("Content-Length: 2", "Content-Length: 3"),
        ("Content-Length: -1",),
        ("Content-Length: 2", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip",),
    ],
)
def test_a_body_of_unclear_length_is_refused(bench: Start, extra: tuple[str, ...]) -> None:
    here = bench(reply())
    assert answer_to(here, raw_request(b"{}", *extra))[0] == 400
    assert here.container.requests == []


def test_a_folded_header_reaches_no_container(bench: Start) -> None:
    here = bench(reply())
    extra = ("Content-Length: 2", "X-Amzn-SageMaker-Custom-Attributes: a\r\n X-Injected: b")
    status, _ = answer_to(here, raw_request(b"{}", *extra))
    assert status == 400
    assert here.container.requests == []


def test_expect_100_continue_is_answered_only_for_a_good_request(bench: Start) -> None:
    here = bench(reply(b"{}"))
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"", "Content-Length: 2", "Expect: 100-continue"))
        assert raw.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(b"{}")
        assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
    with socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as raw:
        raw.sendall(raw_request(b"", "Content-Length: 99999999", "Expect: 100-continue"))
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_two_endpoints_and_two_components_answer_64_clients_without_crosstalk(bench: Start) -> None:
    def named(name: bytes) -> Any:
        def script(request: Received, connection: socket.socket) -> None:
            time.sleep(0.02)
            component = request.headers.get("x-amzn-sagemaker-inference-component", "-").encode()
            body = b"|".join((name, component, request.body))
            connection.sendall(head(200, f"Content-Length: {len(body)}") + body)

        return script

    here = bench(named(b"first"))
    with (
        ScriptedContainer(named(b"second")) as second,
        ScriptedContainer(named(b"left")) as left,
        ScriptedContainer(named(b"right")) as right,
    ):
        parts = {"left": left.address, "right": right.address}
        here.emulator.add("second", second.address)
        here.emulator.add("pair", here.container.address, parts)
        targets = [(ENDPOINT, None, b"first"), ("second", None, b"second")]
        targets += [("pair", "left", b"left"), ("pair", "right", b"right")]

        def call(number: int) -> tuple[bytes, bytes]:
            endpoint, component, name = targets[number % 4]
            extra = {"InferenceComponentName": component} if component else {}
            body = b"%d:" % number * (number % 7 + 1)
            with here.client.invoke_endpoint(EndpointName=endpoint, Body=body, **extra)["Body"] as answer:
                got = answer.read()
            return got, b"|".join((name, (component or "-").encode(), body))

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            results = list(pool.map(call, range(256)))
    assert [got for got, _ in results] == [wanted for _, wanted in results]


def test_a_component_must_be_named_and_known(bench: Start) -> None:
    here = bench(reply(), components={"left": "127.0.0.1:1"})
    assert "required" in refused(here)["Error"]["Message"]
    assert "not found" in refused(here, InferenceComponentName="right")["Error"]["Message"]


def test_beyond_the_bound_a_connection_gets_503(bench: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.emulator.server.CONNECTIONS", 2)
    here = bench(reply())
    with (
        socket.create_connection(("127.0.0.1", here.emulator.port)),
        socket.create_connection(("127.0.0.1", here.emulator.port)),
    ):
        assert refused(here)["Error"]["Code"] == "ServiceUnavailable"
    wait_until(lambda: answer_to(here, raw_request(b"{}"))[0] == 200)


def test_strict_accepts_the_local_keys_and_no_others(bench: Start) -> None:
    here = bench(reply(b"{}"), strict=True)
    assert invoke(here, b"x" * 1000, CustomAttributes="a   b  c")["Body"].read() == b"{}"
    with closing_client(here.emulator, aws_secret_access_key="other") as wrong:
        error = refused(Bench(here.container, here.emulator, wrong))
        assert error["Error"]["Code"] == "InvalidSignatureException"
    with closing_client(here.emulator, aws_access_key_id="other") as wrong:
        error = refused(Bench(here.container, here.emulator, wrong))
        assert error["Error"]["Code"] == "UnrecognizedClientException"
    assert answer_to(here, raw_request())[0] == 403
    assert len(here.container.requests) == 1


def test_without_strict_any_keys_will_do(bench: Start) -> None:
    here = bench(reply(b"{}"))
    with closing_client(here.emulator, aws_secret_access_key="other", aws_access_key_id="any") as client:
        assert client.invoke_endpoint(EndpointName=ENDPOINT, Body=b"{}")["Body"].read() == b"{}"


def test_strict_refuses_a_changed_body_and_an_old_signature(bench: Start) -> None:
    here = bench(reply(b"{}"), strict=True)
    here.client.meta.events.register(
        "before-send.sagemaker-runtime", lambda request, **_: setattr(request, "body", b'{"a": 2}')
    )
    assert refused(here, b'{"a": 1}')["Error"]["Code"] == "InvalidSignatureException"
    late = bench(reply(b"{}"), strict=True, wall_clock=lambda: time.time() + 301)
    assert refused(late)["Error"]["Code"] == "InvalidSignatureException"


def test_a_refused_caller_still_sending_can_read_its_503(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.emulator.server.CONNECTIONS", 1)
    monkeypatch.setattr("infra.emulator.server.REFUSAL_S", 2.0)
    here = bench(reply())
    with (
        socket.create_connection(("127.0.0.1", here.emulator.port)),
        socket.create_connection(("127.0.0.1", here.emulator.port), timeout=10) as late,
    ):
        for _ in range(10):
            time.sleep(0.01)
            late.sendall(b"x" * 1000)
        assert late.recv(100).startswith(b"HTTP/1.1 503 ")
