"""Marketplace's rules: a planted wrong value in each field of a request is caught, by the field's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from infra import validation
from infra.marketplace import request, rules
from infra.templates.accounts import MARKETPLACE
from infra.templates.instances import HOST_IMAGES, host_image
from tests.infra.marketplace.making import MODEL, words

REGION = "us-east-1"
KEY = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"
SPEC = "InferenceSpecification"
BOX = [SPEC, "Containers", 0]
PROFILE = ["ValidationSpecification", "ValidationProfiles", 0]
JOB = [*PROFILE, "TransformJobDefinition"]


def right() -> dict[str, Any]:
    return request.requests(words(), MODEL, "application/jsonlines")[REGION]


def faults(held: dict[str, Any], region: str = REGION) -> list[str]:
    return [
        *validation.faults("sagemaker", "CreateModelPackage", held),
        *rules.region_faults(held, region),
    ]


def planted(path: list[Any], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(right())
    held: Any = made
    for step in path[:-1]:
        held = held[step]
    held[path[-1]] = value
    return made


def test_a_right_request_has_no_fault() -> None:
    assert faults(right()) == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["ModelPackageName"], "-x", "modelPackageName"),
        (["ModelPackageName"], "x" * 64, "modelPackageName"),
        (["ModelPackageName"], "", "ModelPackageName"),
        (["ModelPackageDescription"], "x" * 1025, "modelPackageDescription"),
        (["ModelPackageDescription"], "a\nb", "modelPackageDescription"),
        (["CertifyForMarketplace"], False, "CertifyForMarketplace"),
        (["ClientToken"], "x" * 37, "clientToken"),
        (["Tags"], [{"Key": "a", "Value": "b"}] * 51, "tags"),
        (["ModelPackageGroupName"], "group", "ModelPackageGroupName"),
        (["SkipModelValidation"], "All", "SkipModelValidation"),
        (["ModelApprovalStatus"], "Approved", "ModelApprovalStatus"),
        (["DriftCheckBaselines"], {}, "DriftCheckBaselines"),
        (["SourceAlgorithmSpecification"], {"SourceAlgorithms": []}, "SourceAlgorithmSpecification"),
        (["SecurityConfig"], {"KmsKeyId": KEY}, "SecurityConfig"),
        ([SPEC, "Containers"], [], "Containers"),
        ([SPEC, "Containers"], [right()[SPEC]["Containers"][0]] * 2, "Containers"),
        ([*BOX, "Image"], "strongroom:latest", "Image"),
        ([*BOX, "Image"], right()[SPEC]["Containers"][0]["Image"].replace("east", "west"), "Image"),
        ([*BOX, "Image"], right()[SPEC]["Containers"][0]["Image"].replace("1234", "4321"), "ValidationRole"),
        ([*BOX, "Image"], "x" * 256, "containers.1.member.image"),
        ([*BOX, "ImageDigest"], "sha256:" + "1" * 64, "ImageDigest"),
        ([*BOX, "ImageDigest"], "md5:0", "imageDigest"),
        ([*BOX, "ModelDataUrl"], "s3://b/model/", "ModelDataUrl"),
        ([*BOX, "ModelDataUrl"], "ftp://b/model.tar.gz", "modelDataUrl"),
        ([*BOX, "ModelDataSource"], {"S3DataSource": {}}, "ModelDataUrl"),
        ([*BOX, "Environment"], {f"A{index}": "x" for index in range(17)}, "Containers.Environment"),
        ([*BOX, "Environment"], {"a b": "x"}, "environment"),
        ([*BOX, "Environment"], {"A": "x" * 1025}, "environment"),
        ([*BOX, "Environment"], {"MY_SECRET": "x"}, "Environment.MY_SECRET"),
        ([*BOX, "Environment"], {"HF_TOKEN": "x"}, "Environment.HF_TOKEN"),
        ([*BOX, "Environment"], {"A": "AKIA" + "A" * 16}, "Environment.A"),
        ([*BOX, "Environment"], {"A": "-----BEGIN PRIVATE KEY"}, "Environment.A"),
        ([*BOX, "Environment"], {"A": "0123456789abcdef" * 4}, "Environment.A"),
        ([*BOX, "Environment"], {"HTTPS_PROXY": "x"}, "Environment.HTTPS_PROXY"),
        ([*BOX, "Environment"], {"AWS_ENDPOINT_URL": "x"}, "Environment.AWS_ENDPOINT_URL"),
        ([*BOX, "Environment"], {"A": "https://licence.example"}, "Environment.A"),
        ([*BOX, "Environment"], {"STRONGROOM_LOCKDOWN": "off"}, "Environment.STRONGROOM_LOCKDOWN=off"),
        ([*BOX, "Environment"], {"STRONGROOM_ALLOW_PLAINTEXT": "on"}, "STRONGROOM_ALLOW_PLAINTEXT=on"),
        ([*BOX, "Environment", "STRONGROOM_KEY"], "invocation:", "`Environment.STRONGROOM_KEY` must say"),
        ([*BOX, "Environment", "STRONGROOM_KEY"], "image:/a", "`Environment.STRONGROOM_KEY` must say"),
        (
            [*BOX, "Environment", "STRONGROOM_VENDOR_ROOTS"],
            "ed25519:0",
            "`Environment.STRONGROOM_VENDOR_ROOTS` must",
        ),
        ([*BOX, "Environment"], {"HF_MODEL_ID": "org/model"}, "Environment.HF_MODEL_ID"),
        ([*BOX, "FrameworkVersion"], "10.0", "frameworkVersion"),
        ([*BOX, "Framework"], 5, "Framework"),
        ([SPEC, "SupportedContentTypes"], ["text/csv"], "`SupportedContentTypes` must hold"),
        ([SPEC, "SupportedResponseMIMETypes"], ["json"], "supportedResponseMIMETypes"),
        ([SPEC, "SupportedResponseMIMETypes"], ["text/csv"], "`SupportedResponseMIMETypes` must hold"),
        ([SPEC, "SupportedRealtimeInferenceInstanceTypes"], ["ml.g99.large"], "enum value set"),
        ([SPEC, "SupportedRealtimeInferenceInstanceTypes"], ["ml.t2.medium"], "the image supports"),
        ([SPEC, "SupportedRealtimeInferenceInstanceTypes"], [], "SupportedRealtime"),
        ([SPEC, "SupportedTransformInstanceTypes"], ["ml.p5.48xlarge"], "SupportedTransform"),
        ([SPEC, "SupportedTransformInstanceTypes"], [], "SupportedTransform"),
        (["ValidationSpecification", "ValidationRole"], "role", "validationRole"),
        (["ValidationSpecification", "ValidationProfiles"], [], "ValidationProfiles"),
        ([*PROFILE, "ProfileName"], "-", "profileName"),
        ([*JOB, "BatchStrategy"], "MultiRecord", "BatchStrategy"),
        ([*JOB, "BatchStrategy"], "Both", "batchStrategy"),
        ([*JOB, "MaxConcurrentTransforms"], 17, "MaxConcurrentTransforms"),
        ([*JOB, "MaxPayloadInMB"], 100, "MaxPayloadInMB"),
        ([*JOB, "Environment"], {f"A{index}": "x" for index in range(17)}, "environment"),
        ([*JOB, "TransformInput", "ContentType"], "text/csv", "ContentType"),
        ([*JOB, "TransformInput", "SplitType"], "RecordIO", "SplitType"),
        ([*JOB, "TransformInput", "CompressionType"], "Gzip", "CompressionType"),
        (
            [*JOB, "TransformInput", "DataSource", "S3DataSource", "S3DataType"],
            "ManifestFile",
            "S3DataSource",
        ),
        ([*JOB, "TransformInput", "DataSource", "S3DataSource", "S3Uri"], "https://b/x", "S3DataSource"),
        ([*JOB, "TransformOutput", "S3OutputPath"], "https://b/x", "S3OutputPath"),
        ([*JOB, "TransformOutput", "Accept"], "text/csv", "Accept"),
        ([*JOB, "TransformOutput", "AssembleWith"], "None", "AssembleWith"),
        ([*JOB, "TransformResources", "InstanceType"], "ml.g6e.xlarge", "TransformResources.InstanceType"),
        ([*JOB, "TransformResources", "InstanceCount"], 2, "InstanceCount"),
        ([*JOB, "TransformResources", "VolumeKmsKeyId"], KEY, "VolumeKmsKeyId"),
        (["Unheard"], "x", "Unheard"),
    ],
)
def test_a_planted_wrong_value_is_caught_by_name(path: list[Any], value: Any, named: str) -> None:
    found = faults(planted(path, value))
    assert any(named in fault for fault in found), found


def test_a_package_without_a_name_of_its_own_is_refused() -> None:
    held = right()
    del held["ModelPackageName"]
    assert any("`ModelPackageName` is missing" in fault for fault in faults(held))


def test_every_region_of_the_map_can_be_listed_from_and_no_other() -> None:
    arns = request.arn_map(words())
    assert set(arns) == set(MARKETPLACE) and len(set(arns.values())) == len(MARKETPLACE)
    assert any("no Marketplace account" in fault for fault in faults(right(), "me-south-1"))


def test_a_request_keeps_its_token_as_long_as_it_keeps_its_content() -> None:
    assert right()["ClientToken"] == right()["ClientToken"]
    other = request.requests(words(product__version="1.0.1"), MODEL, "application/jsonlines")[REGION]
    assert other["ClientToken"] != right()["ClientToken"]


@pytest.mark.parametrize("version", ["1.0.0", "12.0.1", "1234.1234.1234"])
def test_the_framework_version_fits_its_pattern(version: str) -> None:
    made = request.requests(words(product__version=version), MODEL, "application/json")[REGION]
    assert faults(made) == []


@pytest.mark.parametrize(
    ("changes", "metered", "locked", "named"),
    [
        ({"image__user": "0"}, False, True, "`image.user` is root"),
        ({"image__cuda": "13.0"}, False, True, "driver 535"),
        ({}, False, False, "lockdown off"),
        ({"instances__recommended_realtime": "ml.g5.12xlarge"}, False, True, "recommended_realtime"),
        ({"instances__recommended_batch": "ml.g5.12xlarge"}, False, True, "recommended_batch"),
        ({"pricing": {"kind": "inference", "unit": "an answer"}}, False, True, "X-Amzn-Inference-Metering"),
    ],
)
def test_a_product_that_would_not_pass_is_told(
    changes: dict[str, Any], metered: bool, locked: bool, named: str
) -> None:
    (found,) = rules.vendor_faults(words(**changes), metered, locked)
    assert named in found


def test_a_good_product_has_no_fault_metered_or_not() -> None:
    assert list(rules.vendor_faults(words(), False, True)) == []
    metered = words(pricing={"kind": "inference", "unit": "an answer"})
    assert list(rules.vendor_faults(metered, True, True)) == []
    assert list(rules.vendor_faults(words(image__cuda="none"), False, True)) == []


def test_what_a_careful_vendor_looks_at_again_is_a_warning() -> None:
    measured = {"ml.g6.xlarge"}
    assert list(rules.cautions(words(), measured)) == []
    assert "minor version" in next(rules.cautions(words(image__cuda="12.4"), measured))
    assert "no figures were measured on `ml.g6.xlarge`" in next(rules.cautions(words(), {""}))
    assert "14 to 30" in next(rules.cautions(words(pricing__trial_days=60), measured))


@pytest.mark.parametrize(
    ("cuda", "newest"), [("12.2", "12.2"), ("12.3", "12.4"), ("12.8", "13.0"), ("11.8", "12.2")]
)
def test_the_oldest_host_image_that_runs_the_image_is_chosen(cuda: str, newest: str) -> None:
    assert host_image(cuda) == HOST_IMAGES[newest]
    with pytest.raises(ValueError, match="no host image"):
        host_image("14.0")
