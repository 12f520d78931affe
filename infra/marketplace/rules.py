"""What AWS Marketplace asks of a model package beyond the service model.

Owns: one rule a function, each with its sentence. Must not know: the folder, how a request was made.
Invariant: a rule names the field that breaks it; all rules are looked at, none stops another.

Sources: the seller guide's pages on machine learning products (isolation, images, pricing), the developer
guide on batch transform. They were read, not tried: no package was submitted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from infra.marketplace.vendor import Instances, Pricing, Vendor
from infra.templates.accounts import MARKETPLACE
from infra.templates.instances import BATCH, ENDPOINT

Request = dict[str, Any]
IMAGE: Final = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com/[a-z0-9][a-z0-9._/-]*"
    r"@(?P<digest>sha256:[0-9a-f]{64})"
)
ABSENT: Final = {
    "ModelPackageGroupName": "a listed package is unversioned",
    "SkipModelValidation": "a listed package is validated",
    "ModelApprovalStatus": "it belongs to versioned packages",
    "DriftCheckBaselines": "it belongs to versioned packages",
    "SourceAlgorithmSpecification": "packages made by another algorithm cannot be listed",
    "SecurityConfig": "AWS copies the package to accounts that could not use the key",
}
METERING_DIMENSION: Final = "inference.count"  # the only one that AWS's page names
# CUDA of the image that the batch host's driver (535) runs; later 12.x only without code for newer drivers.
BATCH_CUDA: Final = (12, 2)
SECRET_NAME: Final = re.compile(r"SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|TOKEN\b|API_KEY|ACCESS_KEY", re.I)
SECRET_VALUE: Final = re.compile(
    r"-----BEGIN|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{20,}|\b[A-Fa-f0-9]{64}\b|[A-Za-z0-9+/]{43}="
)
NETWORK_NAME: Final = re.compile(r"(?i)(https?|all|no)_proxy\Z|.*_endpoint(_url)?\Z")
URL: Final = re.compile(r"(?i)\b(https?|wss?|tcp)://")
# Against the container's own lock on the way out, and against its refusal of a model that is not sealed.
OFF: Final = {"STRONGROOM_LOCKDOWN": "off", "STRONGROOM_ALLOW_PLAINTEXT": "on"}
# What a sealed model is opened with: a source that needs nobody (a buyer has no key to bring), public keys.
OPENED: Final = {
    "STRONGROOM_KEY": re.compile(r"image:/[!-+\--~]+,/[!-+\--~]+"),
    "STRONGROOM_VENDOR_ROOTS": re.compile(
        r"ed25519:[0-9a-f]{64}(@[0-9]{1,12})?(,ed25519:[0-9a-f]{64}(@[0-9]{1,12})?)*"
    ),
}


def region_faults(request: Request, region: str) -> Iterator[str]:
    """Yield what is wrong with a request for `region`."""
    for rule in RULES:
        yield from rule(request, region)


def _certified(request: Request, _: str) -> Iterator[str]:
    if request.get("CertifyForMarketplace") is not True:
        yield "`CertifyForMarketplace` must be true; it cannot be changed later"
    if not request.get("ModelPackageName"):
        yield "`ModelPackageName` is missing: a listed package is unversioned"
    for name, why in ABSENT.items():
        if name in request:
            yield f"`{name}` must be absent: {why}"


def _container(request: Request, region: str) -> Iterator[str]:
    """One container, by digest, from the seller's own registry in the same region."""
    if region not in MARKETPLACE:
        yield f"`{region}` has no Marketplace account; packages are listed from {', '.join(MARKETPLACE)}"
    containers = _containers(request)
    if len(containers) != 1:
        yield f"`Containers` has {len(containers)} entries; a listed package has one"
    for held in containers:
        image = IMAGE.fullmatch(str(held.get("Image", "")))
        if image is None:
            yield "`Image` must be an ECR image by digest: ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME@sha256:X"
            continue
        if image["region"] != region:
            yield f"`Image` lies in {image['region']}; image, artefact and package must lie in {region}"
        if held.get("ImageDigest") != image["digest"]:
            yield "`ImageDigest` is not the digest of `Image`"
        role = str(request.get("ValidationSpecification", {}).get("ValidationRole", ""))
        if role and f"::{image['account']}:" not in role:
            yield "`ValidationRole` is of another account than `Image`: the registry must be the seller's own"
        if held.get("ModelDataSource") or not re.fullmatch(
            r"s3://[^/]+/.+\.tar\.gz", str(held.get("ModelDataUrl", ""))
        ):
            yield "`ModelDataUrl` must name one .tar.gz in S3: batch and Marketplace take no prefix"


def _environment(request: Request, _: str) -> Iterator[str]:
    """Buyers read the environment, and the container has no network."""
    for held in _containers(request):
        environment = held.get("Environment", {})
        for name, form in OPENED.items():
            if not form.fullmatch(str(environment.get(name, ""))):
                yield f"`Environment.{name}` must say what opens the sealed model; nothing else is served"
        for name, value in environment.items():
            if name in OPENED:
                continue
            if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
                yield f"`Environment.{name}` looks like a secret; buyers can read the environment"
            if NETWORK_NAME.match(name) or URL.search(value):
                yield f"`Environment.{name}` names a network; the container has none"
            if OFF.get(name) == value:
                yield f"`Environment.{name}={value}` gives up what the container keeps to by itself"
            if name == "HF_MODEL_ID" and not value.startswith("/"):
                yield "`Environment.HF_MODEL_ID` must be a path: nothing can be downloaded"


