"""Who may do what: the execution role, the callers' policy, and the sentence an auditor gets for each right.

Owns: every statement of the execution role and of the invoker policy, with its reason. Must not know: how the
resources it names are configured.
Invariant: no managed policy of AWS's, no `service:*`; each statement has a reason, and where its resource is
`*` the reason says why it cannot be narrower.
"""

from __future__ import annotations

from typing import Any, Final

from infra.templates.intrinsics import (
    ACCOUNT,
    COMPONENT_ARN,
    COMPONENT_LOGS,
    ENDPOINT_ARN,
    ENDPOINT_LOGS,
    JOB_LOGS,
    NO_VALUE,
    att,
    choose,
    log_group_arn,
    ref,
    sub,
)
from infra.templates.resource import Resources, policy, resource, statement
from infra.templates.variants import Variant

INVOKE: Final[dict[str, list[str]]] = {
    "realtime": ["sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"],
    "component": ["sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"],
    "async": ["sagemaker:InvokeEndpointAsync"],
}
NETWORK_ACTIONS: Final = [  # the list that AWS asks for with `VpcConfig`
    "ec2:CreateNetworkInterface",
    "ec2:CreateNetworkInterfacePermission",
    "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
]
REASONS: Final[dict[str, str]] = {
    "PullImage": "The platform pulls the image with this role, from the one repository.",
    "EcrToken": "Logging in to ECR has no resource scope; the token opens only what `PullImage` allows.",
    "ReadModel": "The platform downloads the sealed model, from its prefix alone.",
    "ListModel": "An uncompressed prefix is listed before it is downloaded.",
    "ReadInput": "The platform reads the payloads or samples; `*` stands for their names under one prefix.",
    "WriteOutput": "The platform writes answers, failures or results; `*` stands for their names.",
    "ListData": "The platform lists the bucket of payloads.",
    "Notify": "The platform publishes that a request succeeded or failed, to these two topics.",
    "Logs": "Log lines go into groups this stack made, with a key and a retention; `*` is the stream.",
    "JobLogs": "Jobs of a kind share one log group, which the platform makes; `*` is the stream.",
    "Metrics": "Publishing metrics has no resource scope; the condition names the platform's namespaces.",
    "Rollback": "The platform reads the alarms that roll an update back, with this role.",
    "Network": "The platform makes the network interfaces of `VpcConfig`; EC2 gives these calls no "
    "resource that is known beforehand.",
    "DecryptModel": "The model's bucket is encrypted with a key of yours; usable through S3 alone.",
    "UseKey": "Payloads and notifications are encrypted with this key; usable through S3 and SNS alone.",
    "GrantKey": "The platform passes the key on to the instances' volumes, and only an AWS service may.",
    "InvokeEndpoint": "Callers may invoke this endpoint and no other.",
    "WriteFlowLogs": "Flow logs go into the one group this stack made, with a key; `*` is the stream.",
    "OpenAIRoute": "A bearer token has no resource scope; what it opens is what `InvokeEndpoint` allows.",
}


def trust(service: str) -> dict[str, Any]:
    """Return who may take a role on: one service, for this account's sake alone."""
    return {
        "Sid": "ThisAccountOnly",
        "Effect": "Allow",
        "Principal": {"Service": service},
        "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"aws:SourceAccount": ACCOUNT}},
    }


def resources(variant: Variant, rollback_alarms: tuple[str, ...]) -> Resources:
    """Return the execution role with its policy, and what callers attach to theirs."""
    statements = _statements(variant, rollback_alarms)
    made: Resources = {
        "ExecutionRole": resource(
            "AWS::IAM::Role",
            {
                "AssumeRolePolicyDocument": policy([trust("sagemaker.amazonaws.com")]),
                "Description": "what the platform does for the container, which gets no credentials itself",
            },
        ),
        "ExecutionPolicy": resource(
            "AWS::IAM::ManagedPolicy",
            {
                "Description": "least rights of the execution role",
                "PolicyDocument": policy(statements),
                "Roles": [ref("ExecutionRole")],
            },
            skips=("CKV_AWS_111", "CKV_AWS_109"),
            metadata={"strongroom": {"reasons": {sid: REASONS[sid] for sid in _sids(statements)}}},
        ),
    }
    if variant.has_endpoint:
        calls: list[Any] = [statement("InvokeEndpoint", INVOKE[variant.traffic], invoked_arns(variant))]
        if variant.traffic != "async":
            calls.append(token_statement())
        made["InvokerPolicy"] = resource(
            "AWS::IAM::ManagedPolicy",
            {"Description": "attach to the roles of applications that call", "PolicyDocument": policy(calls)},
            metadata={"strongroom": {"reasons": {sid: REASONS[sid] for sid in _sids(calls)}}},
        )
    return made


