"""The stack's KMS key and who may use it.

Owns: the key, its alias, its policy. Must not know: what is encrypted with it.
Invariant: services use the key for this account alone, and the log service for this stack's groups alone.
"""

from __future__ import annotations

from typing import Any

from infra.templates.intrinsics import (
    ACCOUNT,
    COMPONENT_LOGS,
    ENDPOINT_LOGS,
    FLOW_LOGS,
    log_group_arn,
    ref,
    sub,
)
from infra.templates.resource import Resources, policy, resource, statement
from infra.templates.variants import Variant

# Who publishes to the encrypted topic: without the right an alarm's action fails without a word.
PUBLISHERS = ["cloudwatch.amazonaws.com", "budgets.amazonaws.com", "events.amazonaws.com"]


def resources(variant: Variant) -> Resources:
    """Return the key and its alias; the alias carries the stack's name, so that two stacks do not collide."""
    groups: list[Any] = []
    if variant.has_endpoint:
        groups.append(log_group_arn(ENDPOINT_LOGS))
    if variant.traffic == "component":
        groups.append(log_group_arn(COMPONENT_LOGS))
    if variant.network == "newvpc":
        groups.append(log_group_arn(FLOW_LOGS))
    statements = [
        statement(
            "AdministrationThroughIam",
            ["kms:*"],
            "*",
            principal={"AWS": sub("arn:${AWS::Partition}:iam::${AWS::AccountId}:root")},
        ),
        statement(
            "NotifyThroughTopics",
            ["kms:Decrypt", "kms:GenerateDataKey*"],
            "*",
            principal={"Service": PUBLISHERS},
            condition={"StringEquals": {"aws:SourceAccount": ACCOUNT}},
        ),
    ]
    if groups:
        statements.append(
            statement(
                "EncryptOurLogs",
                ["kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*"],
                "*",
                principal={"Service": sub("logs.${AWS::Region}.${AWS::URLSuffix}")},
                condition={"ArnLike": {"kms:EncryptionContext:aws:logs:arn": groups}},
            )
        )
    return {
        "Key": resource(
            "AWS::KMS::Key",
            {
                "Description": sub("strongroom, stack ${AWS::StackName}"),
                "EnableKeyRotation": True,
                "KeyPolicy": policy(statements),
                "PendingWindowInDays": 30,
            },
            retain=True,
        ),
        "KeyAlias": resource(
            "AWS::KMS::Alias", {"AliasName": sub("alias/${AWS::StackName}"), "TargetKeyId": ref("Key")}
        ),
    }
