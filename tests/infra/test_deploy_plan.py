"""`deploy plan`: each fault is one line with its hint, against moto and, beyond it, recorded answers."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from infra.deploy import key_checks, local_checks, plan, remote_checks
from infra.deploy.aws import Aws
from infra.deploy.choices import Choices, read
from infra.deploy.findings import Finding
from infra.report import CommandError
from infra.templates import render
from infra.templates.variants import ALL
from tests.infra.recorded import Recorded, refusal

REGION = "us-east-1"
DIGEST = "sha256:" + "0" * 64


def example(template: str = "realtime-image-newvpc", **changes: str) -> Choices:
    file = render.ROOT / render.FOLDER / f"{template}.parameters.example.json"
    return read(template, "sr", REGION, file, [f"{name}={value}" for name, value in changes.items()])


def told(findings: Iterator[Finding], *states: str) -> list[str]:
    return [f"{one.detail} | {one.hint}" for one in findings if one.state in (states or ("refused", "warn"))]


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name, value in (
        ("ACCESS_KEY_ID", "testing"),
        ("SECRET_ACCESS_KEY", "testing"),
        ("DEFAULT_REGION", REGION),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        aws = Aws(REGION)
        yield aws
        aws.close()


def recorded(**answers: Any) -> Aws:
    return Aws(None, Recorded(answers))


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.name)
def test_the_example_values_of_every_template_are_well_formed(variant: Any) -> None:
    choices = example(variant.name)
    found = [*local_checks.values(choices), *local_checks.together(choices), *local_checks.regions(choices)]
    assert told(iter(found), "refused") == []


@pytest.mark.parametrize(
    ("changes", "detail", "hint"),
    [
        ({"InstanceType": "ml.g99.large"}, "`InstanceType=ml.g99.large` is not a choice", "ml.g5.xlarge"),
        ({"ImageUri": "x.dkr.ecr/strongroom:latest"}, "`ImageUri=", "@sha256:DIGEST"),
        ({"StartupTimeoutSeconds": "9000"}, "`StartupTimeoutSeconds=9000`", "from 60 to 3600"),
        ({"EndpointName": "Mine"}, "`EndpointName=Mine`", "a-z"),
        ({"MinInstances": "0"}, "`MinInstances=0`", "components and asynchronous"),
        ({"S3PrefixListId": "pl-"}, "`S3PrefixListId=pl-`", "hexadecimal"),
    ],
)
def test_a_value_that_the_template_would_refuse_is_refused_before(
    changes: dict[str, str], detail: str, hint: str
) -> None:
    (found,) = told(local_checks.values(example(**changes)))
    assert detail in found and hint in found


def test_values_are_good_only_when_all_are() -> None:
    assert [one.state for one in local_checks.values(example())] == ["ok"]
    assert [one.state for one in local_checks.values(example(EndpointName="Mine"))] == ["refused"]


def test_a_local_disk_is_told_not_to_be_under_the_volume_key() -> None:
    (note,) = [one for one in local_checks.together(example()) if one.check == "volume key"]
    assert note.state == "note" and "local NVMe" in note.detail


def test_a_missing_value_is_named_with_an_example() -> None:
    choices = read("realtime-package-ownvpc", "sr", REGION, None, [])
    names = [one.detail.split("`")[1] for one in local_checks.values(choices) if one.state == "refused"]
    assert names == ["EndpointName", "ModelPackageName", "SubnetIds", "SecurityGroupIds"]


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"MinInstances": "5", "MaxInstances": "4"}, "above `MaxInstances=4`"),
        ({"ModelLayout": "TarGz"}, "does not fit `ModelKey`"),
        ({"ModelKey": "m/model.tar.gz"}, "does not fit `ModelKey`"),
        ({"TensorParallel": "4"}, "ml.g6e.2xlarge has 1 GPUs"),
        (
            {"TensorParallel": "4", "InstanceType": "ml.g5.12xlarge", "InstanceType2": "ml.g5.xlarge"},
            "ml.g5.xlarge",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(changes: dict[str, str], detail: str) -> None:
    (found,) = told(local_checks.together(example(**changes)), "refused")
    assert detail in found


def test_what_differs_by_region_is_told() -> None:
    component = dataclasses.replace(example("component-image-newvpc"), region="eu-west-3")
    found = told(local_checks.regions(component))
    assert any("inference components" in one for one in found) and any(
        "MinInstances=1" in one for one in found
    )
    assert any("`ImageUri` is not in eu-west-3" in one for one in found)
    package = dataclasses.replace(example("realtime-package-newvpc"), region="me-south-1")
    assert any("no Marketplace account" in one for one in told(local_checks.regions(package)))


def test_a_price_is_dated_or_unknown_never_guessed() -> None:
    (found,) = told(local_checks.cost(example(), datetime.date(2026, 12, 1)), "note")
    assert "2,046 to 8,184 USD a month" in found and "2026-11-23" in found
    (found,) = told(local_checks.cost(example(InstanceType="ml.p5.48xlarge"), datetime.date(2026, 12, 1)))
    assert "unknown" in found
    found = told(local_checks.cost(example(), datetime.date(2027, 12, 1)), "warn")[0]
    assert "373 days old" in found
    (found,) = told(local_checks.cost(example("batch-image-newvpc"), datetime.date(2026, 12, 1)), "note")
    assert "2.8026 USD per hour" in found


@pytest.mark.parametrize(
    ("template", "changes", "state", "words"),
    [
        ("realtime-image-newvpc", {}, "ok", "CUDA 13.0: al2023-ami-sagemaker-inference-gpu-4-1"),
        ("realtime-package-newvpc", {"CudaVersion": "12.2"}, "ok", "al2-ami-sagemaker-inference-gpu-2-1"),
        ("batch-image-newvpc", {}, "warn", "driver 535, CUDA 12.2"),
        ("batch-package-newvpc", {}, "ok", "where AWS validated the package"),
    ],
)
def test_the_driver_of_the_host_is_told(
    template: str, changes: dict[str, str], state: str, words: str
) -> None:
    (found,) = local_checks.host(example(template, **changes))
    assert found.state == state and words in found.detail


def test_a_missing_right_makes_a_check_unchecked_never_ok() -> None:
    denied = refusal("AccessDeniedException")
    names = ["ListServiceQuotas", "DescribeInstanceTypeOfferings", "BatchGetImage", "ListObjectsV2"]
    aws = recorded(**dict.fromkeys([*names, "DescribeAlarms"], denied))
    findings = plan.examine(example(), aws)["findings"]
    aws.close()
    states = {one["check"]: one["state"] for one in findings}
    assert {states[name] for name in ("quota", "zones", "image", "model", "alarms")} == {"unchecked"}


def test_a_zone_without_the_instance_type_is_told() -> None:
    answer = {"InstanceTypeOfferings": [{"Location": "us-east-1a", "InstanceType": "g6e.2xlarge"}]}
    aws = recorded(DescribeInstanceTypeOfferings=answer)
    (found,) = told(remote_checks.zones(example(), aws))
    assert "no ml.g6e.2xlarge in us-east-1b" in found and "use us-east-1a" in found
    assert any("both zones" in one for one in told(remote_checks.zones(example(Zone2="us-east-1a"), aws)))
    aws.close()


def test_an_alarm_that_stands_refuses_an_update() -> None:
    standing = [{"AlarmName": "sr-Errors5xx-1X"}, {"AlarmName": "sr-Disk-1X"}]
    aws = recorded(DescribeAlarms={"MetricAlarms": standing})
    (found,) = told(remote_checks.alarms(example(), aws))
    assert found.startswith("sr-Errors5xx-1X in ALARM")
    aws.close()


def test_a_request_that_the_model_refuses_is_not_sent() -> None:
    session = Recorded({})
    aws = Aws(None, session)
    with pytest.raises(CommandError) as caught:
        aws.client("sagemaker").describe_endpoint(EndpointName="-wrong-")
    assert caught.value.kind == "request_refused" and "regular expression" in caught.value.message
    aws.close()


@pytest.mark.parametrize(
    ("changes", "detail"),
    [({"DeploymentStyle": "ROLLING"}, "rolling updates of one instance"), ({"MinInstances": "2"}, "")],
)
def test_rolling_one_instance_is_warned_of(changes: dict[str, str], detail: str) -> None:
    found = told(local_checks.together(example(**changes)), "warn")
    assert (not found) if not detail else detail in found[0]


def image_in(aws: Aws) -> str:
    ecr = aws.client("ecr")
    ecr.create_repository(repositoryName="strongroom")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": DIGEST, "size": 1}, "layers": []}
    put = ecr.put_image(repositoryName="strongroom", imageManifest=json.dumps(manifest), imageTag="v1")
    return str(put["image"]["imageId"]["imageDigest"])


def test_an_image_that_is_not_in_the_registry_is_refused(moto: Aws) -> None:
    digest = image_in(moto)
    uri = f"123456789012.dkr.ecr.{REGION}.amazonaws.com/strongroom@"
    (found,) = remote_checks.image(example(ImageUri=uri + digest), moto)
    assert found.state == "ok"
    (found,) = told(remote_checks.image(example(ImageUri=uri + DIGEST), moto))
    assert "has no image sha256:0000" in found and "digest that the registry reports" in found
    elsewhere = f"arn:aws:ecr:{REGION}:123456789012:repository/other"
    wrong = example(ImageUri=uri + digest, RepositoryArn=elsewhere)
    (found,) = told(remote_checks.image(wrong, moto))
    assert "could not pull" in found


def package_answer(status: str) -> dict[str, Any]:
    arn = "arn:aws:sagemaker:us-east-1:865070037744:model-package/x"
    held = {"ModelPackageName": "x", "ModelPackageArn": arn, "ModelPackageStatus": status}
    return {
        **held,
        "CreationTime": datetime.datetime.now(datetime.UTC),
        "ModelPackageStatusDetails": {"ValidationStatuses": []},
    }


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (package_answer("Completed"), "ok", "865070037744:model-package/strongroom-example-1-0-0"),
        (package_answer("Failed"), "refused", "is Failed"),
        (refusal("ValidationException"), "refused", "is not there for this account"),
    ],
)
def test_a_product_that_was_not_subscribed_is_refused(answer: dict[str, Any], state: str, words: str) -> None:
    aws = recorded(DescribeModelPackage=answer)
    (found,) = remote_checks.package(example("realtime-package-newvpc"), aws)
    assert found.state == state and words in found.detail
    aws.close()


def test_an_algorithm_is_looked_up_as_one() -> None:
    aws = recorded(DescribeAlgorithm=refusal("ValidationException"))
    (found,) = remote_checks.package(example("train-package-newvpc"), aws)
    assert ":algorithm/strongroom-example-1-0-0" in found.detail and "subscribe" in found.hint
    assert list(remote_checks.package(example(), aws)) == []
    aws.close()


def bucket(aws: Aws, *keys: str, body: bytes = b"x") -> None:
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="example-models")
    for key in keys:
        s3.put_object(Bucket="example-models", Key=key, Body=b"" if key.endswith("/") else body)


def test_an_empty_prefix_is_refused(moto: Aws) -> None:
    bucket(moto, "elsewhere/a")
    (found,) = told(remote_checks.model(example(), moto))
    assert "nothing lies at `s3://example-models/strongroom/v1/`" in found


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("strongroom/v1/sub/", "folder object"),
        ("strongroom/v1/a//b", "empty, blank or dotted"),
        ("strongroom/v1/ /b", "empty, blank or dotted"),
        ("strongroom/v1/" + "x" * 256, "above 255 bytes"),
    ],
)
def test_a_name_that_the_platform_refuses_is_named(moto: Aws, key: str, fault: str) -> None:
    bucket(moto, "strongroom/v1/model.bin", key)
    (found,) = told(remote_checks.model(example(), moto))
    assert fault in found


def test_dotted_names_and_good_names_are_told_apart() -> None:
    assert remote_checks.name_fault("a/../b", 1) and remote_checks.name_fault("./b", 1)
    assert not remote_checks.name_fault("a.b/c-d", 1)


def test_a_model_that_cannot_arrive_in_time_or_does_not_fit_is_refused() -> None:
    size = 100 * 2**30
    answer = {"Contents": [{"Key": "strongroom/v1/model.bin", "Size": size}], "IsTruncated": False}
    aws = recorded(ListObjectsV2=answer)
    changes = {"DownloadTimeoutSeconds": "60", "VolumeSizeGiB": "50"}
    found = told(remote_checks.model(example(**changes), aws))
    assert "do not fit" in found[0] and "215 s to download" in found[1]
    assert told(remote_checks.model(example(), aws), "refused") == []
    aws.close()


def test_a_key_that_cannot_be_used_is_refused(moto: Aws) -> None:
    kms = moto.client("kms")
    arn = kms.create_key()["KeyMetadata"]["Arn"]
    assert {one.state for one in key_checks.keys(example(VolumeKeyArn=arn), moto)} == {"ok"}
    kms.disable_key(KeyId=arn.rpartition("/")[2])
    (line,) = told(key_checks.keys(example(VolumeKeyArn=arn), moto))
    assert "`VolumeKeyArn` is Disabled" in line


def network(aws: Aws, *, gateway: bool, internet: bool, zones: str = "ab") -> list[str]:
    ec2 = boto3.client("ec2", region_name=REGION)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    made = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{index}.0/28", AvailabilityZone=REGION + zone)
        for index, zone in enumerate(zones)
    ]
    table = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"][0]
    if gateway:
        ec2.create_vpc_endpoint(
            VpcId=vpc, ServiceName=f"com.amazonaws.{REGION}.s3", RouteTableIds=[table["RouteTableId"]]
        )
    if internet:
        out = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=out, VpcId=vpc)
        route = {"RouteTableId": table["RouteTableId"], "GatewayId": out}
        ec2.create_route(DestinationCidrBlock="0.0.0.0/0", **route)
    ec2.close()
    return [subnet["Subnet"]["SubnetId"] for subnet in made]


@pytest.mark.parametrize(
    ("options", "changes", "line"),
    [
        ({"gateway": False, "internet": False}, {}, "no route to an S3 gateway endpoint"),
        ({"gateway": True, "internet": True}, {}, "route to the internet"),
        ({"gateway": True, "internet": False, "zones": "aa"}, {}, "lie in one zone"),
        ({"gateway": True, "internet": False}, {"MaxInstances": "20"}, "22 free addresses, 40 are needed"),
        ({"gateway": True, "internet": False}, {}, ""),
    ],
)
def test_a_network_that_does_not_do_is_told(
    moto: Aws, options: dict[str, Any], changes: dict[str, str], line: str
) -> None:
    named = ",".join(network(moto, **options))
    found = told(remote_checks.subnets(example("realtime-image-ownvpc", SubnetIds=named, **changes), moto))
    assert [line] == [line for one in found if line in one] if line else found == []


@pytest.mark.parametrize("text", ["nothing", "[1]", '[{"ParameterKey": "A"}]', ""])
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    with pytest.raises(CommandError) as caught:
        read("realtime-image-newvpc", "sr", REGION, tmp_path / "p.json", [])
    assert "`p.json` is no parameter file" in caught.value.message


@pytest.mark.parametrize(
    ("template", "stack", "given", "message"),
    [
        ("nothing", "sr", [], "is not a template"),
        ("realtime-image-newvpc", "1x", [], "cannot name a stack"),
        ("realtime-image-newvpc", "sr", ["SubnetIds=x"], "has no parameter `SubnetIds`"),
        ("realtime-image-newvpc", "sr", ["SubnetIds"], "is not NAME=VALUE"),
    ],
)
def test_malformed_choices_are_refused(template: str, stack: str, given: list[str], message: str) -> None:
    with pytest.raises(CommandError) as caught:
        read(template, stack, REGION, None, given)
    assert message in caught.value.message
