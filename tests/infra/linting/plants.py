"""Faults planted into a template, each with the linter's rule that must find it.

A linter that never fails proves nothing.

Owns: the faults. Must not know: how a linter is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Template = dict[str, Any]
VARIANT = "async-image-newvpc"  # has every kind of resource
CAPTURE = {
    "CaptureOptions": [{"CaptureMode": "Input"}],
    "DestinationS3Uri": "s3://elsewhere/",
    "InitialSamplingPercentage": 100,
}


def _properties(template: Template, logical_id: str) -> dict[str, Any]:
    held: dict[str, Any] = template["Resources"][logical_id]["Properties"]
    return held


def _nat(template: Template) -> None:
    template["Resources"]["Nat"] = {
        "Type": "AWS::EC2::NatGateway",
        "Properties": {"SubnetId": {"Ref": "SubnetA"}},
    }


def _statement(template: Template, logical_id: str, sid: str, **fields: Any) -> None:
    for statement in _properties(template, logical_id)["PolicyDocument"]["Statement"]:
        if statement.get("Sid") == sid:
            statement.update(fields)


PLANTS: dict[str, tuple[str, Callable[[Template], None]]] = {
    "isolation off": (
        "isolation_is_on",
        lambda t: _properties(t, "Model").update(EnableNetworkIsolation=False),
    ),
    "NAT": ("no_way_to_the_internet", _nat),
    "data capture": (
        "nothing_captures_content",
        lambda t: _properties(t, "EndpointConfig").update(DataCaptureConfig=CAPTURE),
    ),
    "volume without key": (
        "nothing_captures_content",
        lambda t: _properties(t, "EndpointConfig").pop("KmsKeyId"),
    ),
    "alarm without action": ("every_alarm_acts", lambda t: _properties(t, "Disk").pop("AlarmActions")),
    "log group without key": ("logs_are_encrypted", lambda t: _properties(t, "EndpointLogs").pop("KmsKeyId")),
    "topic without key": (
        "topics_are_encrypted",
        lambda t: _properties(t, "ErrorTopic").pop("KmsMasterKeyId"),
    ),
    "bucket goes": (
        "buckets_outlive_the_stack",
        lambda t: t["Resources"]["DataBucket"].pop("DeletionPolicy"),
    ),
    "plain HTTP": (
        "AwsSolutions-S10",
        lambda t: _statement(t, "DataBucketPolicy", "TlsOnly", Effect="Allow"),
    ),
    "every action": (
        "AwsSolutions-IAM5[Action::s3:*]",
        lambda t: _statement(t, "ExecutionPolicy", "ReadModel", Action=["s3:*"]),
    ),
    "full access": (
        "AwsSolutions-IAM4",
        lambda t: _properties(t, "ExecutionRole").update(
            ManagedPolicyArns=["arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"]
        ),
    ),
}
