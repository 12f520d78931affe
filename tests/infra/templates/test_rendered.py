"""The committed files: the bytes that the data gives, YAML that reads back, what CloudFormation can take."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from infra.templates import emit, iam, page, params, render, template
from infra.templates.intrinsics import att, choose, find, ref, sub
from infra.templates.variants import ALL, BY_NAME, Variant
from sagemaker_entry.settings import Settings, variable
from scripts.generate import PAGES
from tests.infra.templates.loading import parse, rendered, texts, values

NAMES = [variant.name for variant in ALL]


@pytest.mark.parametrize("path", list(render.pages()))
def test_a_committed_file_has_the_bytes_that_its_source_gives(path: str) -> None:
    made = render.pages()[path]()
    assert (render.ROOT / path).read_text(encoding="utf-8") == made, "run python -m scripts.generate"
    assert path in PAGES  # scripts/check compares it, too


def test_no_file_in_the_folder_is_left_over() -> None:
    found = {f"{render.FOLDER}/{path.name}" for path in (render.ROOT / render.FOLDER).iterdir()}
    assert found == set(render.pages())


def test_a_property_dropped_at_the_source_changes_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = BY_NAME["realtime-image-newvpc"]
    before = render.template_text(variant)
    monkeypatch.setattr("infra.templates.endpoint.PROVISION_S", 3600)
    assert render.template_text(variant) != before


@pytest.mark.parametrize("variant", ALL, ids=NAMES)
def test_the_yaml_reads_back_as_the_data(variant: Variant) -> None:
    assert rendered(variant.name) == json.loads(json.dumps(template.build(variant)))


@pytest.mark.parametrize("variant", ALL, ids=NAMES)
def test_a_template_fits_into_an_inline_request(variant: Variant) -> None:
    assert len(render.template_text(variant).encode()) <= render.INLINE_BYTES


@pytest.mark.parametrize("variant", ALL, ids=NAMES)
def test_every_reference_names_something_that_is_there(variant: Variant) -> None:
    document = rendered(variant.name)
    known = document["Resources"].keys() | document["Parameters"].keys()
    named = {name for name in values(document, "Ref") if not name.startswith("AWS::")}
    named |= {attribute[0] for attribute in values(document, "Fn::GetAtt")}
    named |= {name for found in document["Resources"].values() for name in found.get("DependsOn", [])}
    assert named <= known
    assert set(document["Parameters"]) <= named | set(re.findall(r"\$\{(\w+)\}", " ".join(texts(document))))
    conditions = {found["Condition"] for found in document["Resources"].values() if "Condition" in found}
    conditions |= {choice[0] for choice in values(document, "Fn::If")}
    assert conditions == document["Conditions"].keys()


def test_there_are_twenty_variants_and_each_axis_matters() -> None:
    assert len(ALL) == 20
    bodies = {json.dumps(template.build(variant)["Resources"], sort_keys=True) for variant in ALL}
    assert len(bodies) == 20


def test_only_what_a_variant_needs_is_in_its_network() -> None:
    interfaces = {
        name: [
            text for text in rendered(name)["Resources"] if text.endswith("Endpoint") and text != "Endpoint"
        ]
        for name in NAMES
    }
    operators = ["ApiEndpoint", "StsEndpoint", "LogsEndpoint", "MonitoringEndpoint"]
    for name, found in interfaces.items():
        traffic, _, network = name.split("-")
        wanted = [] if network == "ownvpc" else ["S3Endpoint"]
        if wanted and traffic not in ("batch", "train"):
            wanted += ["RuntimeEndpoint", *operators]
        assert found == wanted, name
    conditions = [rendered("realtime-image-newvpc")["Resources"][name]["Condition"] for name in operators]
    assert set(conditions) == {"WithOperatorEndpoints"}


GOLDEN = {
    "batch-package-ownvpc": {
        "AccessLogBucket": "S3::Bucket",
        "AccessLogBucketPolicy": "S3::BucketPolicy",
        "AlarmTopic": "SNS::Topic",
        "AlarmTopicPolicy": "SNS::TopicPolicy",
        "Budget": "Budgets::Budget",
        "DataBucket": "S3::Bucket",
        "DataBucketPolicy": "S3::BucketPolicy",
        "ExecutionPolicy": "IAM::ManagedPolicy",
        "ExecutionRole": "IAM::Role",
        "JobFailed": "Events::Rule",
        "Key": "KMS::Key",
        "KeyAlias": "KMS::Alias",
        "Model": "SageMaker::Model",
    },
    "component-package-ownvpc": {
        "AlarmTopic": "SNS::Topic",
        "AlarmTopicPolicy": "SNS::TopicPolicy",
        "Budget": "Budgets::Budget",
        "ComponentLogs": "Logs::LogGroup",
        "Dashboard": "CloudWatch::Dashboard",
        "Disk": "CloudWatch::Alarm",
        "Endpoint": "SageMaker::Endpoint",
        "EndpointConfig": "SageMaker::EndpointConfig",
        "EndpointLogs": "Logs::LogGroup",
        "ErrorRate4xx": "CloudWatch::Alarm",
        "Errors5xx": "CloudWatch::Alarm",
        "ExecutionPolicy": "IAM::ManagedPolicy",
        "ExecutionRole": "IAM::Role",
        "FirstChunk": "CloudWatch::Alarm",
        "FromZero": "CloudWatch::Alarm",
        "FromZeroPolicy": "ApplicationAutoScaling::ScalingPolicy",
        "GpuMemory": "CloudWatch::Alarm",
        "InferenceComponent": "SageMaker::InferenceComponent",
        "InvokerPolicy": "IAM::ManagedPolicy",
        "Key": "KMS::Key",
        "KeyAlias": "KMS::Alias",
        "LatencyP99": "CloudWatch::Alarm",
        "MidStream": "CloudWatch::Alarm",
        "Model": "SageMaker::Model",
        "Saturation": "CloudWatch::Alarm",
        "ScalableTarget": "ApplicationAutoScaling::ScalableTarget",
        "ScalingPolicy": "ApplicationAutoScaling::ScalingPolicy",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_logical_id_stays_what_it_was(name: str) -> None:
    """Another ID is another resource: an update would replace what holds data or takes an hour to start."""
    found = {key: held["Type"].removeprefix("AWS::") for key, held in rendered(name)["Resources"].items()}
    assert found == GOLDEN[name]


TRICKY = [
    "no",
    "On",
    "0123",
    "1e3",
    "2026-11-23",
    "12:30",
    "a: b",
    "a #b",
    "",
    " a",
    "a ",
    "*",
    "-",
    "x,y",
    "[a]",
]
TRICKY += [
    "${A}",
    "null",
    "~",
    "é",
    'quo"te',
    "back\\slash",
    "key:",
    "AWS::StackName",
    "&a",
    "!a",
    "%",
    "@",
    "`",
    "|",
]


@pytest.mark.parametrize("text", TRICKY)
def test_a_text_that_yaml_could_misread_comes_back(text: str) -> None:
    document = {"key": text, "list": [text, {"deep": [text], "more": [text] * 40}], text or "x": {"a": text}}
    document |= {"short": sub(text), "given": sub(text, A=ref("B")), "one": choose("C", text, [text])}
    assert parse(emit.text(document)) == document


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, True, False, [], {}, ref("A"), att("A", "B.C"), find("A", ref("B"), "C")]
)
def test_other_values_come_back_too(value: object) -> None:
    wide = [value] * 60
    document = {"key": value, "list": wide, "map": {"deep": {"er": wide}}}
    assert parse(emit.text(document)) == document


def test_templates_are_made_without_any_sdk() -> None:
    code = "import sys, infra.templates.render as r; [f() for f in r.pages().values()]; print([n for n in "
    code += "('aws_cdk', 'boto3', 'botocore', 'yaml', 'typer') if n in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=render.ROOT, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.strip() == "[]", shown.stderr


def test_no_file_names_a_date_or_a_person() -> None:
    for path, make in render.pages().items():
        head = make().split("Parameters:")[0]
        assert not re.search(r"20[2-9][0-9]-[01][0-9]-[0-3][0-9]", head.replace("2010-09-09", "")), path


@pytest.mark.parametrize("variant", ALL, ids=NAMES)
def test_the_example_file_satisfies_the_templates_rules(variant: Variant) -> None:
    entries = json.loads(render.example_text(variant))
    known = {parameter.name: parameter for parameter in params.of(variant)}
    assert [entry["ParameterKey"] for entry in entries] == list(known)
    for entry in entries:
        parameter = known[entry["ParameterKey"]]
        choices = params.choices_of(parameter, variant)
        assert not parameter.refuses(entry["ParameterValue"]), entry
        assert not choices or entry["ParameterValue"] in {str(choice) for choice in choices}


def test_the_readme_is_made_from_the_templates_data() -> None:
    text = page.page()
    assert (render.ROOT / "infra/README.md").read_text(encoding="utf-8") == text, "run scripts.generate"
    statements = {
        sid for name in NAMES for notes in values(rendered(name)["Resources"], "reasons") for sid in notes
    }
    assert statements == set(iam.REASONS), "a reason that no template needs, or a statement without one"
    assert all(f"`{sid}`" in text for sid in statements)
    assert all(f"`{name}`" in text for name in rendered("realtime-image-newvpc")["Parameters"])


def test_a_container_gets_only_variables_that_the_product_knows() -> None:
    known = {variable(field.name) for field in dataclasses.fields(Settings)}
    for name in NAMES:
        for environment in values(rendered(name)["Resources"], "Environment"):
            assert set(environment) <= known and len(environment) <= 16
