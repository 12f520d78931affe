"""`strongroom deploy plan`: everything that can be known before anything is made.

Owns: the order of the checks and the form of the report. Must not know: what a check asks.
Invariant: nothing is changed; a plan is good when nothing is refused.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from infra.deploy import key_checks, local_checks, remote_checks
from infra.deploy.aws import Aws
from infra.deploy.choices import Choices
from infra.deploy.findings import MARKS, Check, Finding, looked
from infra.report import Result

LOCAL: Final = (
    local_checks.values,
    local_checks.together,
    local_checks.regions,
    local_checks.host,
    local_checks.cost,
)
REMOTE: Final[tuple[tuple[str, Check], ...]] = (
    ("quota", remote_checks.quotas),
    ("zones", remote_checks.zones),
    ("image", remote_checks.image),
    ("package", remote_checks.package),
    ("model", remote_checks.model),
    ("keys", key_checks.keys),
    ("subnets", remote_checks.subnets),
    ("alarms", remote_checks.alarms),
)


def examine(choices: Choices, aws: Aws) -> Result:
    """Return all findings; AWS is asked only about values that are well formed."""
    found: list[Finding] = []
    for look in LOCAL:
        found += look(choices)
    if any(one.check == "parameters" and one.state == "refused" for one in found):
        found.append(Finding("aws", "unchecked", "AWS was not asked", "correct the parameters first"))
    else:
        for name, check in REMOTE:
            found += looked(name, check, choices, aws)
    return {
        "ok": not any(one.state == "refused" for one in found),
        "template": choices.variant.name,
        "stack": choices.stack,
        "region": choices.region,
        "findings": [asdict(one) for one in found],
    }


def show(result: Result) -> None:
    """Print one line a finding."""
    print(f"{result['template']} as {result['stack']} in {result['region']}")
    for one in result["findings"]:
        print(f"{MARKS[one['state']]}  {one['check']}: {one['detail']}")
        if one["hint"]:
            print(f"      hint: {one['hint']}")
