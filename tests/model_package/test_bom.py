"""The bill of materials against CycloneDX's own schema, and what lies in the clear against its signature.

The schemas in `cyclonedx/` are the project's, unmodified, under Apache-2.0.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from model_package import beside, bom, rewrapping, sealer
from model_package.beside import Documents, DocumentsRefused
from model_package.manifest import Manifest
from model_package.opener import open_package
from tests.model_package import making

SCHEMAS = Path(__file__).parent / "cyclonedx"
REPORT = {
    "architecture": "TinyForCausalLM",
    "parameters": 2_000_000,
    "rows": [
        {
            "variant": "int8-block",
            "quality": {"perplexity": 10.5, "kl_mean": 0.004, "kl_p99": 0.02, "top1_agreement": 0.97},
        },
        {"variant": "fp8", "quality": None},
    ],
}
TEXTS = {"LICENSE": b"Do as you like.", "README.md": b"# tiny"}
DESCRIBED = bom.Described("Apache-2.0", "maker/tiny", REPORT)


def validator() -> Any:
    registry: Any = Registry()
    for name in ("spdx", "jsf-0.82"):
        schema = Resource.from_contents(json.loads((SCHEMAS / f"{name}.schema.json").read_bytes()))
        registry = registry.with_resource(f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", schema)
    return jsonschema.Draft7Validator(
        json.loads((SCHEMAS / "bom-1.6.schema.json").read_bytes()), registry=registry
    )


def sealed(folder: Path, described: bom.Described | None = DESCRIBED) -> Manifest:
    told = sealer.Sealing(
        making.Owner.VENDOR,
        sealer.Model("tiny", "1.0"),
        making.CREATED_S,
        log2_chunk=making.SMALL_CHUNK_LOG2,
        documents=Documents(TEXTS, described),
    )
    files = sealer.files_of(making.model(folder / "plain"))
    wrap = sealer.to_public_keys([])
    return sealer.seal(files, folder / "package", told, making.key("data"), wrap, making.key("vendor"))


def proved(package: Path, made: Manifest) -> dict[str, Any] | None:
    return beside.prove(package, made, making.trust().roots, making.NOW_S)


def test_a_bill_follows_the_official_schema_and_names_every_file_with_its_digest(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    bill = proved(tmp_path / "package", made)
    assert bill is not None
    validator().validate(bill)
    named = {each["name"]: each["hashes"][0]["content"] for each in bill["components"]}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in TEXTS.items()}
    assert named == {entry.name: entry.sha256 for entry in made.files} | digests
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["modelCard"]["considerations"]
    assert model["pedigree"]["ancestors"][0]["name"] == "maker/tiny"
    assert bom.summary(bill)["metrics"][0] == {
        "metric": "perplexity",
        "value": "10.5",
        "variant": "int8-block",
    }
    assert bom.summary(bill)["licence"] == "Apache-2.0" and bom.summary(bill)["base_model"] == "maker/tiny"


@pytest.mark.parametrize("fault", ["licence", "metric", "hash", "field"])
def test_the_schema_refuses_what_is_no_bill(fault: str, tmp_path: Path) -> None:
    """So that the test above can fail."""
    bill = copy.deepcopy(proved(tmp_path / "package", sealed(tmp_path)))
    assert bill is not None
    model = bill["metadata"]["component"]
    if fault == "licence":
        model["licenses"] = [{"license": {"id": "Apache-3.0"}}]
    elif fault == "metric":
        model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] = 10.5
    elif fault == "hash":
        bill["components"][0]["hashes"][0]["content"] = "short"
    else:
        bill["more"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(bill)


def test_the_same_package_has_the_same_bill_and_no_plain_files_digest(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    raw = (tmp_path / "package" / beside.BOM_NAME).read_bytes()
    assert bom.make(made, DESCRIBED, TEXTS) == raw
    for content in making.plain(tmp_path / "plain").values():
        assert hashlib.sha256(content).hexdigest().encode() not in raw


def test_a_package_without_a_bill_says_so(tmp_path: Path) -> None:
    made = sealed(tmp_path, None)
    assert proved(tmp_path / "package", made) is None
    bare = bom.make(made, bom.Described("LicenseRef-Own", None, REPORT), {})
    validator().validate(json.loads(bare))
    assert bom.summary(json.loads(bare))["base_model"] is None


@pytest.mark.parametrize("name", [*TEXTS, beside.BOM_NAME, beside.BOM_SIGNATURE_NAME])
def test_a_changed_or_missing_document_is_refused_and_the_package_opens_still(
    name: str, tmp_path: Path
) -> None:
    made = sealed(tmp_path)
    path = tmp_path / "package" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(DocumentsRefused):
        proved(tmp_path / "package", made)
    path.unlink()
    if name != beside.BOM_NAME:
        with pytest.raises(DocumentsRefused):
            proved(tmp_path / "package", made)
    with making.opened(tmp_path / "package") as contents:
        assert making.read_all(contents) == making.plain(tmp_path / "plain")


def test_a_document_that_the_bill_does_not_name_is_refused(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    (tmp_path / "package" / "quality.md").write_text("| better than it is |")
    with pytest.raises(DocumentsRefused):
        proved(tmp_path / "package", made)


def test_a_bill_of_another_package_or_by_another_signer_is_refused(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    (tmp_path / "other").mkdir()
    sealed(tmp_path / "other")
    package, other = tmp_path / "package", tmp_path / "other" / "package"
    for name in (beside.BOM_NAME, beside.BOM_SIGNATURE_NAME):
        (package / name).write_bytes((other / name).read_bytes())
    with pytest.raises(DocumentsRefused):
        proved(package, made)
    bill = bom.make(made, DESCRIBED, TEXTS)
    (package / beside.BOM_NAME).write_bytes(bill)
    forged = beside.signature.sign(bill, making.key("customer"), beside.BOM_PURPOSE)
    (package / beside.BOM_SIGNATURE_NAME).write_bytes(forged)
    with pytest.raises(DocumentsRefused):
        proved(package, made)
    as_manifest = beside.signature.sign(bill, making.key("vendor"))  # right signer, another purpose
    (package / beside.BOM_SIGNATURE_NAME).write_bytes(as_manifest)
    with pytest.raises(DocumentsRefused):
        proved(package, made)


def test_a_bill_goes_along_when_the_key_is_wrapped_anew(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    package, new = tmp_path / "package", tmp_path / "new"
    documents = Documents(TEXTS, bill=(package / beside.BOM_NAME).read_bytes())
    with open_package(package, making.trust()) as opened:
        rewrapped = rewrapping.rewrap(
            package, opened, new, making.key("data"), lambda _c, _k: [], making.key("vendor"), 9, documents
        )
    assert rewrapped.epoch == 9 and proved(new, rewrapped) == proved(package, made)
