"""Synthesis through the CDK, cdk-nag and cfn-guard, in one process; runs in the environment that has them.

Owns: which findings are answered by which sentence. Must not know: how its environment is made.
Invariant: a finding without a sentence fails, a sentence that no finding needs fails, and so does a planted
fault that nobody finds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from infra.templates import app as room  # first: it chooses Node before the bindings are loaded

# isort: split
import aws_cdk as cdk
from cdk_nag import AwsSolutionsChecks
from cdklabs.cdk_validator_cfnguard import CfnGuardValidator

from infra.templates.iam import REASONS
from infra.templates.reasons import GUARD, NAG
from infra.templates.render import ROOT, template_name, template_text
from infra.templates.variants import ALL, BY_NAME, Variant
from tests.infra.linting.plants import PLANTS, VARIANT

Found = set[tuple[str, str, str]]  # stack, rule, logical ID ("" where the linter names none)
Change = Callable[[dict[str, Any]], object]


def drift() -> list[str]:
    """Return the rendered files whose bytes differ from their source, which the CDK was compared with."""
    return [
        variant.name
        for variant in ALL
        if (ROOT / "infra/rendered" / template_name(variant)).read_text(encoding="utf-8")
        != template_text(variant)
    ]


def add(app: cdk.App, name: str, variant: Variant, change: Change | None = None) -> None:
    """Add a variant as a stack, with a change to its data."""
    stack = cdk.Stack(
        app,
        name,
        analytics_reporting=False,
        synthesizer=cdk.DefaultStackSynthesizer(generate_bootstrap_version_rule=False),
    )
    document = json.loads(json.dumps(room.template.build(variant)))
    if change is not None:
        change(document)
    with mock.patch.object(room.template, "build", lambda _: document):
        room.strongroom(stack, variant)


def findings(folder: Path, stacks: Mapping[str, tuple[Variant, Change | None]]) -> Found:
    """Return what cdk-nag and cfn-guard, AWS Control Tower's rules and our own, find in each stack."""
    app = cdk.App(
        outdir=str(folder),
        analytics_reporting=False,
        context={"@aws-cdk/core:failSynthOnValidationErrors": False},
    )
    guard = CfnGuardValidator(control_tower_rules_enabled=True, rules=[str(ROOT / "infra/guard")])
    cdk.Validations.of(app).add_plugins(AwsSolutionsChecks(app), guard)
    for name, (variant, change) in stacks.items():
        add(app, name, variant, change)
    app.synth()
    report = json.loads((folder / "validation-report.json").read_text(encoding="utf-8"))
    found: Found = set()
    for plugin in report["pluginReports"]:
        for violation in plugin["violations"]:
            for place in violation["violatingConstructs"] or [{}]:
                stack, _, logical_id = (place.get("constructPath") or "").partition("/")
                found.add((stack, violation["ruleName"], logical_id))
    return found


def unfound_plants(found: Found) -> list[str]:
    """Return the planted faults that no linter found by the rule named for them."""
    seen = {(stack, rule) for stack, rule, _ in found}
    return [
        name
        for index, (name, (rule, _)) in enumerate(PLANTS.items())
        if not any(stack == f"plant{index}" and given.startswith(rule) for stack, given in seen)
    ]


def unseen_drops(folder: Path) -> list[str]:
    """Return which unfaithful syntheses go unnoticed: a property nobody knows, a value that changed."""
    unnoticed = []
    app = cdk.App(outdir=str(folder), analytics_reporting=False)

    def unknown(document: dict[str, Any]) -> None:
        document["Resources"]["Key"]["Properties"]["Unheard"] = 1

    try:
        add(app, "unknown", ALL[0], unknown)
        unnoticed.append("unknown property")
    except TypeError:
        pass
    try:
        room.compare("key", {"A": [1, {"B": 2}]}, {"A": [1, {}]})
        unnoticed.append("dropped value")
    except room.NotSynthesised:
        pass
    return unnoticed


def main() -> int:
    """Print one JSON object; 1 when something is unanswered."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        templates = room.synthesise(Path(scratch) / "synthesis")
        synthesis_s = time.monotonic() - start_s
        found = findings(Path(scratch) / "linting", {variant.name: (variant, None) for variant in ALL})
        planted = {
            f"plant{index}": (BY_NAME[VARIANT], change) for index, (_, change) in enumerate(PLANTS.values())
        }
        unfound = unfound_plants(findings(Path(scratch) / "planted", planted))
        unnoticed = unseen_drops(Path(scratch) / "drops")
    answers = {(f"AwsSolutions-IAM5[{what}]", where) for where, what in NAG} | set(GUARD)
    seen = {(rule, where) for _, rule, where in found}
    # cfn-guard names no resource for some findings: those are answered by a sentence for their rule.
    placeless = {rule for rule, where in seen if not where}
    result: dict[str, Any] = {
        "templates": len(templates),
        "synthesis_s": round(synthesis_s, 1),
        "drift": drift(),
        "answered": len(seen & answers),
        "unanswered": sorted({pair for pair in seen if pair[1]} - answers)
        + sorted(placeless - {rule for rule, _ in answers}),
        "not_needed": sorted(answers - seen),
        "unknown_reasons": [sid for sids in NAG.values() for sid in sids if sid not in REASONS],
        "plants": len(PLANTS),
        "unfound_plants": unfound,
        "unseen_drops": unnoticed,
    }
    faults = ("drift", "unanswered", "not_needed", "unknown_reasons", "unfound_plants", "unseen_drops")
    result["ok"] = not any(result[name] for name in faults)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
