"""One variant's whole template.

Owns: the sections, tags, conditions, outputs, the form of the console. Must not know: what a resource
contains. Invariant: a parameter that nothing uses, or a condition that nothing names, is left out.
"""

from __future__ import annotations

import json
from typing import Any, Final

from infra import report
from infra.templates import alarms, endpoint, iam, jobs, keys, network, operation, params, scaling, storage
from infra.templates.accounts import MARKETPLACE
from infra.templates.instances import ENDPOINT, HOST_IMAGES
from infra.templates.intrinsics import (
    COMPONENT_NAME,
    ENDPOINT_ARN,
    Properties,
    att,
    equals,
    negate,
    ref,
    sub,
)
from infra.templates.resource import Resources
from infra.templates.variants import Variant

Template = dict[str, Any]

CONDITIONS: Final[dict[str, Properties]] = {
    "WithArchive": equals(ref("ModelLayout"), "TarGz"),
    "WithBudget": negate(equals(ref("MonthlyBudgetUsd"), 0)),
    "WithCanary": equals(ref("DeploymentStyle"), "BLUE_GREEN"),
    "WithModelDataKey": negate(equals(ref("ModelDataKeyArn"), "")),
    "WithOpenAIRoute": equals(ref("OpenAIRoute"), "yes"),
    "WithOperatorEndpoints": equals(ref("OperatorEndpoints"), "yes"),
    "WithOwnTopic": equals(ref("AlarmTopicArn"), ""),
    "WithPools": negate(equals(ref("InstanceType2"), "")),
    "WithPrefixRouting": equals(ref("Routing"), "PREFIX_AWARE"),
    "WithRolling": equals(ref("DeploymentStyle"), "ROLLING"),
    "WithThirdPool": negate(equals(ref("InstanceType3"), "")),
    "WithVolume": negate(equals(ref("VolumeSizeGiB"), 0)),
    "WithVolumeKey": negate(equals(ref("VolumeKeyArn"), "")),
    "WithZero": equals(ref("MinInstances"), 0),
}
# Types that take `Tags`, and those that call them something else.
UNTAGGED: Final = frozenset(
    {
        "AWS::ApplicationAutoScaling::ScalableTarget",
        "AWS::ApplicationAutoScaling::ScalingPolicy",
        "AWS::Budgets::Budget",
        "AWS::CloudWatch::Dashboard",
        "AWS::EC2::SecurityGroupIngress",
        "AWS::EC2::SubnetRouteTableAssociation",
        "AWS::Events::Rule",
        "AWS::IAM::ManagedPolicy",
        "AWS::KMS::Alias",
        "AWS::S3::BucketPolicy",
        "AWS::SNS::TopicPolicy",
    }
)
TITLES: Final = {
    "realtime": "real-time endpoint that scales by requests in flight",
    "async": "asynchronous endpoint that scales to zero by its backlog",
    "component": "endpoint with an inference component that scales to zero",
    "batch": "batch transform",
    "train": "training of adapters",
}


def build(variant: Variant) -> Template:
    """Return the template as CloudFormation reads it."""
    made = _resources(variant)
    _tag(made)
    body: Template = {"Resources": made, "Outputs": _outputs(variant)}
    mappings = _mappings(variant)
    if mappings:
        body["Mappings"] = mappings
    body["Conditions"] = _used_conditions(body)
    body["Parameters"] = {parameter.name: _parameter(parameter, variant) for parameter in params.of(variant)}
    head: Template = {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"Strongroom {report.version()}: {TITLES[variant.traffic]}, {describe(variant)}",
        "Metadata": {
            "AWS::CloudFormation::Interface": _form(variant),
            "strongroom": {"variant": variant.name, "version": report.version()},
        },
    }
    order = ("Parameters", "Mappings", "Conditions", "Resources", "Outputs")
    return head | {section: body[section] for section in order if section in body}


def describe(variant: Variant) -> str:
    """Return source and network in words."""
    source = "from an image and a sealed model" if variant.source == "image" else "from AWS Marketplace"
    where = "in a new isolated VPC" if variant.network == "newvpc" else "in a VPC of yours"
    return f"{source}, {where}"


def _resources(variant: Variant) -> Resources:
    rollback = alarms.rollback_names(variant)
    made = keys.resources(variant) | storage.resources(variant)
    if variant.network == "newvpc":
        made |= network.resources(variant)
    made |= iam.resources(variant, rollback) | alarms.resources(variant)
    if variant.traffic != "train":
        made |= endpoint.resources(variant, rollback)
    if variant.has_endpoint:
        made |= scaling.resources(variant)
    return made | operation.resources(variant)


