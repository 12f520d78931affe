"""Broken templates: each breaks one promise, named beside it.

Owns: the mutations. Must not know: how a promise is checked.
Invariant: a mutation changes a copy of a committed template, and only what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.infra.templates.loading import Template

Change = Callable[[Template], None]
REALTIME, ASYNC, COMPONENT = "realtime-image-newvpc", "async-image-newvpc", "component-image-newvpc"
TRAIN, BATCH = "train-image-newvpc", "batch-image-ownvpc"
ENVIRONMENT = ("PrimaryContainer", "Environment")
OPENED = "a_sealed_model_is_opened_with_what_was_asked_for"


@dataclass(frozen=True)
class Mutant:
    """One broken template: what was done, to which variant, and the promise that must see it."""

    name: str
    variant: str
    killed_by: str
    change: Change


def _set(logical_id: str, *path: Any, to: Any) -> Change:
    """Return the change that puts `to` at `path` of a resource's properties."""

    def change(template: Template) -> None:
        held = template["Resources"][logical_id]["Properties"]
        for step in path[:-1]:
            held = held[step]
        held[path[-1]] = to

    return change


def _drop(logical_id: str, *path: Any) -> Change:
    """Return the change that takes a property away."""

    def change(template: Template) -> None:
        held = template["Resources"][logical_id]["Properties"]
        for step in path[:-1]:
            held = held[step]
        del held[path[-1]]

    return change


def _variable(name: str, to: str) -> Change:
    return _set("Model", *ENVIRONMENT, name, to=to)


def _add(kind: str, **properties: Any) -> Change:
    """Return the change that adds a resource."""

    def change(template: Template) -> None:
        template["Resources"]["Added"] = {"Type": f"AWS::{kind}", "Properties": properties}

    return change


def _without(*logical_ids: str) -> Change:
    def change(template: Template) -> None:
        for logical_id in logical_ids:
            del template["Resources"][logical_id]

    return change


def _deletable(logical_id: str) -> Change:
    def change(template: Template) -> None:
        template["Resources"][logical_id]["DeletionPolicy"] = "Delete"

    return change


def _statement(logical_id: str, sid: str, **fields: Any) -> Change:
    """Return the change of one statement of a policy; a field set to None goes."""

    def change(template: Template) -> None:
        held = template["Resources"][logical_id]["Properties"]
        for name in ("PolicyDocument", "KeyPolicy", "AssumeRolePolicyDocument"):
            for statement in held.get(name, {}).get("Statement", []):
                if statement.get("Sid") == sid:
                    statement.update(fields)
                    for field in [field for field, value in fields.items() if value is None]:
                        del statement[field]

    return change


def _parameter(name: str, **fields: Any) -> Change:
    def change(template: Template) -> None:
        template["Parameters"][name].update(fields)

    return change


def _undepend(template: Template) -> None:
    del template["Resources"]["ScalableTarget"]["DependsOn"]


def _unreasoned(template: Template) -> None:
    del template["Resources"]["ExecutionPolicy"]["Metadata"]["strongroom"]["reasons"]["Network"]


def _open_training(template: Template) -> None:
    value = template["Outputs"]["TrainingJobRequest"]["Value"]["Fn::Sub"]
    value[0] = value[0].replace('"EnableNetworkIsolation":true', '"EnableNetworkIsolation":false')


def _captured_job(template: Template) -> None:
    value = template["Outputs"]["TransformJobRequest"]["Value"]["Fn::Sub"]
    value[0] = value[0].replace("{", '{"DataCaptureConfig":{"DestinationS3Uri":"s3://x"},', 1)


_OPEN = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443}
_VARIANT = ("ProductionVariants", 0)
_NOTICES = ("AsyncInferenceConfig", "OutputConfig", "NotificationConfig")

