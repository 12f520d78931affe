"""`deploy invoke`: the stack's endpoint is found, called, or told why it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.deploy import stack
from infra.deploy.aws import Aws
from infra.emulator import LOCAL_KEYS
from infra.report import CommandError, ExitCode
from tests.infra.conftest import Bench
from tests.infra.recorded import Answer, Recorded
from tests.infra.scripted import reply
from tests.infra.scripted import stream as streamed
from tests.infra.test_deploy_stack import GONE, cloud_stack, endpoint

CHAT = json.dumps({"choices": [{"message": {"content": "Paris"}}]}).encode()
EVENT = b'data: {"choices": [{"delta": {"content": "Pa"}}]}\n\n'
Start = Callable[..., Bench]


def answers(name: str = "demo", outputs: dict[str, str] | None = None, **fields: Any) -> dict[str, Answer]:
    told = [{"OutputKey": key, "OutputValue": value} for key, value in (outputs or {}).items()]
    given = [{"ParameterKey": "EndpointName", "ParameterValue": name}]
    found = cloud_stack("CREATE_COMPLETE", Outputs=told, Parameters=given)
    return {"DescribeStacks": found, "DescribeEndpoint": {**endpoint("InService"), **fields}}


def call(recorded: dict[str, Answer], stream: bool = False) -> tuple[dict[str, Any], list[str]]:
    aws, shown = Aws(None, Recorded(dict(recorded))), list[str]()
    try:
        return stack.invoke("sr", aws, "capital?", 8, stream, shown.append), shown
    finally:
        aws.close()


@pytest.fixture
def emulated(bench: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(script: Any, **options: Any) -> Bench:
        made = bench(script, **options)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it would keep these keys for other tests
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", made.emulator.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", LOCAL_KEYS.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", LOCAL_KEYS.secret_access_key)
        return made

    return start


def test_the_stacks_endpoint_answers(emulated: Start) -> None:
    here = emulated(reply(CHAT))
    result, shown = call(answers())
    assert result["text"] == "Paris" and shown == ["Paris"]
    (request,) = here.container.requests
    assert json.loads(request.body) == {
        "messages": [{"role": "user", "content": "capital?"}],
        "stream": False,
        "max_tokens": 8,
    }


def test_a_streamed_answer_is_shown_as_it_comes(emulated: Start) -> None:
    emulated(streamed([EVENT, EVENT]))
    result, shown = call(answers(), stream=True)
    assert shown == ["Pa", "Pa"] and result["text"] == "PaPa"


def test_a_components_stack_is_called_by_the_components_name(emulated: Start) -> None:
    here = emulated(reply(CHAT), components={"demo-ic": "127.0.0.1:9"})
    here.emulator.add("demo", here.container.address, {"demo-ic": here.container.address})
    call(answers(outputs={"InferenceComponentName": "demo-ic"}))
    assert here.container.requests[0].headers["x-amzn-sagemaker-inference-component"] == "demo-ic"


@pytest.mark.parametrize(
    ("recorded", "kind", "words"),
    [
        ({"DescribeStacks": GONE}, "no_endpoint", "`sr` has no endpoint"),
        ({"DescribeStacks": cloud_stack("CREATE_COMPLETE", Parameters=[])}, "no_endpoint", "has no endpoint"),
        (answers(EndpointStatus="Creating"), "not_in_service", "is Creating"),
        (answers(EndpointStatus="Failed"), "not_in_service", "is Failed"),
        (
            answers(AsyncInferenceConfig={"OutputConfig": {"S3OutputPath": "s3://b/o"}}),
            "asynchronous",
            "answers into S3",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_called_is_told_with_a_hint(
    recorded: dict[str, Answer], kind: str, words: str
) -> None:
    with pytest.raises(CommandError) as caught:
        call(recorded)
    assert caught.value.kind == kind and words in caught.value.message and caught.value.hint
    assert caught.value.code in (ExitCode.CHECK_FAILED, ExitCode.USAGE)


@pytest.mark.parametrize("status", ["Updating", "SystemUpdating", "RollingBack"])
def test_an_endpoint_under_update_still_answers(emulated: Start, status: str) -> None:
    emulated(reply(CHAT))
    assert call(answers(EndpointStatus=status))[0]["text"] == "Paris"
