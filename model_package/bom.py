"""The bill of materials of a package, CycloneDX 1.6 in JSON: what is in it, under which licence, how good.

Owns: which fact stands in which field. Must not know: how anything was measured, keys.
Invariant: the same manifest, declarations, report and documents give the same bytes; every figure is the
report's; digests are of files as they lie there, so that nothing tells what a sealed one holds.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from model_package.manifest import Manifest

SPEC_VERSION: Final = "1.6"
TOOL: Final = "strongroom"
CONTENT: Final = "strongroom:content_sha256"
STORED: Final = "strongroom:stored"
SIZE: Final = "strongroom:size"
METRICS: Final = {
    "perplexity": "perplexity",
    "kl_mean": "mean KL divergence from the unquantized model, nats per token",
    "kl_p99": "99th percentile of that divergence",
    "top1_agreement": "share of positions with the unquantized model's likeliest token",
}
LIMITS: Final = (
    "The figures compare forms of the same weights on one text; they are no measure of a task.",
    "A language model states falsehoods with confidence and repeats the biases of its training data.",
)


@dataclass(frozen=True, slots=True)
class Described:
    """What the manifest does not say: declared by the owner, or measured."""

    licence: str  # SPDX expression
    base_model: str | None
    report: Mapping[str, Any]  # the quality report's JSON


def make(manifest: Manifest, described: Described, documents: Mapping[str, bytes]) -> bytes:
    """Return the bill of the package of `manifest`; `documents` lie beside it in the clear."""
    sealed = [
        _file(entry.name, entry.sha256, {STORED: entry.stored_name, SIZE: str(entry.size)})
        for entry in manifest.files
    ]
    clear = [
        _file(name, hashlib.sha256(content).hexdigest(), {SIZE: str(len(content))}, "clear:")
        for name, content in sorted(documents.items())
    ]
    made = datetime.datetime.fromtimestamp(manifest.created_s, datetime.UTC)
    bill = {
        "bomFormat": "CycloneDX",
        "components": [*sealed, *clear],
        "dependencies": [{"dependsOn": [each["bom-ref"] for each in (*sealed, *clear)], "ref": "model"}],
        "metadata": {
            "component": _model(manifest, described),
            "timestamp": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"name": TOOL, "type": "application"}]},
        },
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=bytes.fromhex(manifest.package_id), version=4)}",
        "specVersion": SPEC_VERSION,
        "version": 1,
    }
    return json.dumps(bill, sort_keys=True, indent=1).encode() + b"\n"


def content_of(bill: Mapping[str, Any]) -> str | None:
    """Return the content digest that a bill says it is of."""
    properties = bill["metadata"]["component"]["properties"]
    return next((each["value"] for each in properties if each["name"] == CONTENT), None)


def clear_files(bill: Mapping[str, Any]) -> dict[str, str]:
    """Return the documents that a bill names, with their SHA-256."""
    named = (each for each in bill["components"] if each["bom-ref"].startswith("clear:"))
    return {each["name"]: each["hashes"][0]["content"] for each in named}


def summary(bill: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person wants of a bill at one look."""
    model = bill["metadata"]["component"]
    ancestors = model.get("pedigree", {}).get("ancestors", [])
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    return {
        "licence": model["licenses"][0]["expression"],
        "base_model": ancestors[0]["name"] if ancestors else None,
        "architecture": model["modelCard"]["modelParameters"]["modelArchitecture"],
        "metrics": [
            {"variant": each["slice"], "metric": each["type"], "value": each["value"]} for each in metrics
        ],
        "components": len(bill["components"]),
    }


def _model(manifest: Manifest, described: Described) -> dict[str, Any]:
    report = described.report
    model: dict[str, Any] = {
        "bom-ref": "model",
        "description": f"Sealed package: {report['parameters'] / 1e6:.0f} M parameters.",
        "licenses": [{"expression": described.licence}],
        "modelCard": {
            "considerations": {"technicalLimitations": list(LIMITS), "useCases": ["text generation"]},
            "modelParameters": {
                "architectureFamily": "transformer",
                "inputs": [{"format": "text"}],
                "modelArchitecture": report["architecture"],
                "outputs": [{"format": "text"}],
                "task": "text-generation",
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(report)},
        },
        "name": manifest.model.name,
        "properties": [
            {"name": CONTENT, "value": manifest.content_sha256},
            {"name": "strongroom:package_id", "value": manifest.package_id},
        ],
        "type": "machine-learning-model",
        "version": manifest.model.version,
    }
    if described.base_model is not None:
        ancestor = {
            "bom-ref": "base-model",
            "name": described.base_model,
            "type": "machine-learning-model",
        }
        model["pedigree"] = {"ancestors": [ancestor]}
    return model


def _metrics(report: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"slice": row["variant"], "type": words, "value": f"{row['quality'][name]:.6g}"}
        for row in report["rows"]
        if row["quality"] is not None
        for name, words in METRICS.items()
    ]


def _file(name: str, sha256: str, properties: Mapping[str, str], prefix: str = "sealed:") -> dict[str, Any]:
    return {
        "bom-ref": prefix + name,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "name": name,
        "properties": [{"name": key, "value": value} for key, value in sorted(properties.items())],
        "type": "file",
    }
