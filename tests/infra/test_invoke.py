"""`InvokeEndpoint` with an unmodified boto3 client against containers that behave and misbehave."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from infra.emulator import Limits
from tests.infra.conftest import ENDPOINT, Bench, closing_client
from tests.infra.scripted import (
    Received,
    ScriptedContainer,
    chunk,
    cut,
    head,
    reply,
    reset,
    short_body,
    stall,
    stream,
    wait_until,
)

Start = Callable[..., Bench]
SCOPE = "20260101/us-east-1/sagemaker/aws4_request"
AUTHORIZATION = f"AWS4-HMAC-SHA256 Credential=k/{SCOPE}, SignedHeaders=host, Signature={'0' * 64}"


def invoke(bench: Bench, body: bytes = b"{}", **extra: Any) -> Any:
    return bench.client.invoke_endpoint(EndpointName=ENDPOINT, Body=body, **extra)


def refused(bench: Bench, body: bytes = b"{}", **extra: Any) -> dict[str, Any]:
    with pytest.raises(ClientError) as caught:
        invoke(bench, body, **extra)
    response: dict[str, Any] = caught.value.response
    return response


def test_an_answer_comes_back_with_body_type_and_variant(bench: Start) -> None:
    here = bench(reply(b'{"text": "h\xc3\xa9"}'))
    answer = invoke(here, b'{"inputs": "x"}', ContentType="application/json")
    assert answer["Body"].read() == b'{"text": "h\xc3\xa9"}'
    assert answer["ContentType"] == "application/json"
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    assert answer["ResponseMetadata"]["RequestId"]
    (request,) = here.container.requests
    assert (request.path, request.body) == ("/invocations", b'{"inputs": "x"}')


def test_custom_attributes_come_back_only_when_the_container_echoes_them(bench: Start) -> None:
    def echo(request: Received, connection: socket.socket) -> None:
        value = request.headers["x-amzn-sagemaker-custom-attributes"]
        lines = [f"X-Amzn-SageMaker-Custom-Attributes: {value}"] if "echo" in value else []
        connection.sendall(head(200, *lines, "Content-Length: 2") + b"{}")

    here = bench(echo)
    assert invoke(here, CustomAttributes="trace=echo")["CustomAttributes"] == "trace=echo"
    assert "CustomAttributes" not in invoke(here, CustomAttributes="trace=1")


def test_session_headers_of_the_container_come_back(bench: Start) -> None:
    new = "X-Amzn-SageMaker-New-Session-Id: abc; Expires=2026-01-01T00:00:00Z"
    here = bench(reply(b"{}", 200, new, "X-Amzn-SageMaker-Closed-Session-Id: old", "X-Other: lost"))
    answer = invoke(here, SessionId="NEW_SESSION")
    assert answer["NewSessionId"] == "abc; Expires=2026-01-01T00:00:00Z"
    assert answer["ClosedSessionId"] == "old"
    assert "x-other" not in answer["ResponseMetadata"]["HTTPHeaders"]


def test_the_container_gets_the_headers_of_the_table_and_no_other(bench: Start) -> None:
    here = bench(reply())
    invoke(
        here,
        ContentType="application/json",
        Accept="text/plain",
        CustomAttributes="a=b",
        InferenceId="id 1",
        SessionId="s1",
        TargetModel="m.tar.gz",
        TargetVariant="AllTraffic",
        TargetContainerHostname="h1",
        EnableExplanations="`true`",
        PrefixAwareId="p1",
    )
    (request,) = here.container.requests
    assert request.headers == {
        "host": here.container.address,
        "content-type": "application/json",
        "accept": "text/plain",
        "x-amzn-sagemaker-custom-attributes": "a=b",
        "x-amzn-sagemaker-inference-id": "id 1",
        "x-amzn-sagemaker-session-id": "s1",
        "x-amzn-sagemaker-target-model": "m.tar.gz",
        "x-amzn-sagemaker-target-variant": "AllTraffic",
        "x-amzn-sagemaker-target-container-hostname": "h1",
        "x-amzn-sagemaker-enable-explanations": "`true`",
        "x-amzn-sagemaker-prefix-aware-id": "p1",
        "content-length": "2",
        "connection": "close",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CustomAttributes", "x" * 1025),
        ("InferenceId", "x" * 65),
        ("InferenceId", "caf\u00e9"),
        ("SessionId", "a_b"),
        ("TargetVariant", "-x"),
        ("ContentType", "x" * 1025),
        ("PrefixAwareId", "x" * 65),
    ],
)
def test_a_value_against_the_service_model_is_refused_by_name(bench: Start, name: str, value: str) -> None:
    here = bench(reply())
    error = refused(here, **{name: value})
    assert error["Error"]["Code"] == "ValidationError"
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert name[0].lower() + name[1:] in error["Error"]["Message"]
    assert value not in error["Error"]["Message"]
    assert here.container.requests == []


@pytest.mark.parametrize(
    ("status", "side"), [(400, "client"), (429, "client"), (500, "server"), (503, "server"), (302, "server")]
)
def test_a_status_that_is_not_2xx_is_a_model_error(bench: Start, status: int, side: str) -> None:
    here = bench(reply(b'{"error": "loading"}', status))
    with pytest.raises(here.client.exceptions.ModelError) as caught:
        invoke(here)
    error = caught.value.response
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert error["OriginalStatusCode"] == status
    assert error["OriginalMessage"] == '{"error": "loading"}'
    assert error["LogStreamArn"].startswith("arn:aws:logs:us-east-1:")
    start = f'Received {side} error ({status}) from primary with message "{{"error": "loading"}}". See '
    assert error["Error"]["Message"].startswith(start)


def test_the_texts_of_a_model_error_are_cut_to_the_models_limit(bench: Start) -> None:
    error = refused(bench(reply(b"x" * 100_000, 500)))
    assert error["OriginalMessage"] == "x" * 2048
    assert len(error["Error"]["Message"]) == 2048
    assert error["Error"]["Message"].endswith("for more information.")


@pytest.mark.parametrize("script", [cut, reset, short_body, stream([b"a"], ending=cut), reply(b"x", 99)])
def test_an_answer_that_is_not_whole_is_a_model_error_of_status_0(bench: Start, script: Any) -> None:
    error = refused(bench(script))
    assert error["Error"]["Code"] == "ModelError"
    assert error["OriginalStatusCode"] == 0
    assert "server error (0)" in error["Error"]["Message"]


def test_a_container_that_does_not_listen_is_a_model_error_of_status_0(bench: Start) -> None:
    here = bench(reply())
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    here.emulator.add("gone", address)
    with pytest.raises(ClientError) as caught:
        here.client.invoke_endpoint(EndpointName="gone", Body=b"{}")
    assert caught.value.response["OriginalStatusCode"] == 0


def test_a_silent_container_times_out_by_the_clock_of_the_test(bench: Start) -> None:
    now_s = [0.0]

    def silent(request: Received, connection: socket.socket) -> None:
        now_s[0] += 59.9
        time.sleep(0.4)
        now_s[0] += 0.2
        stall(request, connection)

    start_s = time.monotonic()
    error = refused(bench(silent, clock=lambda: now_s[0]))
    assert 0.4 < time.monotonic() - start_s < 3.0
    assert error["OriginalStatusCode"] == 0
    assert "timed out" in error["OriginalMessage"]


def test_a_trickling_container_is_held_to_the_total_time(bench: Start) -> None:
    trickle = stream([b"x"] * 100, gap_s=0.05)
    start_s = time.monotonic()
    error = refused(bench(trickle, limits=Limits(response_s=0.5)))
    assert time.monotonic() - start_s < 2.0
    assert "timed out" in error["OriginalMessage"]


def test_an_unknown_endpoint_is_a_validation_error(bench: Start) -> None:
    here = bench(reply())
    with pytest.raises(ClientError) as caught:
        here.client.invoke_endpoint(EndpointName="nowhere", Body=b"{}")
    error = caught.value.response
    assert error["Error"]["Code"] == "ValidationError"
    assert error["Error"]["Message"] == "Endpoint nowhere of account 000000000000 not found."
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_an_unknown_variant_is_a_validation_error(bench: Start) -> None:
    assert refused(bench(reply()), TargetVariant="Blue")["Error"]["Code"] == "ValidationError"


def test_an_early_413_of_the_container_is_read_although_the_body_was_not(bench: Start) -> None:
    def impatient(request: Received, connection: socket.socket) -> None:
        raise AssertionError("the script runs before the body is read")

    here = bench(impatient)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here.emulator.add("small", f"127.0.0.1:{listener.getsockname()[1]}")
        listener.settimeout(10)
        body = b"x" * 6_000_000

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(head(413, "Content-Length: 3") + b"big")
                time.sleep(0.3)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClientError) as caught:
            here.client.invoke_endpoint(EndpointName="small", Body=body)
        thread.join()
    assert caught.value.response["OriginalStatusCode"] == 413
    assert caught.value.response["OriginalMessage"] == "big"


def test_an_answer_above_the_limit_is_a_model_error(bench: Start) -> None:
    here = bench(reply(b"x" * 1001), limits=Limits(body_bytes=1000))
    error = refused(here)
    assert error["OriginalStatusCode"] == 0
    assert "larger than 1000 bytes" in error["OriginalMessage"]


def test_an_answer_in_chunks_comes_back_whole(bench: Start) -> None:
    def chunks(request: Received, connection: socket.socket) -> None:
        connection.sendall(head(200, "Transfer-Encoding: chunked"))
        for part in (b"a", b"bc", b"d" * 100_000):
            connection.sendall(chunk(part))
        connection.sendall(b"0\r\n\r\n")

    assert invoke(bench(chunks))["Body"].read() == b"abc" + b"d" * 100_000


def test_one_connection_serves_many_requests(bench: Start) -> None:
    here = bench(reply(b"{}"))
    for _ in range(20):
        assert invoke(here)["Body"].read() == b"{}"
    assert len(here.container.requests) == 20


def test_a_client_that_leaves_is_noticed_by_the_container_within_a_second(bench: Start) -> None:
    left_s: list[float] = []

    def watched(request: Received, connection: socket.socket) -> None:
        stall(request, connection)
        left_s.append(time.monotonic())

    here = bench(watched)
    raw = socket.create_connection(("127.0.0.1", here.emulator.port))
    raw.sendall(raw_request())
    wait_until(lambda: bool(here.container.requests))
    start_s = time.monotonic()
    raw.close()
    wait_until(lambda: bool(left_s))
    assert left_s[0] - start_s < 1.0
    wait_until(lambda: bool(here.emulator.journal()))
    assert here.emulator.journal()[0]["outcome"] == "client_gone"


def raw_request(body: bytes = b"{}", *extra: str, path: str = f"/endpoints/{ENDPOINT}/invocations") -> bytes:
    signature = (
        "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/sagemaker/aws4_request, SignedHeaders=host, "
    )
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: {AUTHORIZATION}",
        *(extra or (f"Content-Length: {len(body)}",)),
        "",
        "",
    )
    return "\r\n".join(lines).encode("latin-1") + body


def answer_to(bench: Bench, request: bytes) -> tuple[int, dict[str, Any]]:
    """Send raw bytes, return status and JSON document."""
    with socket.create_connection(("127.0.0.1", bench.emulator.port), timeout=10) as raw:
        raw.sendall(request)
        data = b""
        while b"}" not in data and (more := raw.recv(65536)):
            data += more
    top, _, body = data.partition(b"\r\n\r\n")
    return int(top.split(b" ")[1]), json.loads(body)


def test_a_request_without_signature_is_refused(bench: Start) -> None:
    here = bench(reply())
    lines = f"POST /endpoints/{ENDPOINT}/invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    status, document = answer_to(here, lines.encode())
    assert (status, document["Message"]) == (403, "Missing Authentication Token")
    garbled = lines.replace("Host: x", "Host: x\r\nAuthorization: Basic abc")
    assert answer_to(here, garbled.encode())[0] == 403
    assert here.container.requests == []
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
