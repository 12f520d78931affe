"""The checks of a plan that ask AWS: quota, zones, image, model, network, alarms.

Owns: which call answers which question. Must not know: how an answer is printed.
Invariant: reads only; nothing is made or changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from infra.deploy import memory
from infra.deploy.aws import Aws
from infra.deploy.choices import Choices
from infra.deploy.findings import Finding
from infra.templates.accounts import MARKETPLACE

DOWNLOAD_BYTES_PER_S: Final = 500_000_000  # assumed, said in the finding
KEY_PART_BYTES: Final = 255
ADDRESSES: Final = 2  # free ones an instance needs
GIB: Final = 1024**3
# AWS's names for these differ between its pages; the patterns take each.
ACCOUNT_QUOTAS: Final = {
    "endpoints": re.compile(r"(?i)\bnumber of (active )?endpoints\b|\bendpoints (allowed )?per account"),
    "instances": re.compile(r"(?i)\binstances? (count )?(across|for) (all |active )*endpoints\b"),
}


def quotas(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look at the quota of each instance type: above it an endpoint stays in `Creating`, undeletable."""
    use = {"batch": "transform job usage", "train": "training job usage"}.get(
        choices.variant.traffic, "endpoint usage"
    )
    wanted = choices.number("MaxInstances") if choices.variant.has_endpoint else 1
    if choices.values.get("DeploymentStyle") == "BLUE_GREEN" or choices.variant.source == "package":
        wanted *= 2 if choices.variant.has_endpoint else 1  # both fleets stand while traffic moves
    held: dict[str, float] = {}
    pages = aws.client("service-quotas").get_paginator("list_service_quotas")
    for page in pages.paginate(ServiceCode="sagemaker"):
        held |= {quota["QuotaName"]: quota["Value"] for quota in page["Quotas"]}
    for name in choices.instance_types:
        quota = held.get(f"{name} for {use}")
        if quota is None:
            yield Finding(
                "quota", "unchecked", f"no quota `{name} for {use}` is listed", "look in Service Quotas"
            )
        elif quota < wanted:
            detail = f"{name} for {use}: {quota:.0f}, up to {wanted} are needed"
            yield Finding("quota", "refused", detail, "ask for more in Service Quotas before deploying")
        else:
            yield Finding("quota", "ok", f"{name} for {use}: {quota:.0f}, up to {wanted} are needed")
    if choices.variant.has_endpoint:
        yield from _account_quotas(choices, aws, held, wanted)


def _account_quotas(choices: Choices, aws: Aws, held: dict[str, float], wanted: int) -> Iterator[Finding]:
    """Look at what an account may have of endpoints, whatever their type."""
    pages = aws.client("sagemaker").get_paginator("list_endpoints").paginate()
    standing = {one["EndpointName"] for page in pages for one in page["Endpoints"]}
    needed = {
        "endpoints": len(standing | {choices.values["EndpointName"]}),
        "instances": wanted,
    }
    for what, pattern in ACCOUNT_QUOTAS.items():
        named = [name for name in held if pattern.search(name)]
        if not named:
            detail = f"no quota of the account's {what} is listed"
            yield Finding("quota", "unchecked", detail, "look in Service Quotas for SageMaker")
        for name in named:
            detail = f"{name}: {held[name]:.0f}, {needed[what]} are needed"
            if held[name] < needed[what]:
                hint = "ask for more in Service Quotas, or delete what is not used"
                yield Finding("quota", "refused", detail, hint)
            else:
                yield Finding("quota", "ok", detail)