_ISOLATION = (
    ("a plain model allowed", REALTIME, OPENED, _variable("STRONGROOM_ALLOW_PLAINTEXT", "on")),
    ("a key in the template", BATCH, OPENED, _variable("STRONGROOM_KEY", "env:KEY")),
    ("no vendor's root", ASYNC, OPENED, _drop("Model", *ENVIRONMENT, "STRONGROOM_VENDOR_ROOTS")),
    ("isolation off", REALTIME, "models_are_isolated", _set("Model", "EnableNetworkIsolation", to=False)),
    ("isolation removed", BATCH, "models_are_isolated", _drop("Model", "EnableNetworkIsolation")),
    (
        "config not isolated",
        COMPONENT,
        "component_configs_are_isolated",
        _drop("EndpointConfig", "EnableNetworkIsolation"),
    ),
    (
        "config without role",
        COMPONENT,
        "component_configs_are_isolated",
        _drop("EndpointConfig", "ExecutionRoleArn"),
    ),
    ("training not isolated", TRAIN, "training_requests_are_isolated", _open_training),
    ("model outside the VPC", REALTIME, "models_lie_in_the_vpc", _drop("Model", "VpcConfig")),
    ("internet gateway", REALTIME, "there_is_no_internet_gateway", _add("EC2::InternetGateway")),
    ("NAT gateway", REALTIME, "there_is_no_nat", _add("EC2::NatGateway", SubnetId={"Ref": "SubnetA"})),
    (
        "default route",
        REALTIME,
        "there_is_no_route_out",
        _add("EC2::Route", DestinationCidrBlock="0.0.0.0/0"),
    ),
    (
        "egress to all",
        REALTIME,
        "no_rule_is_open_to_all",
        _set("ModelSg", "SecurityGroupEgress", to=[{**_OPEN, "CidrIp": "0.0.0.0/0"}]),
    ),
    (
        "egress to all, IPv6",
        REALTIME,
        "no_rule_is_open_to_all",
        _set("ModelSg", "SecurityGroupEgress", to=[{**_OPEN, "CidrIpv6": "::/0"}]),
    ),
    ("egress unsaid", REALTIME, "every_group_says_what_goes_out", _drop("EndpointSg", "SecurityGroupEgress")),
    (
        "ingress to the model",
        REALTIME,
        "nothing_goes_into_the_model",
        _set("ModelSg", "SecurityGroupIngress", to=[_OPEN]),
    ),
    (
        "public subnet",
        REALTIME,
        "subnets_give_no_public_address",
        _set("SubnetA", "MapPublicIpOnLaunch", to=True),
    ),
    (
        "one zone",
        REALTIME,
        "subnets_lie_in_two_zones",
        _set("SubnetB", "AvailabilityZone", to={"Ref": "Zone1"}),
    ),
    ("S3 policy removed", REALTIME, "endpoint_policies_are_limited", _drop("S3Endpoint", "PolicyDocument")),
    (
        "S3 policy for every account",
        ASYNC,
        "endpoint_policies_are_limited",
        _statement("S3Endpoint", "OurAccountOnly", Condition=None),
    ),
    ("no S3 gateway", TRAIN, "s3_has_a_gateway", _without("S3Endpoint")),
    (
        "runtime policy for every action",
        REALTIME,
        "the_runtime_endpoint_serves_this_endpoint_only",
        _statement("RuntimeEndpoint", "OurAccountOnly", Action="*"),
    ),
    (
        "runtime policy for every endpoint",
        ASYNC,
        "the_runtime_endpoint_serves_this_endpoint_only",
        _statement("RuntimeEndpoint", "OurAccountOnly", Resource="*"),
    ),
    (
        "no private DNS",
        COMPONENT,
        "the_runtime_endpoint_serves_this_endpoint_only",
        _set("RuntimeEndpoint", "PrivateDnsEnabled", to=False),
    ),
)
_SECRETS = (
    ("volume without key", REALTIME, "volumes_have_a_key", _drop("EndpointConfig", "KmsKeyId")),
    ("log group without key", REALTIME, "logs_have_a_key_and_a_retention", _drop("EndpointLogs", "KmsKeyId")),
    (
        "logs kept a month",
        REALTIME,
        "logs_have_a_key_and_a_retention",
        _parameter("LogRetentionDays", AllowedValues=["30"]),
    ),
    (
        "endpoint makes its own log group",
        REALTIME,
        "endpoints_have_their_log_groups",
        _without("EndpointLogs"),
    ),
    ("topic without key", ASYNC, "topics_have_our_key", _drop("SuccessTopic", "KmsMasterKeyId")),
    (
        "topic with AWS's key",
        REALTIME,
        "topics_have_our_key",
        _set("AlarmTopic", "KmsMasterKeyId", to="alias/aws/sns"),
    ),
    ("key does not rotate", REALTIME, "keys_rotate_and_stay", _set("Key", "EnableKeyRotation", to=False)),
    ("key goes with the stack", REALTIME, "keys_rotate_and_stay", _deletable("Key")),
    ("bucket goes with the stack", ASYNC, "buckets_stay", _deletable("DataBucket")),
    (
        "bucket policy may be public",
        ASYNC,
        "buckets_are_closed",
        _set("DataBucket", "PublicAccessBlockConfiguration", "BlockPublicPolicy", to=False),
    ),
    ("bucket with an ACL", BATCH, "buckets_are_closed", _set("DataBucket", "AccessControl", to="Private")),
    (
        "payloads with S3's key",
        ASYNC,
        "payloads_are_encrypted_and_expire",
        _set("DataBucket", "BucketEncryption", to={}),
    ),
    (
        "payloads for ever",
        TRAIN,
        "payloads_are_encrypted_and_expire",
        _set("DataBucket", "LifecycleConfiguration", to={}),
    ),
    (
        "plain HTTP",
        ASYNC,
        "buckets_refuse_plain_http",
        _statement("DataBucketPolicy", "TlsOnly", Condition={}),
    ),
    ("image by tag", REALTIME, "images_come_by_digest", _parameter("ImageUri", AllowedPattern=".*")),
    ("data capture", REALTIME, "content_is_not_captured", _set("EndpointConfig", "DataCaptureConfig", to={})),
    (
        "core dumps",
        REALTIME,
        "content_is_not_captured",
        _set("EndpointConfig", *_VARIANT, "CoreDumpConfig", to={}),
    ),
    (
        "shell access",
        REALTIME,
        "content_is_not_captured",
        _set("EndpointConfig", *_VARIANT, "EnableSSMAccess", to=True),
    ),
    (
        "answers in notifications",
        ASYNC,
        "content_is_not_captured",
        _set("EndpointConfig", *_NOTICES, "IncludeInferenceResponseIn", to=["SUCCESS_NOTIFICATION_TOPIC"]),
    ),
    ("batch data capture", BATCH, "content_is_not_captured", _captured_job),
)
_RIGHTS = (
    (
        "trust without account",
        REALTIME,
        "roles_trust_one_service_for_this_account",
        _statement("ExecutionRole", "ThisAccountOnly", Condition={}),
    ),
    (
        "full access attached",
        REALTIME,
        "no_managed_policy_of_aws_is_attached",
        _set("ExecutionRole", "ManagedPolicyArns", to=["arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"]),
    ),
    (
        "s3:*",
        REALTIME,
        "no_action_is_a_wildcard",
        _statement("ExecutionPolicy", "ReadModel", Action=["s3:*"]),
    ),
    (
        "kms:*",
        REALTIME,
        "no_action_is_a_wildcard",
        _statement("ExecutionPolicy", "GrantKey", Action=["kms:*"]),
    ),
    (
        "every object",
        REALTIME,
        "only_what_has_no_scope_is_unscoped",
        _statement("ExecutionPolicy", "ReadModel", Resource="*"),
    ),
    ("wildcard without reason", REALTIME, "every_wildcard_has_a_reason", _unreasoned),
    (
        "grant for anybody",
        REALTIME,
        "grants_are_for_aws_only",
        _statement("ExecutionPolicy", "GrantKey", Condition=None),
    ),
    (
        "key for any account's alarms",
        REALTIME,
        "key_policies_bind_services_to_the_account",
        _statement("Key", "NotifyThroughTopics", Condition=None),
    ),
    (
        "rollback alarms unreadable",
        REALTIME,
        "the_role_may_read_the_rollback_alarms",
        _statement("ExecutionPolicy", "Rollback", Resource=[]),
    ),
)
_OPERATION = (
    ("alarm without action", REALTIME, "every_alarm_acts", _set("Errors5xx", "AlarmActions", to=[])),
    (
        "alarm on a dimension that is none",
        REALTIME,
        "alarms_use_real_dimensions",
        _set("Errors5xx", "Dimensions", 0, "Name", to="Endpoint"),
    ),
    (
        "no rollback alarms",
        REALTIME,
        "updates_roll_back_on_alarms",
        _set("Endpoint", "DeploymentConfig", "AutoRollbackConfiguration", "Alarms", to=[]),
    ),
    ("rollback on an alarm that is none", COMPONENT, "updates_roll_back_on_alarms", _without("LatencyP99")),
    ("never back from zero", COMPONENT, "what_goes_to_zero_comes_back", _without("FromZeroPolicy")),
    ("nothing asks to come back", ASYNC, "what_goes_to_zero_comes_back", _without("FromZero")),
    ("scaling before its target", REALTIME, "scaling_waits_for_its_target", _undepend),
    (
        "scaling by calls a minute",
        REALTIME,
        "scaling_counts_requests_in_flight",
        _set(
            "ScalingPolicy",
            "TargetTrackingScalingPolicyConfiguration",
            "PredefinedMetricSpecification",
            to={"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"},
        ),
    ),
    (
        "real-time to zero",
        REALTIME,
        "a_realtime_endpoint_keeps_an_instance",
        _parameter("MinInstances", MinValue=0),
    ),
    (
        "config with a name",
        REALTIME,
        "models_and_configs_have_no_name",
        _set("EndpointConfig", "EndpointConfigName", to="x"),
    ),
    (
        "waiting for capacity for ever",
        REALTIME,
        "capacity_is_not_waited_for_for_ever",
        _drop("EndpointConfig", *_VARIANT, "VariantInstanceProvisionTimeoutInSeconds"),
    ),
    (
        "default host image",
        REALTIME,
        "the_host_image_follows_the_cuda_version",
        _drop("EndpointConfig", *_VARIANT, "InferenceAmiVersion"),
    ),
    (
        "update forgets the count",
        REALTIME,
        "an_update_keeps_the_scaled_count",
        _drop("Endpoint", "RetainAllVariantProperties"),
    ),
    ("untagged", REALTIME, "every_resource_that_can_carries_the_stacks_tag", _drop("Vpc", "Tags")),
)
MUTANTS = tuple(Mutant(*fields) for fields in (*_ISOLATION, *_SECRETS, *_RIGHTS, *_OPERATION))
