"""InvokeEndpointAsync by real boto3, with objects in moto's S3 and in a folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from infra.emulator import FolderStore, S3Store
from infra.emulator.queueing import INLINE_BYTES
from tests.infra.conftest import ENDPOINT, Bench, closing_client
from tests.infra.scripted import Script, reply, stall, wait_until

NAME = f"{ENDPOINT}-async"
OUTPUT = "s3://results/out"
Start = Callable[..., Bench]


@pytest.fixture
def queue(bench: Start, tmp_path: Path) -> Callable[..., tuple[Bench, FolderStore]]:
    """Return a function that starts an emulator whose asynchronous endpoint answers by a script."""

    def start(script: Script, **options: Any) -> tuple[Bench, FolderStore]:
        store = FolderStore(tmp_path)
        return bench(script, store=store, async_output=OUTPUT, **options), store

    return start


def told(here: Bench, count: int = 1) -> list[dict[str, Any]]:
    wait_until(lambda: len(here.emulator.notifications()) >= count)
    return here.emulator.notifications()


def invoke(here: Bench, **fields: Any) -> Any:
    return here.client.invoke_endpoint_async(EndpointName=NAME, ContentType="application/json", **fields)


def refused(here: Bench, **fields: Any) -> str:
    with pytest.raises(ClientError) as caught:
        invoke(here, **fields)
    assert caught.value.response["Error"]["Code"] == "ValidationError"
    message: str = caught.value.response["Error"]["Message"]
    return message


def test_an_inline_body_is_answered_at_the_output_location(queue: Any) -> None:
    here, store = queue(reply(b'{"said":1}'))
    answer = invoke(here, Body=b'{"x":1}', InferenceId="mine", Accept="application/json")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert answer["InferenceId"] == "mine"
    assert answer["OutputLocation"].startswith(f"{OUTPUT}/") and answer["OutputLocation"].endswith(".out")
    (note,) = told(here)
    assert store.read(answer["OutputLocation"]) == b'{"said":1}'
    assert (note["invocationStatus"], note["inferenceId"]) == ("Completed", "mine")
    assert note["responseParameters"]["outputLocation"] == answer["OutputLocation"]
    (request,) = here.container.requests
    assert request.path == "/invocations" and request.body == b'{"x":1}'
    assert request.headers["x-amzn-sagemaker-inference-id"] == "mine"
    assert request.headers["content-type"] == request.headers["accept"] == "application/json"
    assert not any("input" in name or "output" in name or "ttl" in name for name in request.headers)


def test_input_in_a_store_is_sent_to_the_container(queue: Any) -> None:
    here, store = queue(reply(b"{}"))
    store.write("s3://inputs/1.json", b"x" * 7_000_000, "application/json")  # above what real time takes
    answer = invoke(
        here, InputLocation="s3://inputs/1.json", Filename="mine.json", S3OutputPathExtension="a/b"
    )
    assert answer["OutputLocation"] == f"{OUTPUT}/a/b/mine.json"
    assert answer["FailureLocation"] == f"{OUTPUT}/a/b/mine-error.json"
    told(here)
    assert len(here.container.requests[0].body) == 7_000_000
    assert store.read(answer["OutputLocation"]) == b"{}"


def test_a_container_s_error_becomes_the_failure_object(queue: Any) -> None:
    here, store = queue(reply(b'{"error":"bad"}', 400))
    answer = invoke(here, Body=b"{}")
    (note,) = told(here)
    assert note["invocationStatus"] == "Failed" and "(400)" in note["failureReason"]
    assert note["responseParameters"] == {"failureLocation": answer["FailureLocation"]}
    assert store.read(answer["FailureLocation"]) == b'{"error":"bad"}'
    assert store.list(answer["OutputLocation"]) == []


def test_a_missing_input_fails_the_call_not_the_request(queue: Any) -> None:
    here, store = queue(reply(b"{}"))
    answer = invoke(here, InputLocation="s3://inputs/none.json")
    (note,) = told(here)
    assert "cannot be read" in note["failureReason"] and here.container.requests == []
    assert store.read(answer["FailureLocation"])


def test_a_call_that_takes_too_long_fails(queue: Any) -> None:
    here, _ = queue(stall)
    invoke(here, Body=b"{}", InvocationTimeoutSeconds=1)
    (note,) = told(here)
    assert "timed out" in note["failureReason"]


def test_a_call_that_waited_longer_than_its_life_is_not_run(queue: Any) -> None:
    now_s = [0.0]
    running, go_on = threading.Semaphore(0), threading.Event()

    def held(request: Any, connection: Any) -> None:
        running.release()
        go_on.wait(30)
        reply(b"{}")(request, connection)

    here, _ = queue(held, clock=lambda: now_s[0])
    for _ in range(5):  # four run at once
        invoke(here, Body=b"{}", RequestTTLSeconds=60)
    assert all(running.acquire(timeout=30) for _ in range(4))
    now_s[0] = 61
    go_on.set()
    notes = told(here, 5)
    expired = [note for note in notes if "expired" in note.get("failureReason", "")]
    assert len(expired) == 1 and len(here.container.requests) == 4


def test_an_inline_body_at_the_limit_passes_and_one_byte_more_is_a_413(queue: Any) -> None:
    here, _ = queue(reply(b"{}"))
    invoke(here, Body=b"x" * INLINE_BYTES)
    with pytest.raises(ClientError) as caught:
        invoke(here, Body=b"x" * (INLINE_BYTES + 1))
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413
    told(here)
    assert [len(request.body) for request in here.container.requests] == [INLINE_BYTES]


@pytest.mark.parametrize(
    ("good", "bad", "member"),
    [
        ({"RequestTTLSeconds": 60}, {"RequestTTLSeconds": 59}, "requestTTLSeconds"),
        ({"RequestTTLSeconds": 21_600}, {"RequestTTLSeconds": 21_601}, "requestTTLSeconds"),
        ({"InvocationTimeoutSeconds": 3600}, {"InvocationTimeoutSeconds": 3601}, "invocationTimeoutSeconds"),
        ({"Filename": "a" * 32}, {"Filename": "a" * 33}, "filename"),
        ({"Filename": "a.b"}, {"Filename": "a.b.c"}, "filename"),
        (
            {"S3OutputPathExtension": "a" * 512},
            {"S3OutputPathExtension": "a" * 513},
            "s3OutputPathExtension",
        ),
        ({"S3OutputPathExtension": "a"}, {"S3OutputPathExtension": "s3:a"}, "s3OutputPathExtension"),
        ({"CustomAttributes": "a" * 1024}, {"CustomAttributes": "a" * 1025}, "customAttributes"),
        ({"InferenceId": "a" * 64}, {"InferenceId": "a" * 65}, "inferenceId"),
    ],
)
def test_every_limit_holds_at_the_limit_and_one_beyond(
    bench: Start, tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], member: str
) -> None:
    here = bench(reply(b"{}"), store=FolderStore(tmp_path), async_output="s3://results")
    with closing_client(here.emulator, unchecked=True) as client:  # the SDK checks minima itself
        here.client = client
        assert invoke(here, Body=b"{}", **good)["InferenceId"]
        assert f"'{member}'" in refused(here, Body=b"{}", **bad)


def test_exactly_one_input_is_needed(queue: Any) -> None:
    here, _ = queue(reply(b"{}"))
    assert "exactly one" in refused(here)
    assert "exactly one" in refused(here, Body=b"{}", InputLocation="s3://inputs/1")


def test_real_time_and_asynchronous_endpoints_take_their_own_calls_alone(queue: Any) -> None:
    here, _ = queue(reply(b"{}"))
    with pytest.raises(ClientError) as caught:
        here.client.invoke_endpoint_async(EndpointName=ENDPOINT, Body=b"{}")
    assert "not an asynchronous" in caught.value.response["Error"]["Message"]
    for operation in (here.client.invoke_endpoint, here.client.invoke_endpoint_with_response_stream):
        with pytest.raises(ClientError) as caught:
            operation(EndpointName=NAME, Body=b"{}")
        assert "asynchronous invocations alone" in caught.value.response["Error"]["Message"]
    assert here.container.requests == []


def test_closing_ends_what_runs_and_what_waits(queue: Any) -> None:
    here, _ = queue(stall)
    for _ in range(8):
        invoke(here, Body=b"{}")
    wait_until(lambda: len(here.container.requests) == 4)  # as many as run at once
    here.emulator.close()
    assert here.emulator.notifications() == []


def test_objects_may_lie_in_any_s3(bench: Start) -> None:
    with mock_aws():
        s3 = boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y")
        s3.create_bucket(Bucket="results")
        s3.put_object(Bucket="results", Key="in.json", Body=b'{"x":1}')
        here = bench(reply(b'{"said":1}'), store=S3Store(s3), async_output="s3://results/out")
        answer = invoke(here, InputLocation="s3://results/in.json")
        told(here)
        key = answer["OutputLocation"].removeprefix("s3://results/")
        got = s3.get_object(Bucket="results", Key=key)
        assert got["Body"].read() == b'{"said":1}' and got["ContentType"] == "application/json"
        s3.close()


def test_what_was_said_is_in_no_notification_and_no_journal(queue: Any) -> None:
    seen: list[dict[str, Any]] = []
    here, _ = queue(reply(b"canary-answer"), notify=seen.append)
    invoke(here, Body=b"canary-prompt")
    told(here)
    assert seen == here.emulator.notifications()
    assert "canary" not in json.dumps([here.emulator.journal(), here.emulator.notifications()])
