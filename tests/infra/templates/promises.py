"""What every template promises, each as a function that returns the places where it is broken.

Owns: the promises. Must not know: how templates are made; they are read as CloudFormation reads them.
Invariant: each promise has a mutant (`mutants`) that breaks it and nothing else needs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.infra.templates.loading import Template, listed, of_type, statements, texts, values

Promise = Callable[[Template], list[str]]
PROMISES: dict[str, Promise] = {}
CLOSED = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")


def promise(check: Promise) -> Promise:
    PROMISES[check.__name__] = check
    return check


def broken(template: Template) -> dict[str, list[str]]:
    """Return the promises that `template` breaks, and where."""
    found = {name: check(template) for name, check in PROMISES.items()}
    return {name: places for name, places in found.items() if places}


def traffic(template: Template) -> str:
    name: str = template["Metadata"]["strongroom"]["variant"]
    return name.partition("-")[0]


@promise
def models_are_isolated(template: Template) -> list[str]:
    return [
        name
        for name, held in of_type(template, "SageMaker::Model").items()
        if held.get("EnableNetworkIsolation") is not True
    ]


@promise
def component_configs_are_isolated(template: Template) -> list[str]:
    if traffic(template) != "component":
        return []
    wanted = ("ExecutionRoleArn", "VpcConfig")
    return [
        name
        for name, held in of_type(template, "SageMaker::EndpointConfig").items()
        if held.get("EnableNetworkIsolation") is not True or not all(key in held for key in wanted)
    ]


@promise
def training_requests_are_isolated(template: Template) -> list[str]:
    if traffic(template) != "train":
        return []
    text = " ".join(texts(template["Outputs"]["TrainingJobRequest"]["Value"]))
    wanted = ('"EnableNetworkIsolation":true', '"EnableInterContainerTrafficEncryption":true', '"VpcConfig"')
    return [part for part in wanted if part not in text]


@promise
def models_lie_in_the_vpc(template: Template) -> list[str]:
    models = of_type(template, "SageMaker::Model").items()
    return [
        name for name, held in models if {"SecurityGroupIds", "Subnets"} - held.get("VpcConfig", {}).keys()
    ]


@promise
def there_is_no_internet_gateway(template: Template) -> list[str]:
    kinds = ("EC2::InternetGateway", "EC2::VPCGatewayAttachment", "EC2::EgressOnlyInternetGateway")
    return [name for kind in kinds for name in of_type(template, kind)]


@promise
def there_is_no_nat(template: Template) -> list[str]:
    return list(of_type(template, "EC2::NatGateway")) + list(of_type(template, "EC2::EIP"))


@promise
def there_is_no_route_out(template: Template) -> list[str]:
    return list(of_type(template, "EC2::Route"))


@promise
def no_rule_is_open_to_all(template: Template) -> list[str]:
    groups = of_type(template, "EC2::SecurityGroup") | of_type(template, "EC2::SecurityGroupIngress")
    groups |= of_type(template, "EC2::SecurityGroupEgress")
    return [
        name
        for name, held in groups.items()
        if set(values(held, "CidrIp") + values(held, "CidrIpv6")) - {"255.255.255.255/32"}
    ]


@promise
def every_group_says_what_goes_out(template: Template) -> list[str]:
    groups = of_type(template, "EC2::SecurityGroup").items()  # without a rule of its own, everything may
    return [name for name, held in groups if not held.get("SecurityGroupEgress")]


@promise
def nothing_goes_into_the_model(template: Template) -> list[str]:
    found = [
        name
        for name, held in of_type(template, "EC2::SecurityGroup").items()
        if "SecurityGroupIngress" in held
    ]
    rules = of_type(template, "EC2::SecurityGroupIngress").items()
    return found + [
        name for name, held in rules if held["GroupId"] != {"Fn::GetAtt": ["EndpointSg", "GroupId"]}
    ]


@promise
def subnets_give_no_public_address(template: Template) -> list[str]:
    subnets = of_type(template, "EC2::Subnet").items()
    return [name for name, held in subnets if held.get("MapPublicIpOnLaunch") is not False]


@promise
def subnets_lie_in_two_zones(template: Template) -> list[str]:
    zones = [str(held["AvailabilityZone"]) for held in of_type(template, "EC2::Subnet").values()]
    return [] if len(zones) in (0, 2) and len(set(zones)) == len(zones) else zones


@promise
def endpoint_policies_are_limited(template: Template) -> list[str]:
    found = []
    for name, held in of_type(template, "EC2::VPCEndpoint").items():
        for statement in statements(held.get("PolicyDocument", {"Statement": [{}]})):
            scope = statement.get("Condition", {}).get("StringEquals", {})
            if not {"aws:PrincipalAccount", "aws:ResourceAccount"} & scope.keys():
                found.append(name)
    return found


@promise
def the_runtime_endpoint_serves_this_endpoint_only(template: Template) -> list[str]:
    if traffic(template) not in ("realtime", "async", "component") or not of_type(template, "EC2::VPC"):
        return []
    held = of_type(template, "EC2::VPCEndpoint").get("RuntimeEndpoint")
    if held is None or held.get("PrivateDnsEnabled") is not True or "PolicyDocument" not in held:
        return ["RuntimeEndpoint"]
    calls = statements(held["PolicyDocument"])[0]
    narrow = all("sagemaker:Invoke" in action for action in listed(calls["Action"]))
    return [] if narrow and "${EndpointName}" in str(calls["Resource"]) else ["RuntimeEndpoint"]


@promise
def s3_has_a_gateway(template: Template) -> list[str]:
    if not of_type(template, "EC2::VPC"):
        return []
    held = of_type(template, "EC2::VPCEndpoint").get("S3Endpoint", {})
    return [] if held.get("VpcEndpointType") == "Gateway" and "PolicyDocument" in held else ["S3Endpoint"]


@promise
def volumes_have_a_key(template: Template) -> list[str]:
    configs = of_type(template, "SageMaker::EndpointConfig").items()
    return [name for name, held in configs if not held.get("KmsKeyId")]


@promise
def logs_have_a_key_and_a_retention(template: Template) -> list[str]:
    days = template["Parameters"]["LogRetentionDays"]["AllowedValues"]
    short = [] if min(int(day) for day in days) >= 365 else ["LogRetentionDays"]
    wanted = {"RetentionInDays": {"Ref": "LogRetentionDays"}, "KmsKeyId": {"Fn::GetAtt": ["Key", "Arn"]}}
    groups = of_type(template, "Logs::LogGroup").items()
    return short + [name for name, held in groups if any(held.get(key) != wanted[key] for key in wanted)]


@promise
def endpoints_have_their_log_groups(template: Template) -> list[str]:
    found = of_type(template, "SageMaker::Endpoint") | of_type(template, "SageMaker::InferenceComponent")
    groups = {f"{name.replace('InferenceComponent', 'Component')}Logs" for name in found}
    return sorted(groups - of_type(template, "Logs::LogGroup").keys())


@promise
def topics_have_our_key(template: Template) -> list[str]:
    topics = of_type(template, "SNS::Topic").items()
    return [name for name, held in topics if held.get("KmsMasterKeyId") != {"Ref": "Key"}]


@promise
def keys_rotate_and_stay(template: Template) -> list[str]:
    return [
        name
        for name, held in of_type(template, "KMS::Key").items()
        if held.get("EnableKeyRotation") is not True or _deleted(template, name)
    ]


def _deleted(template: Template, name: str) -> bool:
    held = template["Resources"][name]
    return {held.get("DeletionPolicy"), held.get("UpdateReplacePolicy")} != {"Retain"}


@promise
def buckets_stay(template: Template) -> list[str]:
    return [name for name in of_type(template, "S3::Bucket") if _deleted(template, name)]


@promise
def buckets_are_closed(template: Template) -> list[str]:
    return [
        name
        for name, held in of_type(template, "S3::Bucket").items()
        if [held["PublicAccessBlockConfiguration"].get(flag) for flag in CLOSED] != [True] * 4
        or held["OwnershipControls"] != {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        or "AccessControl" in held
    ]


@promise
def payloads_are_encrypted_and_expire(template: Template) -> list[str]:
    held = of_type(template, "S3::Bucket").get("DataBucket")
    if held is None:
        return []
    algorithms = values(held["BucketEncryption"], "SSEAlgorithm")
    return [] if algorithms == ["aws:kms"] and values(held, "ExpirationInDays") else ["DataBucket"]


@promise
def buckets_refuse_plain_http(template: Template) -> list[str]:
    covered = {
        held["Bucket"]["Ref"]
        for held in of_type(template, "S3::BucketPolicy").values()
        for statement in statements(held["PolicyDocument"])
        if statement["Effect"] == "Deny"
        and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    }
    return sorted(of_type(template, "S3::Bucket").keys() - covered)


@promise
def roles_trust_one_service_for_this_account(template: Template) -> list[str]:
    found = []
    for name, held in of_type(template, "IAM::Role").items():
        for statement in statements(held["AssumeRolePolicyDocument"]):
            account = statement.get("Condition", {}).get("StringEquals", {}).get("aws:SourceAccount")
            if account != {"Ref": "AWS::AccountId"} or list(statement["Principal"]) != ["Service"]:
                found.append(name)
    return found


@promise
def no_managed_policy_of_aws_is_attached(template: Template) -> list[str]:
    return [name for name, held in of_type(template, "IAM::Role").items() if held.get("ManagedPolicyArns")]


def _policies(template: Template) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, statement)
        for name, held in of_type(template, "IAM::ManagedPolicy").items()
        for statement in statements(held["PolicyDocument"])
    ]


@promise
def no_action_is_a_wildcard(template: Template) -> list[str]:
    return [
        f"{name}.{statement['Sid']}"
        for name, statement in _policies(template)
        if any("*" in action for action in listed(statement["Action"]))
    ]


@promise
def only_what_has_no_scope_is_unscoped(template: Template) -> list[str]:
    unscoped = {"EcrToken", "Metrics", "Network", "OpenAIRoute"}
    return [
        f"{name}.{statement['Sid']}"
        for name, statement in _policies(template)
        if "*" in listed(statement["Resource"]) and statement["Sid"] not in unscoped
    ]


@promise
def every_wildcard_has_a_reason(template: Template) -> list[str]:
    found = []
    for name, statement in _policies(template):
        notes = template["Resources"][name].get("Metadata", {}).get("strongroom", {}).get("reasons", {})
        if "*" in str(statement["Resource"]) and not notes.get(statement["Sid"], "").endswith("."):
            found.append(f"{name}.{statement['Sid']}")
    return found


@promise
def grants_are_for_aws_only(template: Template) -> list[str]:
    return [
        f"{name}.{statement['Sid']}"
        for name, statement in _policies(template)
        if "kms:CreateGrant" in listed(statement["Action"])
        and statement.get("Condition") != {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    ]


@promise
def key_policies_bind_services_to_the_account(template: Template) -> list[str]:
    found = []
    for name, held in of_type(template, "KMS::Key").items():
        for statement in statements(held["KeyPolicy"]):
            if "Service" in statement["Principal"] and not statement.get("Condition"):
                found.append(f"{name}.{statement['Sid']}")
    return found


@promise
def content_is_not_captured(template: Template) -> list[str]:
    named = ("DataCaptureConfig", "CoreDumpConfig", "EnableSSMAccess", "IncludeInferenceResponseIn")
    text = " ".join(texts(template["Outputs"]))
    return [name for name in named if values(template["Resources"], name) or name in text]


@promise
def images_come_by_digest(template: Template) -> list[str]:
    held = template["Parameters"].get("ImageUri")
    if held is None:
        return []
    pattern = re.compile(held.get("AllowedPattern", ".*"))
    tagged = "123456789012.dkr.ecr.us-east-1.amazonaws.com/strongroom:latest"
    digest = tagged.replace(":latest", "@sha256:" + "a" * 64)
    return [] if pattern.fullmatch(digest) and not pattern.fullmatch(tagged) else ["ImageUri"]
