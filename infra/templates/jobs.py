"""Batch and training: CloudFormation has no job resource, so the stack hands out a ready request.

Owns: the requests for CreateTransformJob and CreateTrainingJob, without the job's name. Must not know: who
sends them (`aws sagemaker create-... --cli-input-json`).
Invariant: no data capture, no key for volumes that are local disks (the API refuses it), isolation and
encryption between containers on; a transform job has at most 16 environment entries (these have none).
"""

from __future__ import annotations

import json
from typing import Any, Final

from infra.templates.endpoint import package_arn
from infra.templates.intrinsics import att, choose, ref, sub
from infra.templates.variants import Variant

BATCH_CONCURRENCY: Final = 16
BATCH_PAYLOAD_MB: Final = 6  # times the concurrency at most 100
BATCH_CALL_S: Final = 3600
TRAIN_S: Final = 86_400
TRAIN_VOLUME_GB: Final = 200
_VALUE = "\N{SECTION SIGN}"  # marks where a value goes; no JSON of ours holds one


def request(variant: Variant) -> dict[str, Any]:
    """Return the job's request as text, for an output."""
    return _transform() if variant.traffic == "batch" else _training(variant)


def _text(document: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return `document` as JSON in which `§Name§` is the value of that name."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    for name in values:
        text = text.replace(f'"{_VALUE}{name}[]{_VALUE}"', f"[${{{name}}}]")
        text = text.replace(f"{_VALUE}{name}{_VALUE}", f"${{{name}}}")
    assert _VALUE not in text, "a request names a value it was not given"
    return sub(text, **values)


def _at(name: str) -> str:
    return f"{_VALUE}{name}{_VALUE}"


def _transform() -> dict[str, Any]:
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{_at('Bucket')}/input/"}}
    document = {
        "BatchStrategy": "SingleRecord",
        "MaxConcurrentTransforms": BATCH_CONCURRENCY,
        "MaxPayloadInMB": BATCH_PAYLOAD_MB,
        "ModelClientConfig": {"InvocationsMaxRetries": 1, "InvocationsTimeoutInSeconds": BATCH_CALL_S},
        "ModelName": _at("Model"),
        "TransformInput": {
            "CompressionType": "None",
            "ContentType": "application/jsonlines",
            "DataSource": source,
            "SplitType": "Line",
        },
        "TransformOutput": {
            "Accept": "application/jsonlines",
            "AssembleWith": "Line",
            "KmsKeyId": _at("KmsKey"),
            "S3OutputPath": f"s3://{_at('Bucket')}/output/",
        },
        "TransformResources": {"InstanceCount": 1, "InstanceType": _at("Type")},
    }
    return _text(
        document,
        Bucket=ref("DataBucket"),
        KmsKey=_key(),
        Model=att("Model", "ModelName"),
        Type=ref("InstanceType"),
    )


def _key() -> dict[str, Any]:
    return choose("WithVolumeKey", ref("VolumeKeyArn"), att("Key", "Arn"))


def _channel(name: str, uri: str) -> dict[str, Any]:
    where = {"S3DataDistributionType": "FullyReplicated", "S3DataType": "S3Prefix", "S3Uri": uri}
    return {"ChannelName": name, "DataSource": {"S3DataSource": where}, "InputMode": "File"}


def _training(variant: Variant) -> dict[str, Any]:
    values = {
        "Bucket": ref("DataBucket"),
        "KmsKey": _key(),
        "Role": att("ExecutionRole", "Arn"),
        "Type": ref("InstanceType"),
    }
    channels = [_channel("training", f"s3://{_at('Bucket')}/input/")]
    if variant.source == "image":
        values["Image"], values["Base"] = ref("ImageUri"), sub("s3://${ModelBucketName}/${ModelKey}")
        algorithm = {"TrainingImage": _at("Image"), "TrainingInputMode": "File"}
        channels.append(_channel("model", _at("Base")))
    else:
        values["Algorithm"] = package_arn("algorithm", "AlgorithmName")
        algorithm = {"AlgorithmName": _at("Algorithm"), "TrainingInputMode": "File"}
    if variant.network == "ownvpc":
        values["Groups"] = {"Fn::Join": ['","', ref("SecurityGroupIds")]}
        values["Subnets"] = {"Fn::Join": ['","', ref("SubnetIds")]}
    else:
        values["Groups"] = att("ModelSg", "GroupId")
        values["Subnets"] = {"Fn::Join": ['","', [ref("SubnetA"), ref("SubnetB")]]}
    document = {
        "AlgorithmSpecification": algorithm,
        "CheckpointConfig": {"S3Uri": f"s3://{_at('Bucket')}/checkpoints/"},
        "EnableInterContainerTrafficEncryption": True,
        "EnableNetworkIsolation": True,
        "InputDataConfig": channels,
        "OutputDataConfig": {"KmsKeyId": _at("KmsKey"), "S3OutputPath": f"s3://{_at('Bucket')}/output/"},
        "ResourceConfig": {
            "InstanceCount": 1,
            "InstanceType": _at("Type"),
            "VolumeSizeInGB": TRAIN_VOLUME_GB,
        },
        "RoleArn": _at("Role"),
        "StoppingCondition": {"MaxRuntimeInSeconds": TRAIN_S},
        "VpcConfig": {"SecurityGroupIds": [_at("Groups")], "Subnets": [_at("Subnets")]},
    }
    return _text(document, **values)