def _tag(made: Resources) -> None:
    tags = [
        {"Key": "strongroom:stack", "Value": ref("AWS::StackName")},
        {"Key": "strongroom:version", "Value": report.version()},
    ]
    for found in made.values():
        if found["Type"] not in UNTAGGED:
            found["Properties"]["Tags"] = tags
        if found["Type"] == "AWS::Budgets::Budget":
            found["Properties"]["ResourceTags"] = tags


def _mappings(variant: Variant) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if variant.has_endpoint:
        made["HostImages"] = {cuda: {"Ami": image} for cuda, image in HOST_IMAGES.items()}
        # 98 percent of each GPU: the platform's figure is their sum.
        made["InstanceTypes"] = {name: {"GpuMemoryAlarm": 98 * kind.gpus} for name, kind in ENDPOINT.items()}
    if variant.source == "package":
        made["MarketplaceAccounts"] = {
            region: {"Account": account} for region, account in MARKETPLACE.items()
        }
    return made


def _used_conditions(body: Template) -> dict[str, Any]:
    text = json.dumps(body)
    return {name: rule for name, rule in CONDITIONS.items() if f'"{name}"' in text}


def _parameter(parameter: params.Parameter, variant: Variant) -> dict[str, Any]:
    made: dict[str, Any] = {"Description": parameter.text, "Type": parameter.kind}
    default = params.default_of(parameter, variant)
    if default is not None:
        made["Default"] = default
    choices = params.choices_of(parameter, variant)
    if choices:
        made["AllowedValues"] = [str(choice) for choice in choices]
        if default is not None:
            made["Default"] = str(default)
    elif parameter.kind == "Number":
        made["MinValue"], made["MaxValue"] = params.low_of(parameter, variant), parameter.high
    if parameter.pattern:
        made["AllowedPattern"] = parameter.pattern
    if parameter.constraint:
        made["ConstraintDescription"] = parameter.constraint
    return made


def _form(variant: Variant) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for parameter in params.of(variant):
        groups.setdefault(parameter.group, []).append(parameter.name)
    return {
        "ParameterGroups": [
            {"Label": {"default": label}, "Parameters": names} for label, names in groups.items()
        ]
    }


def _outputs(variant: Variant) -> dict[str, Any]:
    made: dict[str, Any] = {
        "ExecutionRoleArn": ("Role that the platform takes on.", att("ExecutionRole", "Arn")),
        "KeyArn": ("Key of the stack; it stays when the stack is deleted.", att("Key", "Arn")),
    }
    if variant.has_data:
        made["DataBucketName"] = ("Bucket of payloads and results; it stays.", ref("DataBucket"))
        made["AccessLogBucketName"] = ("Bucket of access logs; it stays.", ref("AccessLogBucket"))
    if variant.traffic == "batch":
        text = "Input of aws sagemaker create-transform-job --transform-job-name NAME --cli-input-json."
        made["TransformJobRequest"] = (text, jobs.request(variant))
    if variant.traffic == "train":
        text = "Input of aws sagemaker create-training-job --training-job-name NAME --cli-input-json."
        made["TrainingJobRequest"] = (text, jobs.request(variant))
    if variant.has_endpoint:
        made |= _endpoint_outputs(variant)
    return {name: {"Description": text, "Value": value} for name, (text, value) in made.items()}


def _endpoint_outputs(variant: Variant) -> dict[str, Any]:
    made: dict[str, Any] = {
        "EndpointArn": ("ARN of the endpoint.", ENDPOINT_ARN),
        "InvokerPolicyArn": ("Attach it to the roles of callers.", ref("InvokerPolicy")),
        "LogGroupName": ("Where the container's lines go.", ref("EndpointLogs")),
        "DashboardName": ("Name of the dashboard.", ref("Dashboard")),
    }
    url = "https://runtime.sagemaker.${AWS::Region}.${AWS::URLSuffix}/endpoints/${EndpointName}"
    call = "aws sagemaker-runtime invoke-endpoint --endpoint-name ${EndpointName}"
    if variant.traffic == "component":
        made["InferenceComponentName"] = ("Name of the component.", COMPONENT_NAME)
        url += "/inference-components/${EndpointName}-ic"
        call += " --inference-component-name ${EndpointName}-ic"
    if variant.traffic == "async":
        uri = "s3://${DataBucket}/input/request.json"
        call = "aws sagemaker-runtime invoke-endpoint-async --endpoint-name ${EndpointName}"
        command = f"{call} --input-location {uri}"
    else:
        made["OpenAIBaseUrl"] = (
            "Base URL for OpenAI clients; needs a bearer token.",
            sub(url + "/openai/v1"),
        )
        command = f"{call} --content-type application/json --body fileb://request.json answer.json"
    made["InvokeCommand"] = ("One call.", sub(command))
    if variant.network == "newvpc":
        made["ClientSecurityGroupId"] = ("Attach it to applications that call.", att("ClientSg", "GroupId"))
    return made
