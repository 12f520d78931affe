"""The parameters that say which model is served, and what it is opened with.

Owns: their table. Must not know: the other groups of the form, which resource a parameter ends in.
Invariant: none of them is a secret: a key is named by where it comes from.
"""

from __future__ import annotations

from typing import Final

from infra.templates.params import SERVING, Parameter

KEY_ARN: Final = r"^(arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]{36})?$"
MODEL: Final = "Model"
_ROOT: Final = r"ed25519:[0-9a-f]{64}(@[0-9]{1,12})?"
_ACCOUNT: Final = "123456789012"

PARAMETERS: Final = (
    Parameter(
        "EndpointName",
        MODEL,
        "Name of the endpoint; a component's name is made of it.",
        example="strongroom",
        pattern=r"^[a-z0-9](-?[a-z0-9]){0,59}$",
        rule="1 to 60 of a-z, 0-9 and single hyphens inside",
        traffic=SERVING,
    ),
    Parameter(
        "ImageUri",
        MODEL,
        "The image in this account's ECR, by digest; a tag can be moved.",
        example=f"{_ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/strongroom@sha256:" + "0" * 64,
        pattern=r"^[0-9]{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/[a-z0-9._/-]+@sha256:[0-9a-f]{64}$",
        rule="ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME@sha256:DIGEST",
        source="image",
    ),
    Parameter(
        "RepositoryArn",
        MODEL,
        "ARN of the image's ECR repository; the role may pull from this one alone.",
        example=f"arn:aws:ecr:us-east-1:{_ACCOUNT}:repository/strongroom",
        pattern=r"^arn:aws[a-z-]*:ecr:[a-z0-9-]+:[0-9]{12}:repository/[a-z0-9._/-]+$",
        rule="the ARN of an ECR repository",
        source="image",
    ),
    Parameter(
        "ModelBucketName",
        MODEL,
        "Bucket that holds the sealed model.",
        example="example-models",
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
        rule="the name of a bucket",
        source="image",
    ),
    Parameter(
        "ModelKey",
        MODEL,
        "The sealed model in the bucket: a prefix with its slash, or one archive.",
        example="strongroom/v1/",
        pattern=r"^[A-Za-z0-9!_.()-][A-Za-z0-9!_.()/-]*(/|\.tar\.gz)$",
        rule="a prefix that ends in / or a key that ends in .tar.gz",
        traffic=("realtime", "async", "component", "train"),
        source="image",
    ),
    Parameter(
        "ModelLayout",
        MODEL,
        "A prefix of plain objects (faster to start) or one archive.",
        default="Prefix",
        choices=("Prefix", "TarGz"),
        traffic=SERVING,
        source="image",
    ),
    Parameter(
        "ModelTarKey",
        MODEL,
        "Key of the sealed model as one archive; batch transform takes no prefix.",
        example="strongroom/v1/model.tar.gz",
        pattern=r"^[A-Za-z0-9!_.()-][A-Za-z0-9!_.()/-]*\.tar\.gz$",
        rule="a key that ends in .tar.gz",
        traffic=("batch",),
        source="image",
    ),
    Parameter(
        "ModelDataKeyArn",
        MODEL,
        "KMS key of the model's bucket, if it has one of your own.",
        default="",
        pattern=KEY_ARN,
        rule="the ARN of a KMS key, or empty",
        source="image",
    ),
    Parameter(
        "VendorRoots",
        MODEL,
        "Public keys of the vendor that may sign the model.",
        example="ed25519:" + "0" * 63 + "1",
        pattern=rf"^({_ROOT},?){{1,16}}$",
        rule="1 to 16 of ed25519:HEX or ed25519:HEX@SECONDS, joined by commas",
        traffic=(*SERVING, "batch"),
        source="image",
    ),
    Parameter(
        "KeySource",
        MODEL,
        "Where the model's key comes from, never the key. With invocation: each instance awaits a call.",
        example="image:/etc/strongroom/share,/opt/ml/model/share",
        pattern=r"^(invocation:|(image|licence|recipient|file):[!-~]{1,512})$",
        rule="a key source of the container (model_package/KEYS.md)",
        traffic=(*SERVING, "batch"),
        source="image",
    ),
    Parameter(
        "ModelPackageName",
        MODEL,
        "Last part of the model package's ARN, as the subscription shows it.",
        example="strongroom-example-1-0-0",
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
        rule="1 to 63 letters, digits and hyphens inside",
        traffic=(*SERVING, "batch"),
        source="package",
    ),
    Parameter(
        "AlgorithmName",
        MODEL,
        "Last part of the algorithm's ARN, as the subscription shows it.",
        example="strongroom-example-1-0-0",
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
        rule="1 to 63 letters, digits and hyphens inside",
        traffic=("train",),
        source="package",
    ),
)