def zones(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look whether the zones have the instance types; EC2's offer stands for SageMaker's."""
    ec2 = aws.client("ec2")
    wanted = {choices.values[name] for name in ("Zone1", "Zone2") if name in choices.values}
    if choices.variant.network == "newvpc" and len(wanted) < 2:
        yield Finding("zones", "refused", "both zones are the same", "choose two different zones")
    if choices.variant.network == "ownvpc":
        wanted = {subnet["AvailabilityZone"] for subnet in _subnets(choices, ec2)}
    for name in choices.instance_types:
        filters = [{"Name": "instance-type", "Values": [name.removeprefix("ml.")]}]
        answer = ec2.describe_instance_type_offerings(LocationType="availability-zone", Filters=filters)
        offered = {offer["Location"] for offer in answer["InstanceTypeOfferings"]}
        missing = sorted(wanted - offered)
        if missing:
            detail = f"EC2 offers no {name} in {', '.join(missing)} (an approximation of SageMaker's offer)"
            hint = f"use {', '.join(sorted(offered)) or 'another region'}"
            yield Finding("zones", "warn", detail, hint)
        else:
            yield Finding("zones", "ok", f"{name} is offered in {', '.join(sorted(wanted))}")


def image(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look whether the image is in ECR by its digest."""
    if choices.variant.source != "image":
        return
    name, _, digest = choices.values["ImageUri"].partition("@")
    registry, _, repository = name.partition("/")
    if not choices.values["RepositoryArn"].endswith(f":{registry[:12]}:repository/{repository}"):
        detail = "`RepositoryArn` is not the repository of `ImageUri`"
        yield Finding("image", "refused", detail, "the role could not pull the image")
    answer = aws.client("ecr").batch_get_image(
        registryId=registry[:12], repositoryName=repository, imageIds=[{"imageDigest": digest}]
    )
    if not answer.get("images"):
        detail = f"`{repository}` has no image {digest[:19]}…"
        yield Finding("image", "refused", detail, "push it and take the digest that the registry reports")
    else:
        yield Finding("image", "ok", f"{repository}@{digest[:19]}…")


def package(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look whether the product from the Marketplace is there for this account."""
    import botocore.exceptions as refusals

    if choices.variant.source != "package" or choices.region not in MARKETPLACE:
        return
    training = choices.variant.traffic == "train"
    name = choices.values["AlgorithmName" if training else "ModelPackageName"]
    kind = "algorithm" if training else "model-package"
    arn = f"arn:aws:sagemaker:{choices.region}:{MARKETPLACE[choices.region]}:{kind}/{name}"
    client = aws.client("sagemaker")
    try:
        if training:
            state = client.describe_algorithm(AlgorithmName=arn)["AlgorithmStatus"]
        else:
            state = client.describe_model_package(ModelPackageName=arn)["ModelPackageStatus"]
    except refusals.ClientError as error:
        if error.response["Error"]["Code"] in ("ValidationException", "ResourceNotFound"):
            hint = "subscribe on AWS Marketplace, and copy the last part of the ARN for this region"
            yield Finding("package", "refused", f"`{arn}` is not there for this account", hint)
            return
        raise
    if state == "Completed":
        yield Finding("package", "ok", arn)
    else:
        yield Finding("package", "refused", f"`{arn}` is {state}", "ask the vendor")


def model(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look at the artefact in S3: its layout, names and size, and whether the accelerators hold it."""
    if choices.variant.source != "image":
        yield from memory.fits(choices, None)
        return
    s3, bucket = aws.client("s3"), choices.values["ModelBucketName"]
    key = choices.values.get("ModelTarKey") or choices.values["ModelKey"]
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    objects = [held for page in pages for held in page.get("Contents", [])]
    if not objects:
        yield Finding("model", "refused", f"nothing lies at `s3://{bucket}/{key}`", "upload the sealed model")
        return
    for held in objects:
        fault = name_fault(held["Key"][len(key) :] if key.endswith("/") else "model", held["Size"])
        if fault:
            yield Finding("model", "refused", f"`{held['Key']}` {fault}", "delete or rename the object")
    size_bytes = sum(held["Size"] for held in objects)
    if volume_bytes := choices.number("VolumeSizeGiB") * GIB:
        needed = 2 * size_bytes if key.endswith(".tar.gz") else size_bytes
        if needed > volume_bytes:
            detail = f"{size_bytes / GIB:.1f} GiB do not fit on `VolumeSizeGiB={volume_bytes // GIB}`"
            yield Finding("model", "refused", detail, "an archive needs twice its size")
    limit_s, takes_s = choices.number("DownloadTimeoutSeconds"), size_bytes / DOWNLOAD_BYTES_PER_S
    if limit_s and takes_s > limit_s:
        detail = f"{takes_s:.0f} s to download at an assumed 0.5 GB/s, the limit is {limit_s} s"
        yield Finding("model", "refused", detail, "raise `DownloadTimeoutSeconds`")
    yield Finding("model", "ok", f"{len(objects)} objects, {size_bytes / GIB:.2f} GiB")
    yield from memory.fits(choices, size_bytes)


def name_fault(relative: str, size_bytes: int) -> str:
    """Return what is wrong with an object's name below the prefix, nothing when it is good."""
    if not relative or relative.endswith("/"):
        return "is a folder object that a console made" if size_bytes == 0 else "ends in a slash"
    for part in relative.split("/"):
        if not part.strip() or part in (".", "..") or "\0" in part:
            return "has an empty, blank or dotted part"
        if len(part.encode()) > KEY_PART_BYTES:
            return f"has a part above {KEY_PART_BYTES} bytes"
    return ""


def subnets(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look at the customer's own network."""
    if choices.variant.network != "ownvpc":
        return
    ec2 = aws.client("ec2")
    found = _subnets(choices, ec2)
    if len({subnet["AvailabilityZone"] for subnet in found}) < 2:
        yield Finding("subnets", "refused", "the subnets lie in one zone", "name subnets in two zones")
    free = sum(subnet["AvailableIpAddressCount"] for subnet in found)
    wanted = ADDRESSES * max(choices.number("MaxInstances"), 1)
    if free < wanted:
        detail = f"{free} free addresses, {wanted} are needed"
        yield Finding("subnets", "refused", detail, "name larger subnets")
    tables = _route_tables(found, ec2)
    gateways = [route.get("GatewayId", "") for table in tables for route in table["Routes"]]
    nats = [route for table in tables for route in table["Routes"] if route.get("NatGatewayId")]
    if nats or any(gateway.startswith("igw-") for gateway in gateways):
        detail = "a subnet has a route to the internet"
        yield Finding("subnets", "warn", detail, "isolation holds without it; use subnets that have none")
    if not any(gateway.startswith("vpce-") for gateway in gateways):
        hint = "add the S3 gateway endpoint to the subnets' route tables"
        yield Finding("subnets", "refused", "no route to an S3 gateway endpoint", hint)
    if free >= wanted:
        yield Finding("subnets", "ok", f"{len(found)} subnets, {free} free addresses")


def _subnets(choices: Choices, ec2: Any) -> list[Any]:
    named = [text.strip() for text in choices.values["SubnetIds"].split(",")]
    return list(ec2.describe_subnets(SubnetIds=named)["Subnets"])


def _route_tables(subnets: list[Any], ec2: Any) -> list[Any]:
    """Return each subnet's own table, or its VPC's main one."""
    made = []
    for subnet in subnets:
        own = [{"Name": "association.subnet-id", "Values": [subnet["SubnetId"]]}]
        main = [
            {"Name": "vpc-id", "Values": [subnet["VpcId"]]},
            {"Name": "association.main", "Values": ["true"]},
        ]
        found = ec2.describe_route_tables(Filters=own)["RouteTables"]
        made += found or ec2.describe_route_tables(Filters=main)["RouteTables"]
    return made


def alarms(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look whether an alarm that would roll the update back stands already."""
    if not choices.variant.has_endpoint:
        return
    answer = aws.client("cloudwatch").describe_alarms(AlarmNamePrefix=f"{choices.stack}-", StateValue="ALARM")
    standing = [alarm["AlarmName"] for alarm in answer.get("MetricAlarms", [])]
    guards = [name for name in standing if "-Errors5xx-" in name or "-LatencyP99-" in name]
    if guards:
        hint = "an update now would be rolled back by the old fleet's alarm; wait until it is over"
        yield Finding("alarms", "refused", f"{', '.join(guards)} in ALARM", hint)
    else:
        yield Finding("alarms", "ok", "none that would roll an update back")
