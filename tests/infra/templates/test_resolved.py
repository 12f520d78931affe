"""Templates with conditions worked out: what reaches AWS is what its model takes, whatever is chosen."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest

from infra.templates.instances import HOST_IMAGES
from infra.templates.variants import ALL
from infra.validation import faults
from tests.infra.templates.loading import of_type
from tests.infra.templates.resolving import ABSENT, KEY, Resolver

ARN = "arn:aws:kms:eu-west-1:210987654321:key/11111111-1111-1111-1111-111111111111"
SERVING = [variant.name for variant in ALL if variant.has_endpoint]
CHOICES: list[dict[str, str]] = [
    {},
    {"InstanceType2": "ml.g5.12xlarge"},
    {"InstanceType2": "ml.g5.12xlarge", "InstanceType3": "ml.g6.12xlarge"},
    {"InstanceType3": "ml.g6.12xlarge"},
    {"Routing": "PREFIX_AWARE"},
    {"VolumeSizeGiB": "512", "VolumeKeyArn": ARN},
    {"DeploymentStyle": "BLUE_GREEN"},
    {"DeploymentStyle": "ALL_AT_ONCE"},
    {"CudaVersion": "12.2", "StartupTimeoutSeconds": "60", "DownloadTimeoutSeconds": "3600"},
    {"ModelLayout": "TarGz", "ModelKey": "m/model.tar.gz"},
    {"MinInstances": "2", "MaxInstances": "100", "AdmissionLimit": "512"},
]
CREATED = [variant.name for variant in ALL if variant.traffic != "train"]
# CloudFormation gives some properties to the call that makes a resource, others to the one that updates.
CALLS: list[tuple[str, str, dict[str, str], set[str]]] = [
    ("Model", "CreateModel", {"ModelName": "m"}, set()),
    ("EndpointConfig", "CreateEndpointConfig", {"EndpointConfigName": "c"}, set()),
    ("Endpoint", "CreateEndpoint", {}, {"RetainAllVariantProperties"}),
    ("Endpoint", "UpdateEndpoint", {}, {"Tags"}),
    ("InferenceComponent", "CreateInferenceComponent", {}, {"DeploymentConfig"}),
    ("InferenceComponent", "UpdateInferenceComponent", {}, {"EndpointName", "Tags", "VariantName"}),
]


def chosen(name: str, choice: dict[str, str]) -> Resolver:
    known = Resolver(name).values
    return Resolver(name, **{key: value for key, value in choice.items() if key in known})


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice) or "defaults")
@pytest.mark.parametrize("name", CREATED)
def test_what_reaches_sagemaker_is_what_its_model_accepts(name: str, choice: dict[str, str]) -> None:
    resolver = chosen(name, choice)
    for logical_id, operation, names, left_out in CALLS:
        if logical_id in resolver.template["Resources"]:
            held = resolver.properties(logical_id) | names
            request = {key: value for key, value in held.items() if key not in left_out}
            assert faults("sagemaker", operation, request) == [], operation


@pytest.mark.parametrize("name", SERVING)
def test_alarms_and_scaling_are_what_their_services_accept(name: str) -> None:
    resolver = Resolver(name)
    for logical_id in of_type(resolver.template, "CloudWatch::Alarm"):
        request = resolver.properties(logical_id) | {"AlarmName": logical_id}
        assert faults("cloudwatch", "PutMetricAlarm", request) == [], logical_id
    target = resolver.properties("ScalableTarget")
    assert faults("application-autoscaling", "RegisterScalableTarget", target) == []
    for logical_id in of_type(resolver.template, "ApplicationAutoScaling::ScalingPolicy"):
        held = resolver.properties(logical_id)
        shared = {key: target[key] for key in ("ServiceNamespace", "ResourceId", "ScalableDimension")}
        request = {key: value for key, value in held.items() if key != "ScalingTargetId"} | shared
        assert faults("application-autoscaling", "PutScalingPolicy", request) == [], logical_id


def variant_of(resolver: Resolver) -> dict[str, Any]:
    held: dict[str, Any] = resolver.properties("EndpointConfig")["ProductionVariants"][0]
    return held


def test_pools_replace_the_one_type_in_their_order() -> None:
    alone = variant_of(Resolver("realtime-image-newvpc"))
    assert alone["InstanceType"] == "ml.g6e.2xlarge" and "InstancePools" not in alone
    pools = variant_of(chosen("realtime-image-newvpc", CHOICES[2]))
    assert [(one["Priority"], one["InstanceType"]) for one in pools["InstancePools"]] == [
        (1, "ml.g6e.2xlarge"),
        (2, "ml.g5.12xlarge"),
        (3, "ml.g6.12xlarge"),
    ]
    assert "InstanceType" not in pools
    assert "InstancePools" not in variant_of(chosen("realtime-image-newvpc", CHOICES[3]))


@pytest.mark.parametrize(("cuda", "image"), HOST_IMAGES.items())
def test_the_cuda_version_chooses_the_host_image(cuda: str, image: str) -> None:
    assert variant_of(chosen("async-image-ownvpc", {"CudaVersion": cuda}))["InferenceAmiVersion"] == image


def test_a_key_of_the_customers_is_used_for_volumes_and_payloads() -> None:
    own, theirs = Resolver("async-image-newvpc"), Resolver("async-image-newvpc", VolumeKeyArn=ARN)
    assert own.properties("EndpointConfig")["KmsKeyId"] == KEY
    assert theirs.properties("EndpointConfig")["KmsKeyId"] == ARN
    output = theirs.properties("EndpointConfig")["AsyncInferenceConfig"]["OutputConfig"]
    assert output["KmsKeyId"] == ARN
    assert ARN in json.dumps(theirs.properties("DataBucket"))


@pytest.mark.parametrize(
    ("style", "present", "absent"),
    [
        ("ROLLING", "RollingUpdatePolicy", "BlueGreenUpdatePolicy"),
        ("BLUE_GREEN", "BlueGreenUpdatePolicy", "RollingUpdatePolicy"),
    ],
)
def test_the_style_chooses_how_an_update_goes(style: str, present: str, absent: str) -> None:
    held = Resolver("realtime-image-newvpc", DeploymentStyle=style).properties("Endpoint")["DeploymentConfig"]
    assert present in held and absent not in held and held["AutoRollbackConfiguration"]["Alarms"]
    if style == "BLUE_GREEN":
        assert held[present]["TrafficRoutingConfiguration"]["Type"] == "CANARY"


def test_a_package_goes_at_once_and_comes_from_its_regions_account() -> None:
    resolver = Resolver("realtime-package-newvpc")
    held = resolver.properties("Endpoint")["DeploymentConfig"]["BlueGreenUpdatePolicy"]
    assert held["TrafficRoutingConfiguration"]["Type"] == "ALL_AT_ONCE"
    container = resolver.properties("Model")["PrimaryContainer"]
    assert container["ModelPackageName"].startswith("arn:aws:sagemaker:us-east-1:865070037744:model-package/")
    assert "Image" not in container


def test_an_archive_is_read_as_one_object() -> None:
    source = chosen("realtime-image-ownvpc", CHOICES[9]).properties("Model")["PrimaryContainer"][
        "ModelDataSource"
    ]
    assert source["S3DataSource"] == {
        "CompressionType": "Gzip",
        "S3DataType": "S3Object",
        "S3Uri": "s3://example-models/m/model.tar.gz",
    }


@pytest.mark.parametrize(("least", "floor"), [("0", 0), ("1", 1), ("3", 1)])
def test_copies_go_to_zero_exactly_where_instances_may(least: str, floor: int) -> None:
    resolver = Resolver("component-image-newvpc", MinInstances=least)
    assert resolver.properties("ScalableTarget")["MinCapacity"] == floor
    assert variant_of(resolver)["ManagedInstanceScaling"]["MinInstanceCount"] == int(least)


@pytest.mark.parametrize(
    ("logical_id", "parameter", "off", "on"),
    [
        ("Budget", "MonthlyBudgetUsd", "0", "100"),
        ("AlarmTopic", "AlarmTopicArn", "arn:aws:sns:us-east-1:123456789012:mine", ""),
        ("ApiEndpoint", "OperatorEndpoints", "no", "yes"),
    ],
)
def test_what_is_optional_is_there_when_asked_for(logical_id: str, parameter: str, off: str, on: str) -> None:
    assert Resolver("realtime-image-newvpc", **{parameter: on}).properties(logical_id)
    with pytest.raises(KeyError):
        Resolver("realtime-image-newvpc", **{parameter: off}).properties(logical_id)


def test_alarms_go_to_the_topic_that_was_named() -> None:
    mine = "arn:aws:sns:us-east-1:123456789012:mine"
    resolver = Resolver("async-image-newvpc", AlarmTopicArn=mine)
    for logical_id in of_type(resolver.template, "CloudWatch::Alarm"):
        assert resolver.properties(logical_id)["AlarmActions"][-1] == mine


@pytest.mark.parametrize(("wanted", "count"), [("no", 1), ("yes", 2)])
def test_bearer_tokens_are_a_right_only_where_they_are_wanted(wanted: str, count: int) -> None:
    resolver = Resolver("realtime-image-newvpc", OpenAIRoute=wanted)
    assert len(resolver.properties("InvokerPolicy")["PolicyDocument"]["Statement"]) == count
    assert len(resolver.properties("RuntimeEndpoint")["PolicyDocument"]["Statement"]) == count


@pytest.mark.parametrize("name", SERVING)
def test_the_dashboard_is_json_that_shows_this_endpoint(name: str) -> None:
    body = json.loads(Resolver(name).properties("Dashboard")["DashboardBody"])
    metrics = [metric for widget in body["widgets"] for metric in widget["properties"]["metrics"]]
    assert len(body["widgets"]) >= 7 and all("strongroom" in " ".join(metric) for metric in metrics)


def test_thresholds_have_the_units_of_their_metrics() -> None:
    resolver = Resolver("realtime-image-newvpc", InstanceType="ml.g5.12xlarge", LatencyAlarmSeconds="30")
    assert resolver.properties("GpuMemory")["Threshold"] == 98 * 4  # a sum over four GPUs
    latency = resolver.properties("LatencyP99")
    assert latency["Threshold"] == 30 and latency["Metrics"][1]["Expression"] == "latency / 1000000"
    saturation = Resolver("realtime-image-newvpc", AdmissionLimit="64").properties("Saturation")
    assert saturation["Metrics"][1]["Expression"] == "100 * flying / 64" and saturation["Threshold"] == 90


@pytest.mark.parametrize("block", ["10.42.0.0/16", "192.168.7.0/24"])
def test_two_subnets_fit_into_any_range_that_is_allowed(block: str) -> None:
    resolver = Resolver("batch-image-newvpc", VpcCidr=block)
    subnets = [ipaddress.ip_network(resolver.properties(f"Subnet{one}")["CidrBlock"]) for one in "AB"]
    assert not subnets[0].overlaps(subnets[1]) and subnets[0].num_addresses == 128
    assert all(subnet.subnet_of(ipaddress.ip_network(block)) for subnet in subnets)


def test_nothing_absent_is_left_in_a_resolved_template() -> None:
    resolver = Resolver("component-package-newvpc")
    made = [resolver.resolve(held["Properties"]) for held in resolver.template["Resources"].values()]
    assert ABSENT not in made and "NoValue" not in json.dumps(made)
