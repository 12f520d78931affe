"""The form of one resource of a template.

Owns: where dependencies, conditions, retention and linters' reasons go. Must not know: any resource type.
Invariant: what is retained when a stack is deleted is retained when a resource is replaced, too.
"""

from __future__ import annotations

from typing import Any

from infra.templates.intrinsics import Properties
from infra.templates.reasons import CHECKOV

Resource = dict[str, Any]
Resources = dict[str, Resource]


def resource(
    kind: str,
    properties: Properties,
    *,
    after: tuple[str, ...] = (),
    condition: str = "",
    retain: bool = False,
    skips: tuple[str, ...] = (),
    metadata: Properties | None = None,
) -> Resource:
    """Return a resource of CloudFormation type `kind`; `after` names what must exist before it."""
    made: Resource = {"Type": kind}
    if condition:
        made["Condition"] = condition
    if after:
        made["DependsOn"] = sorted(after)
    if retain:
        made["DeletionPolicy"] = "Retain"
        made["UpdateReplacePolicy"] = "Retain"
    notes = dict(metadata or {})
    if skips:
        notes["checkov"] = {"skip": [{"id": rule, "comment": CHECKOV[rule]} for rule in skips]}
    if notes:
        made["Metadata"] = notes
    made["Properties"] = properties
    return made


def statement(
    sid: str,
    actions: list[str] | str,
    resources: Any,
    *,
    effect: str = "Allow",
    principal: Any = None,
    condition: Properties | None = None,
) -> Properties:
    """Return one statement of a policy; `principal` is for policies that lie with a resource."""
    made: Properties = {"Sid": sid, "Effect": effect}
    if principal is not None:
        made["Principal"] = principal
    made["Action"] = actions
    made["Resource"] = resources
    if condition:
        made["Condition"] = condition
    return made


def policy(statements: list[Any]) -> Properties:
    """Return a policy document."""
    return {"Version": "2012-10-17", "Statement": statements}
