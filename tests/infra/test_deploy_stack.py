"""`deploy up`, `status`, `logs`, `down`: the calls, the waiting, why an endpoint is not there, what stays."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

import pytest

from infra.deploy import progress, stack
from infra.deploy.aws import Aws, translated
from infra.deploy.choices import read
from infra.report import CommandError, ExitCode
from infra.templates import render
from tests.infra.recorded import Answer, Recorded, refusal

NOW = datetime.datetime.now(datetime.UTC)
ARN = "arn:aws:sagemaker:us-east-1:123456789012:endpoint/strongroom"
FILE = render.ROOT / render.FOLDER / "realtime-image-newvpc.parameters.example.json"
CHOICES = read("realtime-image-newvpc", "sr", "us-east-1", FILE, [])
GONE = refusal("ValidationError", "Stack with id sr does not exist")


def cloud_stack(status: str, **fields: Any) -> Answer:
    given = [{"ParameterKey": "EndpointName", "ParameterValue": "strongroom"}]
    held = {"StackName": "sr", "CreationTime": NOW, "StackStatus": status, "Parameters": given, **fields}
    return {"Stacks": [held]}


def endpoint(status: str, **fields: Any) -> Answer:
    names = {"EndpointName": "strongroom", "EndpointArn": ARN, "EndpointStatus": status}
    return {**names, "CreationTime": NOW, "LastModifiedTime": NOW, **fields}


def change(action: str, name: str) -> Answer:
    held = {"Action": action, "LogicalResourceId": name, "ResourceType": "AWS::SageMaker::Endpoint"}
    return {"Type": "Resource", "ResourceChange": held}


def answers(**changed: Any) -> dict[str, Any]:
    outputs = [{"OutputKey": "EndpointArn", "OutputValue": ARN}]
    made: dict[str, Any] = {
        "DescribeStacks": [
            GONE,
            cloud_stack("CREATE_IN_PROGRESS"),
            cloud_stack("CREATE_IN_PROGRESS"),
            cloud_stack("CREATE_COMPLETE", Outputs=outputs),
        ],
        "CreateChangeSet": {"Id": "arn:change"},
        "DescribeChangeSet": [
            {"Status": "CREATE_IN_PROGRESS"},
            {"Status": "CREATE_COMPLETE", "Changes": [change("Add", "Endpoint")]},
        ],
        "ExecuteChangeSet": {},
        "DeleteChangeSet": {},
        "DescribeEndpoint": endpoint("Creating"),
        "DescribeLogStreams": [
            refusal("ResourceNotFoundException"),
            {"logStreams": [{"logStreamName": "AllTraffic/i-0"}]},
        ],
    }
    return made | changed


@pytest.fixture
def opened() -> Iterator[Any]:
    held: list[Aws] = []

    def make(**changed: Any) -> tuple[Aws, Recorded]:
        session = Recorded(answers(**changed))
        held.append(Aws(None, session))
        return held[-1], session

    yield make
    for aws in held:
        aws.close()


def test_up_makes_a_change_set_runs_it_and_tells_why_it_waits(opened: Any) -> None:
    aws, session = opened()
    said: list[str] = []
    result = stack.up(CHOICES, aws, said.append, 0)
    assert result["ok"] and result["status"] == "CREATE_COMPLETE"
    assert result["outputs"] == {"EndpointArn": ARN}
    assert [one["action"] for one in result["changes"]] == ["Add"]
    (asked,) = session.named("CreateChangeSet")
    assert asked["ChangeSetType"] == "CREATE" and asked["Capabilities"] == ["CAPABILITY_IAM"]
    assert asked["TemplateBody"] == render.template_text(CHOICES.variant)
    assert {"ParameterKey": "InstanceType", "ParameterValue": "ml.g6e.2xlarge"} in asked["Parameters"]
    assert said[0] == "1 changes"
    assert "no container has started" in said[1] and "its health check has not passed" in said[2]


def test_up_of_a_stack_that_stands_is_an_update(opened: Any) -> None:
    stands = [cloud_stack("CREATE_COMPLETE"), cloud_stack("UPDATE_COMPLETE")]
    aws, session = opened(DescribeStacks=stands)
    assert stack.up(CHOICES, aws, print, 0)["status"] == "UPDATE_COMPLETE"
    assert session.named("CreateChangeSet")[0]["ChangeSetType"] == "UPDATE"


def test_up_twice_changes_nothing_the_second_time(opened: Any) -> None:
    same = {"Status": "FAILED", "StatusReason": "The submitted information didn't contain changes."}
    aws, session = opened(DescribeStacks=cloud_stack("CREATE_COMPLETE"), DescribeChangeSet=same)
    result = stack.up(CHOICES, aws, print, 0)
    assert result == {"ok": True, "stack": "sr", "changes": [], "status": "unchanged"}
    assert session.named("DeleteChangeSet") and not session.named("ExecuteChangeSet")


def test_a_change_set_that_fails_is_an_error_with_its_reason(opened: Any) -> None:
    aws, _ = opened(DescribeChangeSet={"Status": "FAILED", "StatusReason": "Circular dependency"})
    with pytest.raises(CommandError) as caught:
        stack.up(CHOICES, aws, print, 0)
    assert caught.value.code == ExitCode.AWS_REFUSED and caught.value.message == "Circular dependency"


def test_what_failed_is_told_first_failure_first(opened: Any) -> None:
    def event(name: str, status: str, reason: str) -> Answer:
        held = {"StackId": "sr", "EventId": name, "StackName": "sr", "Timestamp": NOW}
        return {**held, "LogicalResourceId": name, "ResourceStatus": status, "ResourceStatusReason": reason}

    events = [event("Model", "CREATE_FAILED", "cancelled"), event("Endpoint", "CREATE_FAILED", "no capacity")]
    events.append(event("Key", "CREATE_COMPLETE", ""))
    aws, _ = opened(
        DescribeStacks=[GONE, cloud_stack("ROLLBACK_COMPLETE")], DescribeStackEvents={"StackEvents": events}
    )
    result = stack.up(CHOICES, aws, print, 0)
    assert not result["ok"]
    assert result["failures"][0] == {"resource": "Endpoint", "reason": "no capacity"}
    assert len(result["failures"]) == 2


def test_a_wait_has_an_end(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "UP_S", -1.0)
    aws, _ = opened()
    with pytest.raises(CommandError) as caught:
        stack.up(CHOICES, aws, lambda _: None, 0)
    assert caught.value.kind == "timed_out" and "deploy status" in caught.value.hint


def test_down_lists_what_stays_and_how_it_goes(opened: Any) -> None:
    def held(name: str, kind: str, identity: str) -> Answer:
        fields = {"LogicalResourceId": name, "ResourceType": kind, "PhysicalResourceId": identity}
        return {**fields, "LastUpdatedTimestamp": NOW, "ResourceStatus": "CREATE_COMPLETE"}

    kept = [held("Key", "AWS::KMS::Key", "k-1"), held("DataBucket", "AWS::S3::Bucket", "b-1")]
    kept.append(held("Endpoint", "AWS::SageMaker::Endpoint", ARN))
    aws, session = opened(
        DescribeStacks=[cloud_stack("CREATE_COMPLETE"), cloud_stack("DELETE_IN_PROGRESS"), GONE],
        ListStackResources={"StackResourceSummaries": kept},
        DeleteStack={},
        DescribeEndpoint=refusal("ValidationException"),
    )
    result = stack.down("sr", aws, print, 0)
    assert result["ok"] and session.named("DeleteStack") == [{"StackName": "sr"}]
    assert [one["id"] for one in result["left"]] == ["k-1", "b-1"]
    assert "schedule-key-deletion --key-id k-1" in result["left"][0]["remove"]


def test_what_stays_is_what_the_templates_retain() -> None:
    from infra.templates import template
    from infra.templates.variants import ALL

    retained = {
        held["Type"]
        for variant in ALL
        for held in template.build(variant)["Resources"].values()
        if held.get("DeletionPolicy") == "Retain"
    }
    assert retained == {*stack.STAYS, "AWS::S3::BucketPolicy"}  # a bucket's policy goes with its bucket


def test_down_twice_finds_nothing_the_second_time(opened: Any) -> None:
    aws, session = opened(DescribeStacks=GONE)
    assert stack.down("sr", aws, print, 0) == {"ok": True, "stack": "sr", "status": "absent", "left": []}
    assert not session.named("DeleteStack")


def test_status_tells_the_endpoints_reason(opened: Any) -> None:
    failed = endpoint("Failed", FailureReason="The primary container did not pass the ping health check.")
    aws, _ = opened(DescribeStacks=cloud_stack("CREATE_FAILED"), DescribeEndpoint=failed)
    assert "did not pass the ping" in stack.status("sr", aws)["endpoint"]
    aws, _ = opened(DescribeStacks=GONE)
    with pytest.raises(CommandError, match="no_stack"):
        stack.status("sr", aws)


def test_logs_come_in_the_order_they_were_written(opened: Any) -> None:
    streams = {"logStreams": [{"logStreamName": "a"}, {"logStreamName": "b"}]}

    def lines(request: Answer) -> Answer:
        times = {"a": (1, 4), "b": (2, 3)}[request["logStreamName"]]
        return {"events": [{"timestamp": time, "message": f"line {time}"} for time in times]}

    aws, _ = opened(
        DescribeStacks=cloud_stack("CREATE_COMPLETE"), DescribeLogStreams=streams, GetLogEvents=lines
    )
    assert stack.logs("sr", aws, 3)["lines"] == ["line 2", "line 3", "line 4"]
    aws, _ = opened(DescribeStacks=cloud_stack("CREATE_COMPLETE", Parameters=[]))
    with pytest.raises(CommandError, match="no_endpoint"):
        stack.logs("sr", aws)


def test_a_refusal_of_aws_names_the_right_that_is_missing(opened: Any) -> None:
    aws, _ = opened(DescribeStacks=refusal("AccessDenied", "not authorized"))
    with pytest.raises(CommandError) as caught, translated():
        stack.status("sr", aws)
    assert caught.value.code == ExitCode.AWS_REFUSED and "DescribeStacks" in caught.value.hint


WRONG = [
    ("cloudformation", "describe_stacks", {"StackName": 1}),
    ("cloudformation", "create_change_set", {"StackName": "sr", "ChangeSetName": "1x"}),
    ("cloudformation", "describe_change_set", {"StackName": "sr", "ChangeSetName": "-"}),
    ("cloudformation", "execute_change_set", {"StackName": "sr", "ChangeSetName": "-"}),
    ("cloudformation", "delete_change_set", {"StackName": "sr", "ChangeSetName": "-"}),
    ("cloudformation", "describe_stack_events", {"StackName": 1}),
    ("cloudformation", "list_stack_resources", {"StackName": 1}),
    ("cloudformation", "delete_stack", {"StackName": 1}),
    ("sagemaker", "describe_endpoint", {"EndpointName": "a--"}),
    ("sagemaker", "describe_algorithm", {"AlgorithmName": "-"}),
    ("sagemaker", "describe_model_package", {"ModelPackageName": "x" * 200}),
    ("logs", "describe_log_streams", {"logGroupName": "a b"}),
    ("logs", "get_log_events", {"logGroupName": "a", "logStreamName": "a", "limit": 10_001}),
    ("service-quotas", "list_service_quotas", {"ServiceCode": "Sage Maker"}),
    ("ec2", "describe_instance_type_offerings", {"LocationType": "planet"}),
    ("ec2", "describe_subnets", {"SubnetIds": "subnet-0"}),
    ("ec2", "describe_route_tables", {"Filters": [{"Name": 1}]}),
    ("ecr", "batch_get_image", {"repositoryName": "UPPER", "imageIds": [{"imageDigest": "x"}]}),
    ("s3", "list_objects_v2", {"Bucket": "b", "EncodingType": "latin"}),
    ("kms", "describe_key", {"KeyId": ""}),
    ("kms", "get_key_policy", {"KeyId": "k", "PolicyName": "a b"}),
    ("sagemaker", "list_endpoints", {"StatusEquals": "Asleep"}),
    ("cloudwatch", "describe_alarms", {"StateValue": "PANIC"}),
]


@pytest.mark.parametrize(("service", "operation", "request_"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_value_in_each_call_is_caught_before_it_is_sent(
    opened: Any, service: str, operation: str, request_: Answer
) -> None:
    aws, _ = opened()
    with pytest.raises(CommandError) as caught:
        getattr(aws.client(service), operation)(**request_)
    assert caught.value.kind == "request_refused"


def test_every_call_that_the_code_makes_is_among_them() -> None:
    folder = render.ROOT / "infra" / "deploy"
    text = " ".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    verbs = "describe|create|execute|delete|list|get|batch_get"
    called = set(re.findall(rf"\.((?:{verbs})_[a-z_0-9]+)\(", text)) - {"get_paginator"}
    called |= set(re.findall(r'get_paginator\("(\w+)"\)', text))
    assert called == {operation for _, operation, _ in WRONG}


def statuses(*held: Answer) -> Answer:
    variants = [{"VariantName": "AllTraffic", "VariantStatus": list(held)}]
    return {"PendingDeploymentSummary": {"EndpointConfigName": "c", "ProductionVariants": variants}}


@pytest.mark.parametrize(
    ("status", "fields", "streams", "words"),
    [
        ("InService", {}, 1, "in service"),
        ("Creating", {}, 0, "Creating for 12 min: no container has started"),
        ("Creating", {}, 1, "Creating for 12 min: the container runs"),
        (
            "Creating",
            statuses({"Status": "Creating", "StatusMessage": "no capacity"}),
            0,
            "Creating no capacity",
        ),
        ("Failed", {}, 0, "AWS gives no reason"),
        ("Updating", {}, 1, "replacing instances"),
        ("RollingBack", {}, 1, "an alarm rolled"),
        ("Unheard", {}, 1, "AWS gives no reason"),
    ],
)
def test_why_an_endpoint_is_in_its_state(status: str, fields: Answer, streams: int, words: str) -> None:
    assert words in progress.explain(endpoint(status, **fields), streams, 12 * 60 + 5)
