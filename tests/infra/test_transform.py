"""Batch transform jobs by real boto3: limits, strategies, retries, filters, failures."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from infra.emulator import FolderStore
from infra.emulator.records import MB
from tests.infra.conftest import ENDPOINT, Bench, closing_client
from tests.infra.scripted import Received, head, reply, stall, wait_until

Start = Callable[..., Bench]


class Container:
    """A container that answers every line with its length, and has parameters of its own."""

    def __init__(self, parameters: dict[str, Any] | None = None, wait_s: float = 0.0) -> None:
        self.parameters = parameters
        self.wait_s = wait_s
        self.failures = 0  # how many of the next payloads are answered 503
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def __call__(self, request: Received, connection: socket.socket) -> None:
        if request.path == "/execution-parameters":
            found = self.parameters is not None
            body = json.dumps(self.parameters).encode() if found else b"{}"
            reply(body, 200 if found else 404)(request, connection)
            return
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            fails, self.failures = self.failures > 0, max(0, self.failures - 1)
        time.sleep(self.wait_s)
        with self.lock:
            self.running -= 1
        lines = request.body.removesuffix(b"\n").split(b"\n")
        said = b"".join(json.dumps({"n": len(line)}).encode() + b"\n" for line in lines)
        status = 503 if fails else 400 if b"bad" in request.body else 200
        connection.sendall(head(status, f"Content-Length: {len(said)}") + said)


class Jobs:
    """A bench with a control-plane client and a store."""

    def __init__(self, here: Bench, client: Any, store: FolderStore) -> None:
        self.here, self.client, self.store = here, client, store

    def put(self, name: str, *lines: str) -> None:
        self.store.write(f"s3://data/in/{name}", "\n".join(lines).encode(), "text/plain")

    def create(self, name: str = "job", **changes: Any) -> None:
        source: dict[str, Any] = {"S3DataType": "S3Prefix", "S3Uri": "s3://data/in/"}
        request: dict[str, Any] = {
            "TransformJobName": name,
            "ModelName": ENDPOINT,
            "TransformInput": {"DataSource": {"S3DataSource": source}, "SplitType": "Line"},
            "TransformOutput": {"S3OutputPath": "s3://data/out", "AssembleWith": "Line"},
            "TransformResources": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1},
        }
        for key, value in changes.items():
            request[key] = {**request[key], **value} if isinstance(request.get(key), dict) else value
        self.client.create_transform_job(**request)

    def end(self, name: str = "job") -> dict[str, Any]:
        def ended() -> bool:
            self.told: dict[str, Any] = self.client.describe_transform_job(TransformJobName=name)
            return self.told["TransformJobStatus"] not in ("InProgress", "Stopping")

        wait_until(ended, 20)
        return self.told

    def run(self, **changes: Any) -> dict[str, Any]:
        self.create(**changes)
        return self.end()

    def out(self, name: str) -> list[Any]:
        data = self.store.read(f"s3://data/out/{name}.out")
        return [json.loads(line) for line in data.splitlines()]

    def sent(self) -> list[bytes]:
        return [request.body for request in self.here.container.requests if request.path == "/invocations"]

    def refused(self, **changes: Any) -> str:
        with pytest.raises(ClientError) as caught:
            self.create(**changes)
        assert caught.value.response["Error"]["Code"] == "ValidationException"
        message: str = caught.value.response["Error"]["Message"]
        return message


@pytest.fixture
def jobs(bench: Start, tmp_path: Path) -> Iterator[Callable[..., Jobs]]:
    with contextlib.ExitStack() as stack:

        def start(container: Any = None, **options: Any) -> Jobs:
            store = FolderStore(tmp_path)
            here = bench(container or Container(), store=store, **options)
            client = stack.enter_context(closing_client(here.emulator, "sagemaker"))
            return Jobs(here, client, store)

        yield start


def test_every_input_has_one_output_with_its_lines_in_order(jobs: Any) -> None:
    here = jobs()
    here.put("a.jsonl", "1", "22", "333")
    here.put("sub/b.jsonl", "4444")
    told = here.run(TransformInput={"ContentType": "application/jsonlines"}, BatchStrategy="MultiRecord")
    assert told["TransformJobStatus"] == "Completed" and told["TransformEndTime"]
    assert told["TransformJobArn"].endswith(":transform-job/job")
    assert here.out("a.jsonl") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert here.out("sub/b.jsonl") == [{"n": 4}]
    assert here.sent() == [b"1\n22\n333\n", b"4444\n"]
    assert here.here.container.requests[-1].headers["content-type"] == "application/jsonlines"


def test_the_job_s_parameters_win_over_the_container_s_over_the_defaults(jobs: Any) -> None:
    told = {"MaxConcurrentTransforms": 2, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 1}
    here = jobs(Container(told))
    here.put("a", "1", "2")
    here.create("one")
    here.end("one")
    assert sorted(here.sent()) == [b"1\n", b"2\n"]
    here.create("two", BatchStrategy="MultiRecord")
    here.end("two")
    assert here.sent()[2:] == [b"1\n2\n"]


def test_a_payload_at_the_limit_passes_and_one_byte_more_fails_its_file_alone(jobs: Any) -> None:
    here = jobs()
    here.put("large", "x" * (MB + 1))
    here.put("right", "x" * MB)
    told = here.run(MaxPayloadInMB=1, TransformInput={"SplitType": "None"})
    assert told["TransformJobStatus"] == "Failed"
    assert "large" in told["FailureReason"] and "right" not in told["FailureReason"]
    assert here.out("right") == [{"n": MB}]
    assert here.store.list("s3://data/out/large") == []


@pytest.mark.parametrize("together", [1, 3])
def test_no_more_payloads_run_at_once_than_asked_for(jobs: Any, together: int) -> None:
    container = Container(wait_s=0.05)
    here = jobs(container)
    here.put("a", *"123456789")
    here.run(BatchStrategy="SingleRecord", MaxConcurrentTransforms=together)
    assert container.most == together
    assert len(here.out("a")) == 9


def test_a_file_with_a_refused_payload_has_no_output_and_the_others_keep_theirs(jobs: Any) -> None:
    here = jobs()
    here.put("a", "1", "bad", "3")
    here.put("b", "1")
    told = here.run(BatchStrategy="SingleRecord")
    assert told["TransformJobStatus"] == "Failed" and "a: the container answered 400" in told["FailureReason"]
    assert here.store.list("s3://data/out/a") == [] and here.out("b") == [{"n": 1}]


@pytest.mark.parametrize(
    ("failures", "retries", "status"), [(3, 3, "Completed"), (4, 3, "Failed"), (1, 0, "Failed")]
)
def test_a_server_s_error_is_tried_again_as_often_as_asked(
    jobs: Any, failures: int, retries: int, status: str
) -> None:
    container = Container()
    container.failures = failures
    here = jobs(container)
    here.put("a", "1")
    told = here.run(ModelClientConfig={"InvocationsMaxRetries": retries})
    assert told["TransformJobStatus"] == status
    assert len(here.sent()) == min(failures, retries) + 1


def test_a_payload_that_takes_too_long_fails(jobs: Any) -> None:
    def script(request: Received, connection: socket.socket) -> None:
        (reply(b"{}", 404) if request.path == "/execution-parameters" else stall)(request, connection)

    here = jobs(script)
    here.put("a", "1")
    config = {"InvocationsTimeoutInSeconds": 1, "InvocationsMaxRetries": 0}
    told = here.run(ModelClientConfig=config)
    assert told["TransformJobStatus"] == "Failed" and "DeadlinePassed" in told["FailureReason"]


def test_filters_and_join_reach_the_output(jobs: Any) -> None:
    here = jobs()
    here.put("a", '{"id":1,"body":"xyz"}', '{"id":2,"body":"x"}')
    processing = {"InputFilter": "$.body", "JoinSource": "Input", "OutputFilter": "$['id','n']"}
    assert "filter" in here.refused(DataProcessing=processing)
    here.run(DataProcessing={"InputFilter": "$.body", "JoinSource": "Input"})
    assert here.sent() == [b'"xyz"\n"x"\n']
    assert here.out("a")[1] == {"id": 2, "body": "x", "SageMakerOutput": {"n": 3}}


def test_gzip_and_manifests_are_read(jobs: Any) -> None:
    here = jobs()
    here.store.write("s3://data/in/a", gzip.compress(b"1\n22"), "application/gzip")
    here.store.write("s3://data/in/none", b"not gzip", "text/plain")
    manifest = json.dumps([{"prefix": "s3://data/in/"}, "a", "none"]).encode()
    here.store.write("s3://data/manifest", manifest, "application/json")
    source = {"S3DataSource": {"S3DataType": "ManifestFile", "S3Uri": "s3://data/manifest"}}
    told = here.run(TransformInput={"DataSource": source, "CompressionType": "Gzip"})
    assert here.out("a") == [{"n": 1}, {"n": 2}]
    assert told["FailureReason"] == "none: the input is not gzip"


def test_a_job_can_be_stopped_and_its_name_is_taken(jobs: Any) -> None:
    def script(request: Received, connection: socket.socket) -> None:
        (reply(b"{}", 404) if request.path == "/execution-parameters" else stall)(request, connection)

    here = jobs(script)
    here.put("a", "1")
    here.create()
    wait_until(lambda: here.sent() == [b"1\n"])
    assert "unique" in here.refused()
    here.client.stop_transform_job(TransformJobName="job")
    assert here.end()["TransformJobStatus"] == "Stopped"
    with pytest.raises(ClientError, match="cannot be stopped"):
        here.client.stop_transform_job(TransformJobName="job")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ModelName": "nobody"}, "Could not find model"),
        ({"MaxPayloadInMB": 51, "MaxConcurrentTransforms": 2}, "above 100"),
        ({"TransformInput": {"SplitType": "RecordIO"}}, "RecordIO is not emulated"),
        ({"TransformInput": {"SplitType": "Words"}}, "enum value set"),
        ({"TransformResources": {"InstanceType": "ml.g99.large"}}, "enum value set"),
        ({"TransformResources": {"InstanceType": "ml.g6e.xlarge", "VolumeKmsKeyId": "k"}}, "local disks"),
        ({"ModelClientConfig": {"InvocationsMaxRetries": 4}}, "less than or equal to 3"),
        ({"ModelClientConfig": {"InvocationsTimeoutInSeconds": 3601}}, "less than or equal to 3600"),
        ({"DataProcessing": {"InputFilter": "$" + ".a" * 32}}, "less than or equal to 63"),
    ],
)
def test_what_aws_refuses_starts_no_job(jobs: Any, changes: dict[str, Any], said: str) -> None:
    here = jobs()
    assert said in here.refused(**changes)
    with pytest.raises(ClientError) as caught:
        here.client.describe_transform_job(TransformJobName="job")
    assert caught.value.response["Error"]["Code"] == "ResourceNotFound"


def test_limits_hold_at_the_limit(jobs: Any) -> None:
    here = jobs()
    here.put("a", "1")
    told = here.run(MaxPayloadInMB=50, MaxConcurrentTransforms=2)
    assert told["TransformJobStatus"] == "Completed"


def test_inputs_that_are_not_there_fail_the_job(jobs: Any) -> None:
    told = jobs().run()
    assert told["TransformJobStatus"] == "Failed" and "No S3 objects" in told["FailureReason"]


def test_another_operation_is_unknown(jobs: Any) -> None:
    here = jobs()
    with pytest.raises(ClientError) as caught:
        here.client.list_models()
    assert caught.value.response["Error"]["Code"] == "UnknownOperationException"


def test_without_a_store_there_are_no_jobs(bench: Start) -> None:
    here = bench(reply(b"{}"))
    with closing_client(here.emulator, "sagemaker") as client, pytest.raises(ClientError) as caught:
        client.list_models()
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 404


def test_closing_ends_running_jobs(jobs: Any) -> None:
    def script(request: Received, connection: socket.socket) -> None:
        (reply(b"{}", 404) if request.path == "/execution-parameters" else stall)(request, connection)

    here = jobs(script)
    here.put("a", "1")
    here.create()
    wait_until(lambda: here.sent() == [b"1\n"])
    here.here.emulator.close()
    assert not [thread for thread in threading.enumerate() if re.match("transform", thread.name)]
