"""Where payloads, notifications and logs lie.

Owns: buckets, topics, log groups, with keys, retention and policies. Must not know: who writes into them.
Invariant: encrypted with our key, reachable by TLS alone, never public; buckets outlive the stack, and
payloads leave them after `PayloadDays`.
"""

from __future__ import annotations

from typing import Any

from infra.templates.iam import volume_key_arn
from infra.templates.intrinsics import (
    ACCOUNT,
    COMPONENT_LOGS,
    ENDPOINT_LOGS,
    FLOW_LOGS,
    att,
    choose,
    ref,
    sub,
)
from infra.templates.keys import PUBLISHERS
from infra.templates.resource import Resource, Resources, policy, resource, statement
from infra.templates.variants import Variant

CLOSED = {
    "BlockPublicAcls": True,
    "BlockPublicPolicy": True,
    "IgnorePublicAcls": True,
    "RestrictPublicBuckets": True,
}
UPLOAD_DAYS = 7  # what an interrupted upload left behind


def resources(variant: Variant) -> Resources:
    """Return log groups, the alarm topic and, where requests pass through them, buckets and topics."""
    made = _log_groups(variant)
    made["AlarmTopic"] = _topic("alarms", "WithOwnTopic")
    made["AlarmTopicPolicy"] = _topic_policy(["AlarmTopic"], PUBLISHERS, "WithOwnTopic")
    if variant.traffic == "async":
        made["SuccessTopic"] = _topic("requests that succeeded")
        made["ErrorTopic"] = _topic("requests that failed")
        made["RequestTopicPolicy"] = _topic_policy(["SuccessTopic", "ErrorTopic"], [])
    if variant.has_data:
        made |= _buckets()
    return made


def alarm_topic() -> Any:
    """Return where alarms go: the customer's topic, else the stack's."""
    return choose("WithOwnTopic", ref("AlarmTopic"), ref("AlarmTopicArn"))


def _log_groups(variant: Variant) -> Resources:
    # Made here, before the endpoint: the platform's own would have neither key nor retention, and would stay.
    names = {}
    if variant.has_endpoint:
        names["EndpointLogs"] = ENDPOINT_LOGS
    if variant.traffic == "component":
        names["ComponentLogs"] = COMPONENT_LOGS
    if variant.network == "newvpc":
        names["FlowLogs"] = FLOW_LOGS
    return {
        logical_id: resource(
            "AWS::Logs::LogGroup",
            {
                "KmsKeyId": att("Key", "Arn"),
                "LogGroupName": sub(name),
                "RetentionInDays": ref("LogRetentionDays"),
            },
        )
        for logical_id, name in names.items()
    }


def _topic(text: str, condition: str = "") -> Resource:
    return resource(
        "AWS::SNS::Topic",
        {"DisplayName": f"strongroom {text}", "KmsMasterKeyId": ref("Key")},
        condition=condition,
    )


def _topic_policy(topics: list[str], publishers: list[str], condition: str = "") -> Resource:
    targets = [ref(topic) for topic in topics]
    statements = [
        statement(
            "TlsOnly",
            ["sns:Publish"],
            targets,
            effect="Deny",
            principal="*",
            condition={"Bool": {"aws:SecureTransport": "false"}},
        )
    ]
    if publishers:
        statements.append(
            statement(
                "ThisAccountsAlarms",
                ["sns:Publish"],
                targets,
                principal={"Service": publishers},
                condition={"StringEquals": {"aws:SourceAccount": ACCOUNT}},
            )
        )
    return resource(
        "AWS::SNS::TopicPolicy",
        {"PolicyDocument": policy(statements), "Topics": targets},
        condition=condition,
    )


def _buckets() -> Resources:
    encrypted = {
        "BucketKeyEnabled": True,
        "ServerSideEncryptionByDefault": {"KMSMasterKeyID": volume_key_arn(), "SSEAlgorithm": "aws:kms"},
    }
    expiring: dict[str, Any] = {
        "Id": "payloads",
        "ExpirationInDays": ref("PayloadDays"),
        "NoncurrentVersionExpiration": {"NoncurrentDays": ref("PayloadDays")},
        "Status": "Enabled",
    }
    delivery = statement(
        "AccessLogs",
        ["s3:PutObject"],
        [sub("${AccessLogBucket.Arn}/*")],
        principal={"Service": "logging.s3.amazonaws.com"},
        condition={
            "ArnLike": {"aws:SourceArn": att("DataBucket", "Arn")},
            "StringEquals": {"aws:SourceAccount": ACCOUNT},
        },
    )
    data = _bucket(encrypted, [expiring])
    data["Properties"]["LoggingConfiguration"] = {
        "DestinationBucketName": ref("AccessLogBucket"),
        "LogFilePrefix": "data/",
    }
    # A target whose default encryption is KMS is documented to receive no logs, hence AES256 there.
    plain = {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    kept = {"Id": "logs", "ExpirationInDays": ref("LogRetentionDays"), "Status": "Enabled"}
    return {
        "DataBucket": data,
        "DataBucketPolicy": _bucket_policy("DataBucket", []),
        "AccessLogBucket": _bucket(plain, [kept], skips=("CKV_AWS_18",)),
        "AccessLogBucketPolicy": _bucket_policy("AccessLogBucket", [delivery]),
    }


def _bucket(encryption: Any, rules: list[Any], skips: tuple[str, ...] = ()) -> Resource:
    unfinished = {
        "Id": "uploads",
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UPLOAD_DAYS},
        "Status": "Enabled",
    }
    return resource(
        "AWS::S3::Bucket",
        {
            "BucketEncryption": {"ServerSideEncryptionConfiguration": [encryption]},
            "LifecycleConfiguration": {"Rules": [unfinished, *rules]},
            "OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
            "PublicAccessBlockConfiguration": dict(CLOSED),
            "VersioningConfiguration": {"Status": "Enabled"},
        },
        retain=True,
        skips=skips,
    )


def _bucket_policy(bucket: str, allowed: list[Any]) -> Resource:
    targets = [att(bucket, "Arn"), {"Fn::Join": ["", [att(bucket, "Arn"), "/*"]]}]
    refused = [
        statement(
            "TlsOnly",
            "s3:*",
            targets,
            effect="Deny",
            principal="*",
            condition={"Bool": {"aws:SecureTransport": "false"}},
        ),
        statement(
            "Tls12",
            "s3:*",
            targets,
            effect="Deny",
            principal="*",
            condition={"NumericLessThan": {"s3:TlsVersion": "1.2"}},
        ),
    ]
    return resource(
        "AWS::S3::BucketPolicy",
        {"Bucket": ref(bucket), "PolicyDocument": policy([*refused, *allowed])},
        retain=True,
    )
