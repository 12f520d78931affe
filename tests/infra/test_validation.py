"""The request validator: wrong values that the SDK lets through are named, right requests pass."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from botocore.session import Session

from infra.templates.instances import BATCH, BATCH_HOST_IMAGE, ENDPOINT, HOST_IMAGES
from infra.validation import faults, readable
from tests.infra.templates.loading import rendered

ROLE = "arn:aws:iam::123456789012:role/strongroom"
KEY = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/strongroom@sha256:" + "0" * 64
MODEL: dict[str, Any] = {
    "ModelName": "strongroom",
    "ExecutionRoleArn": ROLE,
    "EnableNetworkIsolation": True,
    "PrimaryContainer": {
        "Image": IMAGE,
        "ModelDataSource": {
            "S3DataSource": {"S3Uri": "s3://b/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}
        },
    },
    "VpcConfig": {"SecurityGroupIds": ["sg-0"], "Subnets": ["subnet-0"]},
}
CONFIG: dict[str, Any] = {
    "EndpointConfigName": "strongroom",
    "KmsKeyId": KEY,
    "ProductionVariants": [
        {
            "VariantName": "AllTraffic",
            "ModelName": "strongroom",
            "InitialInstanceCount": 1,
            "InstanceType": "ml.g6e.2xlarge",
            "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }
    ],
}
SERVICES = [
    "sagemaker",
    "sagemaker-runtime",
    "application-autoscaling",
    "cloudformation",
    "cloudwatch",
    "ec2",
]
SERVICES += ["ecr", "kms", "logs", "s3", "service-quotas", "sts"]


def changed(request: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(request)
    held: Any = made
    for step in path[:-1]:
        held = held[step]
    held[path[-1]] = value
    return made


def filled(text: Any) -> dict[str, Any]:
    """Return a rendered job request with every placeholder filled as CloudFormation would."""
    given = {"Bucket": "bucket", "KmsKey": KEY, "Model": "model", "Type": "ml.g6e.2xlarge", "Role": ROLE}
    given |= {"Image": IMAGE, "Base": "s3://b/m/", "Groups": "sg-0", "Subnets": 'subnet-0","subnet-1'}
    given |= {"Algorithm": "arn:aws:sagemaker:us-east-1:865070037744:algorithm/x"}
    loaded: dict[str, Any] = json.loads(
        re.sub(r"\$\{(\w+)\}", lambda found: given[found[1]], text["Fn::Sub"][0])
    )
    return loaded


def test_right_requests_pass() -> None:
    assert faults("sagemaker", "CreateModel", MODEL) == []
    assert faults("sagemaker", "CreateEndpointConfig", CONFIG) == []


VARIANT = ["ProductionVariants", 0]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ([*VARIANT, "InstanceType"], "ml.g99.large", "enum value set"),
        ([*VARIANT, "ContainerStartupHealthCheckTimeoutInSeconds"], 9000, "less than or equal to 3600"),
        ([*VARIANT, "ContainerStartupHealthCheckTimeoutInSeconds"], 1, "60"),
        ([*VARIANT, "RoutingConfig", "RoutingStrategy"], "ROUND_ROBIN", "enum value set"),
        ([*VARIANT, "InferenceAmiVersion"], "al2-ami", "enum value set"),
        (["EndpointConfigName"], "-x", "regular expression pattern"),
        (["EndpointConfigName"], "x" * 64, "less than or equal to 63"),
        (["ProductionVariants"], [], "1"),
        (["ProductionVariants"], [CONFIG["ProductionVariants"][0]] * 11, "less than or equal to 10"),
        (["KmsKeyId"], 5, "Invalid type"),
        (["Unheard"], "x", "Unknown parameter"),
        (["DataCaptureConfig"], {}, "copies prompts"),
        ([*VARIANT, "EnableSSMAccess"], True, "opens prompts"),
        ([*VARIANT, "CoreDumpConfig"], {"DestinationS3Uri": "s3://b/x"}, "opens prompts"),
        ([*VARIANT, "InstancePools"], [{"InstanceType": "ml.g5.xlarge", "Priority": 1}], "exactly one"),
    ],
)
def test_a_planted_wrong_value_is_named(path: list[Any], value: Any, sentence: str) -> None:
    found = faults("sagemaker", "CreateEndpointConfig", changed(CONFIG, path, value))
    assert any(sentence in fault for fault in found), found


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["EnableNetworkIsolation"], False, "must be true"),
        (["PrimaryContainer", "Image"], IMAGE.replace("@sha256:", ":v"), "by digest"),
        (["PrimaryContainer", "ModelDataSource", "S3DataSource", "S3Uri"], "s3://b/m", "end in `/`"),
        (["PrimaryContainer", "ModelDataSource", "S3DataSource", "CompressionType"], "Zip", "enum value set"),
        (["VpcConfig", "Subnets"], ["subnet-0"] * 17, "less than or equal to 16"),
        (["ExecutionRoleArn"], "role", "regular expression pattern"),
        (["PrimaryContainer", "Environment"], {"a b": "x"}, "regular expression pattern"),
    ],
)
def test_a_wrong_model_is_named(path: list[Any], value: Any, sentence: str) -> None:
    found = faults("sagemaker", "CreateModel", changed(MODEL, path, value))
    assert any(sentence in fault for fault in found), found


def test_all_faults_come_at_once() -> None:
    wrong = changed(changed(CONFIG, [*VARIANT, "InstanceType"], "x"), ["EndpointConfigName"], "-")
    assert len(faults("sagemaker", "CreateEndpointConfig", wrong)) == 2


@pytest.mark.parametrize("source", ["image", "package"])
@pytest.mark.parametrize("network", ["newvpc", "ownvpc"])
def test_the_templates_job_requests_are_requests_that_aws_would_take(source: str, network: str) -> None:
    outputs = rendered(f"batch-{source}-{network}")["Outputs"]
    transform = filled(outputs["TransformJobRequest"]["Value"]) | {"TransformJobName": "job"}
    assert faults("sagemaker", "CreateTransformJob", transform) == []
    outputs = rendered(f"train-{source}-{network}")["Outputs"]
    training = filled(outputs["TrainingJobRequest"]["Value"]) | {"TrainingJobName": "job"}
    assert faults("sagemaker", "CreateTrainingJob", training) == []
    assert training["VpcConfig"]["Subnets"] == ["subnet-0", "subnet-1"]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["TransformResources", "VolumeKmsKeyId"], KEY, "local disks"),
        (["TransformResources", "InstanceType"], "ml.p5.48xlarge", "not offered"),
        (["MaxPayloadInMB"], 7, "above 100"),
        (["Environment"], {f"A{index}": "x" for index in range(17)}, "at most 16"),
        (["TransformInput", "SplitType"], "Comma", "enum value set"),
    ],
)
def test_a_wrong_batch_job_is_named(path: list[Any], value: Any, sentence: str) -> None:
    right = filled(rendered("batch-image-ownvpc")["Outputs"]["TransformJobRequest"]["Value"])
    found = faults("sagemaker", "CreateTransformJob", changed(right | {"TransformJobName": "j"}, path, value))
    assert any(sentence in fault for fault in found), found


def test_a_package_for_the_marketplace_has_few_environment_entries() -> None:
    container = {"Image": IMAGE, "Environment": {f"A{index}": "x" for index in range(17)}}
    request = {"InferenceSpecification": {"Containers": [container]}}
    assert any("at most 16" in fault for fault in faults("sagemaker", "CreateModelPackage", request))


@pytest.mark.parametrize("service", SERVICES)
def test_every_pattern_of_the_services_in_use_can_be_read(service: str) -> None:
    model = Session().get_service_model(service)
    patterns = {model.shape_for(name).metadata.get("pattern") for name in model.shape_names} - {None}
    assert patterns
    for pattern in patterns:
        readable(pattern)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"\p{ASCII}*", "plain", "é"),
        (r"\A\S[\p{Print}]*\z", "id 1", " id"),
        (r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", "Größe 1", "a!"),
        (r"[\u0020-\uD7FF\uE000-\uFFFD\uD800\uDC00-\uDBFF\uDFFF\t]*", "\N{GRINNING FACE}", "\n"),
        (r"([\p{L}_]*)${1,128}", "a_b", "a-b"),
        (r"arn:[\p{Alnum}\-]+:x", "arn:aws-cn:x", "arn:aws_cn:x"),
    ],
)
def test_javas_patterns_mean_in_python_what_they_mean_there(pattern: str, right: str, wrong: str) -> None:
    assert readable(pattern).fullmatch(right)
    assert not readable(pattern).fullmatch(wrong)


def test_the_instance_tables_are_a_part_of_the_service_models() -> None:
    model = Session().get_service_model("sagemaker")
    assert set(ENDPOINT) <= set(model.shape_for("ProductionVariantInstanceType").enum)
    assert set(ENDPOINT) <= set(model.shape_for("TrainingInstanceType").enum)
    assert set(BATCH) <= set(model.shape_for("TransformInstanceType").enum)
    assert not set(ENDPOINT) - set(BATCH) & set(model.shape_for("TransformInstanceType").enum)
    assert set(HOST_IMAGES.values()) <= set(model.shape_for("ProductionVariantInferenceAmiVersion").enum)
    assert readable(model.shape_for("TransformAmiVersion").metadata["pattern"]).fullmatch(BATCH_HOST_IMAGE)