def _types(request: Request, _: str) -> Iterator[str]:
    spec = request.get("InferenceSpecification", {})
    for name in ("SupportedContentTypes", "SupportedResponseMIMETypes"):
        if "application/json" not in spec.get(name, ()):
            yield f"`{name}` must hold application/json"
    for name, known in (
        ("SupportedRealtimeInferenceInstanceTypes", ENDPOINT),
        ("SupportedTransformInstanceTypes", BATCH),
    ):
        given = spec.get(name, ())
        if not given:
            yield f"`{name}` is empty"
        for kind in given:
            if kind not in known:
                yield f"`{name}` holds `{kind}`; the image supports {', '.join(known)}"


def _validation(request: Request, _: str) -> Iterator[str]:
    """AWS runs one batch job of the package before it is listed."""
    spec = request.get("InferenceSpecification", {})
    profiles = request.get("ValidationSpecification", {}).get("ValidationProfiles", [])
    if len(profiles) != 1:
        yield f"`ValidationProfiles` has {len(profiles)} entries; it must have one"
    for profile in profiles:
        job = profile.get("TransformJobDefinition", {})
        read, write = job.get("TransformInput", {}), job.get("TransformOutput", {})
        resources = job.get("TransformResources", {})
        if read.get("ContentType") not in spec.get("SupportedContentTypes", ()):
            yield "`TransformInput.ContentType` is not one of `SupportedContentTypes`"
        if write.get("Accept") not in spec.get("SupportedResponseMIMETypes", ()):
            yield "`TransformOutput.Accept` is not one of `SupportedResponseMIMETypes`"
        if resources.get("InstanceType") not in spec.get("SupportedTransformInstanceTypes", ()):
            yield "`TransformResources.InstanceType` is not one of `SupportedTransformInstanceTypes`"
        if resources.get("InstanceCount") != 1:
            yield "`TransformResources.InstanceCount` must be 1"
        if "VolumeKmsKeyId" in resources:
            yield "`TransformResources.VolumeKmsKeyId` is refused for instance types with local disks"
        if (read.get("SplitType"), job.get("BatchStrategy")) != ("Line", "SingleRecord"):
            yield "`SplitType` must be Line and `BatchStrategy` SingleRecord: a line is a request"
        if read.get("CompressionType") != "None" or write.get("AssembleWith") != "Line":
            yield "`CompressionType` must be None and `AssembleWith` Line, as the samples are"
        if job.get("MaxConcurrentTransforms", 1) * job.get("MaxPayloadInMB", 6) > 100:
            yield "`MaxConcurrentTransforms` times `MaxPayloadInMB` is above 100"
        source = read.get("DataSource", {}).get("S3DataSource", {})
        if source.get("S3DataType") != "S3Prefix" or not str(source.get("S3Uri", "")).startswith("s3://"):
            yield "`S3DataSource` must be an S3Prefix in S3"
        if not str(write.get("S3OutputPath", "")).startswith("s3://"):
            yield "`S3OutputPath` must lie in S3"


RULES: Final[tuple[Callable[[Request, str], Iterator[str]], ...]] = (
    _certified,
    _container,
    _environment,
    _types,
    _validation,
)


def vendor_faults(vendor: Vendor, metered: bool, locked: bool) -> Iterator[str]:
    """Yield what is wrong beyond the requests; `metered`, `locked`: what the recorded server showed."""
    yield from _instances(vendor.instances)
    if int(vendor.image.user.partition(":")[0]) == 0:
        yield "`image.user` is root; the image must run as another"
    if not locked:
        yield "the recorded server had its lockdown off; a listed image has no way out"
    if vendor.pricing.kind is Pricing.INFERENCE and not metered:
        yield (
            "`pricing.kind` is inference, and the recorded answer had no X-Amzn-Inference-Metering header "
            f"for `{METERING_DIMENSION}`"
        )
    if _cuda(vendor.image.cuda) >= (13, 0):
        yield (
            f"`image.cuda` is {vendor.image.cuda}: batch transform and the validation job run on driver 535 "
            "(CUDA 12.2); list the image's CUDA 12 flavour"
        )


def cautions(vendor: Vendor, measured_on: set[str]) -> Iterator[str]:
    """Yield what AWS may accept and a careful vendor looks at again."""
    if BATCH_CUDA < _cuda(vendor.image.cuda) < (13, 0):
        yield (
            f"`image.cuda` is {vendor.image.cuda}, driver 535 is of 12.2: it runs by minor version "
            "compatibility only; try the batch job before submitting"
        )
    for name in (vendor.instances.recommended_realtime, vendor.instances.recommended_batch):
        if name not in measured_on:
            yield f"no figures were measured on `{name}`; the tables say on which machine they were"
    days = vendor.pricing.trial_days
    if days is not None and not 14 <= days <= 30:
        yield f"`pricing.trial_days` is {days}; AWS recommends 14 to 30"


def _instances(given: Instances) -> Iterator[str]:
    if given.recommended_realtime not in given.realtime:
        yield "`instances.recommended_realtime` is not one of `instances.realtime`"
    if given.recommended_batch not in given.batch:
        yield "`instances.recommended_batch` is not one of `instances.batch`"


def _cuda(text: str) -> tuple[int, int]:
    if text == "none":
        return 0, 0
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _containers(request: Request) -> list[dict[str, Any]]:
    return list(request.get("InferenceSpecification", {}).get("Containers", []))
