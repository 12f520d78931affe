"""Quotas in a plan: of the instance type, of the account's endpoints and instances, of a job."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from infra.deploy import remote_checks
from tests.infra.test_deploy_plan import REGION, example, recorded, told

QUOTA = "ml.g6e.2xlarge for endpoint usage"
ENDPOINTS = "Maximum number of endpoints allowed per account"
INSTANCES = "Number of instances across active endpoints"


def quota_page(value: float, **others: float) -> dict[str, Any]:
    named = {QUOTA: value, ENDPOINTS: 100.0, INSTANCES: 100.0, **others}
    return {"Quotas": [{"QuotaName": name, "Value": held} for name, held in named.items()]}


def endpoints(*names: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "Endpoints": [
            {
                "EndpointName": name,
                "EndpointArn": f"arn:aws:sagemaker:{REGION}:123456789012:endpoint/{name}",
                "CreationTime": now,
                "LastModifiedTime": now,
                "EndpointStatus": "InService",
            }
            for name in names
        ]
    }


@pytest.mark.parametrize(
    ("value", "changes", "state"),
    [
        (4.0, {}, "ok"),
        (3.0, {}, "refused"),
        (4.0, {"DeploymentStyle": "BLUE_GREEN"}, "refused"),
        (8.0, {"DeploymentStyle": "BLUE_GREEN"}, "ok"),
        (9.0, {"InstanceType": "ml.g5.xlarge"}, "unchecked"),
    ],
)
def test_a_quota_below_what_may_run_is_refused(value: float, changes: dict[str, str], state: str) -> None:
    aws = recorded(ListServiceQuotas=quota_page(value), ListEndpoints=endpoints())
    found, *rest = remote_checks.quotas(example(**changes), aws)
    assert found.state == state and [one.state for one in rest] == ["ok", "ok"]
    aws.close()


@pytest.mark.parametrize(
    ("quotas", "standing", "words"),
    [
        ({ENDPOINTS: 2.0}, ("a", "b"), f"{ENDPOINTS}: 2, 3 are needed"),
        ({INSTANCES: 3.0}, (), f"{INSTANCES}: 3, 4 are needed"),
        ({ENDPOINTS: 2.0}, ("a", "strongroom"), ""),
        ({"Number of endpoints": 0.0}, (), "Number of endpoints: 0, 1 are needed"),
    ],
)
def test_the_accounts_own_quotas_count_whatever_the_type(
    quotas: dict[str, float], standing: tuple[str, ...], words: str
) -> None:
    aws = recorded(ListServiceQuotas=quota_page(4.0, **quotas), ListEndpoints=endpoints(*standing))
    found = told(remote_checks.quotas(example(EndpointName="strongroom"), aws))
    assert len(found) == bool(words) and (not words or words in found[0])
    aws.close()


def test_a_job_needs_no_endpoint_quota_and_an_unlisted_one_is_unchecked() -> None:
    name = "ml.g6e.2xlarge for transform job usage"
    page = {"Quotas": [{"QuotaName": name, "Value": 1.0}, {"QuotaName": QUOTA, "Value": 4.0}]}
    aws = recorded(ListServiceQuotas=page, ListEndpoints=endpoints())
    assert [one.state for one in remote_checks.quotas(example("batch-image-newvpc"), aws)] == ["ok"]
    states = [one.state for one in remote_checks.quotas(example(), aws)]
    assert states == ["ok", "unchecked", "unchecked"]
    aws.close()
