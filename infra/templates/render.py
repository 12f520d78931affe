"""The files under `infra/rendered`: made from the templates' data, and compared with it byte by byte.

Owns: names and heads of the files, the index. Must not know: the CDK, which checks the same data on its own.
Invariant: rendering twice gives the same bytes; no date, machine or person is in a file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from infra import report
from infra.templates import emit, params, template
from infra.templates.variants import ALL, Variant

FOLDER: Final = "infra/rendered"
ROOT: Final = Path(__file__).resolve().parents[2]
INLINE_BYTES: Final = 51_200  # what CloudFormation takes without a bucket


def template_text(variant: Variant, document: dict[str, Any] | None = None) -> str:
    """Return the file of `variant`, from `document` where it was made elsewhere."""
    lines = [
        f"# Strongroom {report.version()}, {variant.name}. Generated: edit infra/templates, then run",
        "# python -m scripts.generate. Nothing here was run on AWS yet.",
    ]
    if variant.traffic == "component" and variant.source == "package":
        lines.append("# Components made from a Marketplace package: not confirmed by AWS.")
    return "\n".join(lines) + "\n" + emit.text(document or template.build(variant))


def example_text(variant: Variant) -> str:
    """Return a parameter file to start from: defaults, and examples where there is none."""
    entries = []
    for parameter in params.of(variant):
        default = params.default_of(parameter, variant)
        value = parameter.example if default is None else str(default)
        entries.append({"ParameterKey": parameter.name, "ParameterValue": value})
    return json.dumps(entries, indent=2) + "\n"


def index_text() -> str:
    """Return the page that says which file is for whom."""
    rows = [
        "# Rendered templates",
        "",
        "Generated from `infra/templates`. Each file deploys by itself: from the console, with",
        "`aws cloudformation deploy`, or with `strongroom deploy up`.",
        "",
        "| template | for | resources | bytes |",
        "|---|---|---|---|",
    ]
    for variant in ALL:
        text = template_text(variant)
        count = len(template.build(variant)["Resources"])
        title = f"{template.TITLES[variant.traffic]}, {template.describe(variant)}"
        rows.append(f"| [{variant.name}]({template_name(variant)}) | {title} | {count} | {len(text)} |")
    return "\n".join(rows) + "\n"


def template_name(variant: Variant) -> str:
    """Return the file's name."""
    return f"{variant.name}.template.yaml"


def pages() -> dict[str, Callable[[], str]]:
    """Return every rendered file's path in the repository, and what makes it."""
    made: dict[str, Callable[[], str]] = {f"{FOLDER}/INDEX.md": index_text}
    for variant in ALL:
        made[f"{FOLDER}/{template_name(variant)}"] = functools.partial(template_text, variant)
        example = f"{FOLDER}/{variant.name}.parameters.example.json"
        made[example] = functools.partial(example_text, variant)
    return made
