"""Whether the customer's own keys can be used: state, region, and what their policies let the role do.

Owns: which actions each key needs, reading a key policy. Must not know: how AWS would decide a policy with
conditions: it says so.
Invariant: reads only. A policy that cannot be judged is `unchecked`, never `ok`.

The stack's role gets its rights on a key through IAM. They count only where the key's own policy hands the
decision to IAM, by naming the account's root, or names the role itself.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from typing import Any, Final

from infra.deploy.aws import Aws
from infra.deploy.choices import Choices
from infra.deploy.findings import Finding

NEEDED: Final = {
    "VolumeKeyArn": ("kms:CreateGrant", "kms:Decrypt", "kms:GenerateDataKey"),
    "ModelDataKeyArn": ("kms:Decrypt",),
}
POLICY: Final = "default"  # the one policy a key has


def keys(choices: Choices, aws: Aws) -> Iterator[Finding]:
    """Look whether the customer's own keys can be used."""
    for name, actions in NEEDED.items():
        arn = choices.values.get(name, "")
        if not arn:
            continue
        region = arn.split(":")[3]
        if region != choices.region:
            detail = f"`{name}` lies in {region}"
            yield Finding("keys", "refused", detail, f"name a key of {choices.region}")
            continue
        client = aws.client("kms")
        held = client.describe_key(KeyId=arn)["KeyMetadata"]
        if held["KeyState"] != "Enabled":
            detail = f"`{name}` is {held['KeyState']}"
            yield Finding("keys", "refused", detail, "enable the key, or name another")
        elif held.get("KeySpec", "SYMMETRIC_DEFAULT") != "SYMMETRIC_DEFAULT":
            yield Finding("keys", "refused", f"`{name}` is not symmetric", "name a symmetric key")
        else:
            yield Finding("keys", "ok", f"`{name}` is enabled")
            policy = json.loads(client.get_key_policy(KeyId=arn, PolicyName=POLICY)["Policy"])
            yield from _policy(name, arn, actions, policy)


def _policy(name: str, arn: str, actions: tuple[str, ...], policy: dict[str, Any]) -> Iterator[Finding]:
    """Look what the key's policy hands to IAM, action by action."""
    account = arn.split(":")[4]
    statements = _listed(policy.get("Statement", []))
    for action in actions:
        allows = [one for one in statements if one.get("Effect") == "Allow" and _covers(one, action)]
        denies = [one for one in statements if one.get("Effect") == "Deny" and _covers(one, action)]
        handed = [one for one in allows if _hands_to_iam(one, account)]
        if denies:
            detail = f"the policy of `{name}` denies `{action}` to some"
            yield Finding("keys", "unchecked", detail, "see that the stack's role is not among them")
        elif not handed:
            hint = f"let `arn:aws:iam::{account}:root` allow it in the key's policy; the role has it from IAM"
            yield Finding("keys", "refused", f"the policy of `{name}` does not hand `{action}` to IAM", hint)
        elif all(one.get("Condition") for one in handed):
            detail = f"the policy of `{name}` allows `{action}` under a condition"
            yield Finding("keys", "unchecked", detail, "see that the condition holds for SageMaker and S3")
        else:
            yield Finding("keys", "ok", f"`{name}`: IAM decides on `{action}`")


def _covers(statement: dict[str, Any], action: str) -> bool:
    """Return whether a statement speaks of `action`."""
    if "NotAction" in statement:
        return not any(_matches(action, one) for one in _listed(statement["NotAction"]))
    return any(_matches(action, one) for one in _listed(statement.get("Action", [])))


def _matches(action: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(action.lower(), pattern.lower())


def _hands_to_iam(statement: dict[str, Any], account: str) -> bool:
    principal = statement.get("Principal", {})
    named = _listed(principal.get("AWS", [])) if isinstance(principal, dict) else [principal]
    return any(one in ("*", account) or (one.endswith(f"::{account}:root")) for one in named)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
