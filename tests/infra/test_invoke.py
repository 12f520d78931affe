"""`InvokeEndpoint` with an unmodified boto3 client against containers that behave and misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from infra.emulator import Limits
from tests.infra.calls import invoke, raw_request, refused
from tests.infra.conftest import ENDPOINT, Bench
from tests.infra.scripted import (
    Received,
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
        "x-amzn-sagemaker-target-variant": "AllTraffic",
        "x-amzn-sagemaker-target-container-hostname": "h1",
        "x-amzn-sagemaker-enable-explanations": "`true`",
        "x-amzn-sagemaker-prefix-aware-id": "p1",
        "x-amzn-sagemaker-forwarded-api": "InvokeEndpoint",
        "content-length": "2",
        "connection": "close",
    }


def test_a_caller_cannot_say_which_operation_it_called(bench: Start) -> None:
    here = bench(reply())
    name = "X-Amzn-SageMaker-Forwarded-Api"

    def add(request: Any, **_: Any) -> None:
        request.headers.add_header(name, "InvokeEndpointWithResponseStream")

    here.client.meta.events.register("before-sign.*", add)
    invoke(here)
    assert here.container.requests[0].headers[name.lower()] == "InvokeEndpoint"


def test_a_target_model_is_refused_by_an_endpoint_of_one_model(bench: Start) -> None:
    here = bench(reply())
    assert "not a multi-model endpoint" in refused(here, TargetModel="m.tar.gz")["Error"]["Message"]
    assert here.container.requests == []


@pytest.mark.parametrize("name", ["CustomAttributes", "InferenceId", "SessionId", "PrefixAwareId"])
def test_a_value_at_the_limit_passes(bench: Start, name: str) -> None:
    limits = {"CustomAttributes": 1024, "InferenceId": 64, "SessionId": 256, "PrefixAwareId": 64}
    here = bench(reply())
    assert invoke(here, **{name: "x" * limits[name]})["Body"].read() == b"{}"


def test_a_session_is_used_but_not_opened_over_the_stream_operation(bench: Start) -> None:
    here = bench(reply())
    operation = here.client.invoke_endpoint_with_response_stream
    assert list(operation(EndpointName=ENDPOINT, Body=b"{}", SessionId="abc")["Body"])
    with pytest.raises(ClientError) as caught:
        operation(EndpointName=ENDPOINT, Body=b"{}", SessionId="NEW_SESSION")
    assert caught.value.response["Error"]["Code"] == "ValidationError"


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


def test_a_broken_pipe_while_sending_leaves_the_answer_to_be_read(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: socket.socket, data: object) -> int:
        raise BrokenPipeError

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        here = bench(reply())
        here.emulator.add("small", f"127.0.0.1:{listener.getsockname()[1]}")

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                time.sleep(0.1)
                connection.sendall(head(413, "Content-Length: 3") + b"big")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setattr(socket.socket, "send", broken)  # only the emulator uses it; others call sendall
        with pytest.raises(ClientError) as caught:
            here.client.invoke_endpoint(EndpointName="small", Body=b"{}")
        thread.join()
    assert caught.value.response["OriginalStatusCode"] == 413
