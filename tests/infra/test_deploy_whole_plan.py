"""A plan in an account where everything is missing: one readable line a fault, each with its next move."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from moto import mock_aws

from infra.deploy import plan
from infra.deploy.aws import Aws
from infra.templates.variants import ALL
from tests.infra.recorded import Recorded, refusal
from tests.infra.test_deploy_plan import REGION, example
from tests.infra.test_deploy_quotas import endpoints, quota_page

LINE = 240  # what a person reads without scrolling twice
KEY = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"
GRANTLESS = (
    '{"Statement": [{"Effect": "Allow", "Principal": {"AWS": "123456789012"}, "Action": "kms:Decrypt"}]}'
)
ALL_WRONG: dict[str, Any] = {
    "ListServiceQuotas": quota_page(1.0, **{"Number of endpoints": 0.0}),
    "ListEndpoints": endpoints("other"),
    "DescribeInstanceTypeOfferings": {"InstanceTypeOfferings": []},
    "BatchGetImage": {"images": []},
    "ListObjectsV2": {"Contents": [{"Key": "strongroom/v1/a//b", "Size": 2**40}]},
    "DescribeKey": {"KeyMetadata": {"KeyId": "0", "KeyState": "Enabled"}},
    "GetKeyPolicy": {"Policy": GRANTLESS},
    "DescribeAlarms": {"MetricAlarms": [{"AlarmName": "sr-Errors5xx-1X"}]},
    "DescribeModelPackage": refusal("ValidationException"),
}
WRONG_VALUES = {
    "MinInstances": "5",
    "TensorParallel": "8",
    "VolumeSizeGiB": "1",
    "VolumeKeyArn": KEY,
    "ImageUri": f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/strongroom@sha256:{'0' * 64}",
}


class Http:
    """What the client looks at of an answer that is given to it."""

    status_code = 400
    headers: ClassVar[dict[str, str]] = {}


def beyond_moto(aws: Aws) -> None:
    """Answer the two operations that moto does not have: nothing is allowed, nothing is there."""
    events = aws.client("service-quotas").meta.events
    events.register("before-call", lambda **_: (Http(), refusal("AccessDeniedException")))
    absent = (Http(), refusal("ValidationException"))
    events = aws.client("sagemaker").meta.events
    events.register("before-call.sagemaker.DescribeAlgorithm", lambda **_: absent)


def shown(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    plan.show(result)
    return capsys.readouterr().out.splitlines()


def readable(result: dict[str, Any], lines: list[str]) -> None:
    """Every fault is one line with a hint on the next, short and without a Python name in it."""
    for one in result["findings"]:
        if one["state"] not in ("refused", "warn", "unchecked"):
            continue
        (at,) = [index for index, line in enumerate(lines) if line[6:] == f"{one['check']}: {one['detail']}"]
        assert lines[at + 1].startswith("      hint: ") and len(lines[at]) <= LINE, lines[at]
        assert not re.search(r"Traceback|Exception\b|Error\(|None|\{'|<class", lines[at]), lines[at]


def test_a_plan_where_everything_is_wrong_names_each_fault(capsys: pytest.CaptureFixture[str]) -> None:
    aws = Aws(None, Recorded(ALL_WRONG))
    result = plan.examine(example(**WRONG_VALUES), aws)
    aws.close()
    lines = shown(result, capsys)
    readable(result, lines)
    refused = {one["check"] for one in result["findings"] if one["state"] == "refused"}
    assert refused == {"scaling", "capacity", "region", "quota", "image", "model", "memory", "keys", "alarms"}
    assert not result["ok"] and any(line.startswith("WARN  zones") for line in lines)


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.name)
def test_in_an_empty_account_every_template_says_what_is_missing(
    variant: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", REGION)):
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws(), contextlib.closing(Aws(REGION)) as aws:
        beyond_moto(aws)
        result = plan.examine(example(variant.name), aws)
    lines = shown(result, capsys)
    readable(result, lines)
    bad = [one for one in result["findings"] if one["state"] in ("refused", "unchecked")]
    gone = {one["detail"] for one in bad if one["detail"].endswith("not there")}
    assert ("the repository of `ImageUri` is not there" in gone) is (variant.source == "image")
    assert ("`ModelBucketName` is not there" in gone) is (variant.source == "image")
    assert ("a subnet of `SubnetIds` is not there" in gone) is (variant.network == "ownvpc")
    assert bad and (variant.source != "image" or not result["ok"])


def test_values_that_are_malformed_are_told_before_aws_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    aws = Aws(None, Recorded({}))
    result = plan.examine(example(EndpointName="No_", InstanceType="ml.g99.large", MaxInstances="many"), aws)
    aws.close()
    readable(result, shown(result, capsys))
    assert sum(one["state"] == "refused" for one in result["findings"]) == 3


def test_the_example_files_lie_where_the_hints_say() -> None:
    root = Path(plan.__file__).resolve().parents[2]
    assert all((root / "infra" / "rendered" / f"{one.name}.parameters.example.json").exists() for one in ALL)
