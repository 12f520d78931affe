"""Real boto3 beside plain calls, against the demo endpoint: a batch of a thousand lines, one in twenty of
them bad, an asynchronous call, a session, and a stream that fails on its way."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EventStreamError

from tests.contract.calls import call, chat
from tests.contract.conftest import Running, end, serve

pytestmark = pytest.mark.real_model
LINES = 1000
STREAM_S = 10  # time for a first token on a busy machine, none for all of those the test asks for
BAD = [b"{", b'{"prompt": 3}', b'{"messages": []}', b'{"prompt": "x", "max_token": 1}', b'"text"']


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Iterator[tuple[Running, Path]]:
    """An endpoint with sessions and short streams, behind an emulator with a store."""
    folder = tmp_path_factory.mktemp("store")
    settings = ("STRONGROOM_SESSIONS=on", f"STRONGROOM_STREAM_DEADLINE_S={STREAM_S}")
    running = serve(tmp_path_factory.mktemp("batch") / "log", *settings, store=folder)
    yield running, folder
    assert end(running) == 0


def lines(seed: int) -> tuple[list[bytes], set[int]]:
    """Return the file's lines, and which of them are bad."""
    draw = random.Random(seed)
    bad = set(draw.sample(range(LINES), LINES // 20))
    made = []
    for number in range(LINES):
        good = json.dumps({"prompt": f"{number}", "max_tokens": 1, "temperature": 0}).encode()
        made.append(draw.choice(BAD) if number in bad else good)
    return made, bad


def test_every_line_of_a_batch_has_its_answer_or_its_error(stored: tuple[Running, Path]) -> None:
    running, folder = stored
    sent, bad = lines(7)
    source = folder / "data" / "in"
    source.mkdir(parents=True)
    (source / "requests.jsonl").write_bytes(b"\n".join(sent))
    client = boto3.client("sagemaker", **running.emulator)
    client.create_transform_job(
        TransformJobName="thousand",
        ModelName="demo",
        MaxConcurrentTransforms=2,
        MaxPayloadInMB=1,
        TransformInput={
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://data/in/"}},
            "ContentType": "application/jsonlines",
            "SplitType": "Line",
        },
        TransformOutput={
            "S3OutputPath": "s3://data/out",
            "AssembleWith": "Line",
            "Accept": "application/jsonlines",
        },
        TransformResources={"InstanceType": "ml.g5.xlarge", "InstanceCount": 1},
    )
    told: dict[str, Any] = {"TransformJobStatus": "InProgress"}
    while told["TransformJobStatus"] == "InProgress":
        time.sleep(0.2)
        told = client.describe_transform_job(TransformJobName="thousand")
    client.close()
    assert told["TransformJobStatus"] == "Completed", told.get("FailureReason")
    answers = [
        json.loads(line) for line in (folder / "data/out/requests.jsonl.out").read_bytes().splitlines()
    ]
    assert len(answers) == LINES
    assert {number for number, answer in enumerate(answers) if "error" in answer} == bad
    for number in random.Random(1).sample(sorted(set(range(LINES)) - bad), 3):
        alone = call(running.port, "POST", "/invocations", json.loads(sent[number])).json()
        assert answers[number]["choices"] == alone["choices"]


def test_an_asynchronous_call_leaves_its_answer_in_the_store(stored: tuple[Running, Path]) -> None:
    running, folder = stored
    client = boto3.client("sagemaker-runtime", **running.emulator)
    body = json.dumps(chat()).encode()
    good = client.invoke_endpoint_async(
        EndpointName="demo-async", Body=body, ContentType="application/json", Filename="good.json"
    )
    bad = client.invoke_endpoint_async(
        EndpointName="demo-async", Body=b"{", ContentType="application/json", Filename="bad.json"
    )
    client.close()
    output = folder / good["OutputLocation"].removeprefix("s3://")
    failure = folder / bad["FailureLocation"].removeprefix("s3://")
    until_s = time.monotonic() + 60
    while not (output.exists() and failure.exists()):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert "Paris" in json.loads(output.read_bytes())["choices"][0]["message"]["content"]
    assert json.loads(failure.read_bytes())["error"]["code"] == "invalid_json"


@pytest.fixture
def runtime(stored: tuple[Running, Path]) -> Iterator[Any]:
    client = boto3.client("sagemaker-runtime", **stored[0].emulator)
    yield client
    client.close()


def test_a_session_is_opened_used_and_closed(runtime: Any) -> None:
    opened = runtime.invoke_endpoint(
        EndpointName="demo", SessionId="NEW_SESSION", Body=b'{"requestType":"NEW_SESSION"}'
    )
    session = opened["NewSessionId"].split(";")[0]
    assert opened["Body"].read().decode() == f"Session {session} created"
    body = json.dumps(chat(max_tokens=4)).encode()
    fields = {"EndpointName": "demo", "ContentType": "application/json", "SessionId": session}
    assert runtime.invoke_endpoint(**fields, Body=body)["Body"].read()
    streamed = runtime.invoke_endpoint_with_response_stream(
        **fields, Body=json.dumps(chat(max_tokens=4, stream=True)).encode()
    )
    assert b"[DONE]" in b"".join(part["PayloadPart"]["Bytes"] for part in streamed["Body"])
    streamed["Body"].close()
    closed = runtime.invoke_endpoint(EndpointName="demo", SessionId=session, Body=b'{"requestType":"CLOSE"}')
    assert closed["ClosedSessionId"] == session
    assert closed["Body"].read().decode() == f"Session {session} closed"
    with pytest.raises(ClientError) as caught:
        runtime.invoke_endpoint(**fields, Body=body)
    error: Any = caught.value.response
    assert error["OriginalStatusCode"] == 400 and "session not found" in error["OriginalMessage"]


def test_a_stream_s_parts_arrive_while_it_is_made_and_its_failure_is_seen(runtime: Any) -> None:
    body = json.dumps({"prompt": "1, 2, 3,", "n": 4, "max_tokens": 2000, "ignore_eos": True, "stream": True})
    answer = runtime.invoke_endpoint_with_response_stream(
        EndpointName="demo", ContentType="application/json", Body=body.encode()
    )
    arrived: list[float] = []
    parts: list[bytes] = []
    with pytest.raises(EventStreamError) as caught:
        for part in answer["Body"]:
            arrived.append(time.monotonic())
            parts.append(part["PayloadPart"]["Bytes"])
    answer["Body"].close()
    assert caught.value.response["Error"]["Code"] == "ModelStreamError"
    assert "deadline_exceeded" in parts[-1].decode() and b"[DONE]" not in b"".join(parts)
    assert len(parts) > 5
    assert arrived[-1] - arrived[0] > STREAM_S / 3  # not all at once at the end
