"""The checks of a plan that need no AWS: values, limits, regions, money.

Owns: the rules between parameters, the region exceptions, the cost range. Must not know: AWS's answers.
Invariant: an unknown price is said to be unknown, never guessed.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from infra.deploy.choices import Choices
from infra.deploy.findings import Finding
from infra.templates import params
from infra.templates.accounts import MARKETPLACE
from infra.templates.instances import BATCH_HOST_IMAGE, ENDPOINT, HOST_IMAGES

HOURS: Final = 730  # a month, as AWS's own calculator counts it
STALE_DAYS: Final = 180
# Seen in the field (stdapi-ai/stdapi.ai#43, 2026-08) or in the registry that cfn-lint 1.58 ships.
NO_ZERO: Final = {"eu-west-3": "2026-08-27"}
NO_COMPONENTS: Final = {"eu-west-3": "2026-11-23"}


def values(choices: Choices) -> Iterator[Finding]:
    """Look at each value as CloudFormation would."""
    good = True
    for parameter in params.of(choices.variant):
        value = choices.values.get(parameter.name)
        allowed = params.choices_of(parameter, choices.variant)
        low = params.low_of(parameter, choices.variant)
        if value is None:
            good = False
            hint = f"{parameter.text} For example {parameter.example}"
            yield Finding("parameters", "refused", f"`{parameter.name}` is missing", hint)
        elif allowed and value not in {str(choice) for choice in allowed}:
            good = False
            hint = "one of " + ", ".join(str(choice) or '""' for choice in allowed)
            yield Finding("parameters", "refused", f"`{parameter.name}={value}` is not a choice", hint)
        elif parameter.refuses(value) or (low is not None and value.isdecimal() and int(value) < low):
            good = False
            hint = f"it must be {parameter.constraint}"
            if parameter.name == "MinInstances" and value == "0":
                hint = "only components and asynchronous endpoints go to zero; choose one of those templates"
            yield Finding("parameters", "refused", f"`{parameter.name}={value}` is malformed", hint)
    if good:
        yield Finding("parameters", "ok", f"{len(choices.values)} values")


def together(choices: Choices) -> Iterator[Finding]:
    """Look at values that depend on each other."""
    least, most = choices.number("MinInstances"), choices.number("MaxInstances")
    both = all(choices.values.get(name, "").isdecimal() for name in ("MinInstances", "MaxInstances"))
    if choices.variant.has_endpoint and both and least > most:
        detail = f"`MinInstances={least}` is above `MaxInstances={most}`"
        yield Finding("scaling", "refused", detail, "raise `MaxInstances`")
    archive = choices.values.get("ModelKey", "").endswith(".tar.gz")
    if "ModelLayout" in choices.values and archive != (choices.values["ModelLayout"] == "TarGz"):
        detail = f"`ModelLayout={choices.values['ModelLayout']}` does not fit `ModelKey`"
        yield Finding("model", "refused", detail, "TarGz for a key that ends in .tar.gz, else Prefix")
    ranks = choices.number("TensorParallel")
    for name in choices.instance_types:
        kind = ENDPOINT.get(name)
        if kind is not None and ranks > kind.gpus:
            detail = f"`TensorParallel={ranks}`, but {name} has {kind.gpus} GPUs"
            yield Finding("capacity", "refused", detail, "choose a larger type, also for the pools")
        if kind is not None and kind.local_disk:
            detail = (
                f"{name} has local NVMe: AWS encrypts it itself, the volume key covers the EBS volume only"
            )
            yield Finding("volume key", "note", detail)
    single = choices.values.get("DeploymentStyle") == "ROLLING" and least == 1
    if single:
        detail = "rolling updates of one instance are not documented"
        yield Finding("updates", "warn", detail, "raise `MinInstances` or set `DeploymentStyle=ALL_AT_ONCE`")


def regions(choices: Choices) -> Iterator[Finding]:
    """Look at what is known to differ in the region."""
    region, variant = choices.region, choices.variant
    if variant.source == "package" and region not in MARKETPLACE:
        hint = "one of " + ", ".join(MARKETPLACE)
        yield Finding("region", "refused", f"no Marketplace account is known for {region}", hint)
    if variant.traffic == "component" and region in NO_COMPONENTS:
        detail = f"{region} is not known to have inference components ({NO_COMPONENTS[region]})"
        yield Finding("region", "warn", detail, "use a real-time template, or another region")
    zero = variant.traffic in ("component", "async") and choices.number("MinInstances") == 0
    if zero and region in NO_ZERO:
        detail = f"{region} refused `MinInstances=0` when it was last seen ({NO_ZERO[region]})"
        yield Finding("region", "warn", detail, "set `MinInstances=1`")
    image = choices.values.get("ImageUri", "")
    if image and f".ecr.{region}." not in image:
        hint = "push the image to this region's ECR and name it by digest"
        yield Finding("region", "refused", f"`ImageUri` is not in {region}", hint)


def host(choices: Choices) -> Iterator[Finding]:
    """Tell on which driver the container runs: batch has an older one than endpoints."""
    variant = choices.variant
    if variant.has_endpoint:
        cuda = choices.values.get("CudaVersion", "")
        if cuda in HOST_IMAGES:
            yield Finding("host image", "ok", f"CUDA {cuda}: {HOST_IMAGES[cuda]}")
    elif variant.traffic == "batch" and variant.source == "image":
        detail = f"batch runs on {BATCH_HOST_IMAGE} (driver 535, CUDA 12.2) and no other"
        yield Finding("host image", "warn", detail, "take the image's CUDA 12 flavour: one of CUDA 13 fails")
    elif variant.traffic == "batch":
        detail = f"batch runs on {BATCH_HOST_IMAGE}, where AWS validated the package"
        yield Finding("host image", "ok", detail)


@functools.cache
def price_table() -> dict[str, Any]:
    """Return the shipped prices."""
    text = (Path(__file__).parent / "prices.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def cost(choices: Choices, today: datetime.date | None = None) -> Iterator[Finding]:
    """Tell the monthly range of the instances, from the shipped table; nothing else is in it."""
    table = price_table()
    known = table["usd_per_hour"].get(choices.region, {})
    hours = [known.get(name) for name in choices.instance_types]
    what = f"{choices.region} {', '.join(choices.instance_types)}"
    if not hours or None in hours:
        hint = "look it up at AWS; the shipped table does not have it"
        yield Finding("cost", "warn", f"unknown for {what}", hint)
        return
    least, most = choices.number("MinInstances"), choices.number("MaxInstances")
    if not choices.variant.has_endpoint:
        yield Finding("cost", "note", f"{min(hours)} USD per hour of a job on {what}")
    else:
        low, high = least * min(hours) * HOURS, most * max(hours) * HOURS
        detail = f"{low:,.0f} to {high:,.0f} USD a month for {least} to {most} instances"
        hint = "without storage, traffic, VPC endpoints, logs and the model's own price"
        yield Finding("cost", "note", f"{detail}, prices of {table['as_of']}", hint)
    age = (
        (today or datetime.datetime.now(datetime.UTC).date()) - datetime.date.fromisoformat(table["as_of"])
    ).days
    if age > STALE_DAYS:
        detail = f"the shipped prices are {age} days old"
        yield Finding("cost", "warn", detail, "look the price up at AWS")