def invoked_arns(variant: Variant) -> list[Any]:
    """Return what a caller invokes."""
    return [ENDPOINT_ARN, COMPONENT_ARN] if variant.traffic == "component" else [ENDPOINT_ARN]


def token_statement(principal: Any = None) -> dict[str, Any]:
    """Return the right to make bearer tokens, present where it is wanted."""
    condition = {"StringEquals": {"aws:PrincipalAccount": ACCOUNT}} if principal else None
    made = statement(
        "OpenAIRoute",
        ["sagemaker:CallWithBearerToken"],
        "*",
        principal=principal,
        condition=condition,
    )
    return choose("WithOpenAIRoute", made, NO_VALUE)


def _sids(statements: list[Any]) -> list[str]:
    return [(found.get("Fn::If") or [None, found])[1]["Sid"] for found in statements]


def _statements(variant: Variant, rollback_alarms: tuple[str, ...]) -> list[Any]:
    made: list[Any] = []
    if variant.source == "image":
        made += _image(variant)
    if variant.has_data:
        made += _data(variant)
    made += _telemetry(variant)
    if rollback_alarms:
        alarms = [att(name, "Arn") for name in rollback_alarms]
        made.append(statement("Rollback", ["cloudwatch:DescribeAlarms"], alarms))
    made.append(statement("Network", NETWORK_ACTIONS, "*"))
    grants = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    made.append(statement("GrantKey", ["kms:CreateGrant"], [volume_key_arn()], condition=grants))
    return made


def volume_key_arn() -> dict[str, Any]:
    """Return the key of volumes and payloads: the customer's, else the stack's."""
    return choose("WithVolumeKey", ref("VolumeKeyArn"), att("Key", "Arn"))


def _image(variant: Variant) -> list[Any]:
    key = "ModelTarKey" if variant.traffic == "batch" else "ModelKey"
    pull = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    bucket = "arn:${AWS::Partition}:s3:::${ModelBucketName}"
    decrypt = statement(
        "DecryptModel",
        ["kms:Decrypt"],
        [ref("ModelDataKeyArn")],
        condition={"StringLike": {"kms:ViaService": "s3.*.amazonaws.com"}},
    )
    return [
        statement("PullImage", pull, [ref("RepositoryArn")]),
        statement("EcrToken", ["ecr:GetAuthorizationToken"], "*"),
        statement("ReadModel", ["s3:GetObject"], [sub(f"{bucket}/${{{key}}}*")]),
        statement(
            "ListModel",
            ["s3:ListBucket"],
            [sub(bucket)],
            condition={"StringLike": {"s3:prefix": [sub(f"${{{key}}}*")]}},
        ),
        choose("WithModelDataKey", decrypt, NO_VALUE),
    ]


def _data(variant: Variant) -> list[Any]:
    write = [sub("${DataBucket.Arn}/output/*"), sub("${DataBucket.Arn}/failure/*")]
    read = [sub("${DataBucket.Arn}/input/*")]
    if variant.traffic == "train":  # a job on spot instances goes on from its own checkpoints
        write[1] = sub("${DataBucket.Arn}/checkpoints/*")
        read.append(write[1])
    made: list[Any] = [
        statement("ReadInput", ["s3:GetObject"], read),
        statement("WriteOutput", ["s3:AbortMultipartUpload", "s3:PutObject"], write),
        statement("ListData", ["s3:ListBucket"], [att("DataBucket", "Arn")]),
        statement(
            "UseKey",
            ["kms:Decrypt", "kms:GenerateDataKey"],
            [volume_key_arn(), att("Key", "Arn")],
            condition={"StringLike": {"kms:ViaService": ["s3.*.amazonaws.com", "sns.*.amazonaws.com"]}},
        ),
    ]
    if variant.traffic == "async":
        made.append(statement("Notify", ["sns:Publish"], [ref("SuccessTopic"), ref("ErrorTopic")]))
    return made


def _telemetry(variant: Variant) -> list[Any]:
    write = ["logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"]
    if variant.has_endpoint:
        groups = [ENDPOINT_LOGS, COMPONENT_LOGS] if variant.traffic == "component" else [ENDPOINT_LOGS]
        logs = statement("Logs", write, [log_group_arn(name + ":*") for name in groups])
    else:
        group = JOB_LOGS[variant.traffic]
        both = [log_group_arn(group), log_group_arn(group + ":*")]
        logs = statement("JobLogs", ["logs:CreateLogGroup", *write], both)
    spaces = {"StringLike": {"cloudwatch:namespace": "/aws/sagemaker/*"}}
    return [logs, statement("Metrics", ["cloudwatch:PutMetricData"], "*", condition=spaces)]
