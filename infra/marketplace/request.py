"""The CreateModelPackage request of each region.

Owns: which field gets which value. Must not know: the folder, the texts.
Invariant: the same facts give the same bytes, token included, so that a second submission makes no second
package.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import msgspec

from infra.marketplace.vendor import Source, Vendor
from infra.templates.accounts import MARKETPLACE

JSON_TYPE: Final = "application/json"
STREAM_TYPE: Final = "text/event-stream"
BATCH_PAYLOAD_MB: Final = 6
BATCH_CALLS: Final = 8
PROFILE: Final = "strongroom-batch"


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sealed package that is sold, as its signed manifest says."""

    name: str
    version: str
    package_id: str
    content_sha256: str
    sealed_bytes: int


def requests(vendor: Vendor, model: Model, batch_type: str) -> dict[str, dict[str, Any]]:
    """Return the request for each region; `batch_type` is what a line of a batch is sent as."""
    return {source.region: _request(vendor, source, model, batch_type) for source in vendor.regions}


def arn_map(vendor: Vendor) -> dict[str, str]:
    """Return the package's ARN, as a buyer will see it, in each region with a Marketplace account."""
    return {
        region: f"arn:aws:sagemaker:{region}:{account}:model-package/{vendor.product.package_name}"
        for region, account in MARKETPLACE.items()
    }


def _request(vendor: Vendor, source: Source, model: Model, batch_type: str) -> dict[str, Any]:
    product, instances = vendor.product, vendor.instances
    types = list(dict.fromkeys([JSON_TYPE, batch_type]))
    made: dict[str, Any] = {
        "ModelPackageName": product.package_name,
        "ModelPackageDescription": product.short_description,
        "CertifyForMarketplace": True,
        "InferenceSpecification": {
            "Containers": [
                {
                    "Image": source.image,
                    "ImageDigest": source.image.partition("@")[2],
                    "ModelDataUrl": source.model_data,
                    "Environment": dict(sorted(vendor.image.environment.items())),
                    "Framework": "STRONGROOM",
                    "FrameworkVersion": _framework_version(product.version),
                }
            ],
            "SupportedContentTypes": types,
            "SupportedResponseMIMETypes": [JSON_TYPE, STREAM_TYPE, *types[1:]],
            "SupportedRealtimeInferenceInstanceTypes": list(instances.realtime),
            "SupportedTransformInstanceTypes": list(instances.batch),
        },
        "ValidationSpecification": {
            "ValidationRole": source.role,
            "ValidationProfiles": [
                {"ProfileName": PROFILE, "TransformJobDefinition": _job(vendor, source, batch_type)}
            ],
        },
        "Tags": [
            {"Key": "strongroom:version", "Value": product.version},
            {"Key": "strongroom:package", "Value": model.package_id},
        ],
    }
    canonical = json.dumps(made, sort_keys=True, separators=(",", ":")).encode()
    return {**made, "ClientToken": hashlib.sha256(canonical).hexdigest()[:36]}


def _job(vendor: Vendor, source: Source, batch_type: str) -> dict[str, Any]:
    """Return the one batch job that AWS runs before it lists the package; its data is shown to buyers."""
    read = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": source.validation_input}}
    return {
        "BatchStrategy": "SingleRecord",
        "MaxConcurrentTransforms": BATCH_CALLS,
        "MaxPayloadInMB": BATCH_PAYLOAD_MB,
        "TransformInput": {
            "DataSource": read,
            "ContentType": batch_type,
            "SplitType": "Line",
            "CompressionType": "None",
        },
        "TransformOutput": {
            "S3OutputPath": source.validation_output,
            "Accept": batch_type,
            "AssembleWith": "Line",
        },
        "TransformResources": {"InstanceType": vendor.instances.recommended_batch, "InstanceCount": 1},
    }


def _framework_version(version: str) -> str:
    """Return a version within the model's pattern: one digit first, ten characters at most."""
    major, _, rest = version.partition(".")
    return f"{major[-1]}.{rest}"[:10]
