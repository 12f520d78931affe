"""One line of a plan: what was looked at, what was found, what to do.

Owns: the form and the states. Must not know: any check.
Invariant: a check that could not look says `unchecked`, never `ok`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from infra.deploy.aws import DENIED, Aws
from infra.deploy.choices import Choices

State = Literal["ok", "note", "warn", "refused", "unchecked"]
MARKS: Final[dict[State, str]] = {
    "ok": "ok  ",
    "note": "note",
    "warn": "WARN",
    "refused": "FAIL",
    "unchecked": "????",
}


# What AWS says of a thing that is not there: then the deployment cannot work, whoever asks.
ABSENT: Final = {
    "RepositoryNotFoundException": (
        "the repository of `ImageUri` is not there",
        "make it and push the image",
    ),
    "NoSuchBucket": ("`ModelBucketName` is not there", "make the bucket and upload the sealed model"),
    "InvalidSubnetID.NotFound": ("a subnet of `SubnetIds` is not there", "name subnets of this region"),
    "NotFoundException": ("a key is not there", "name keys of this region by their ARN"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding; `hint` is the next move."""

    check: str
    state: State
    detail: str
    hint: str = ""


Check = Callable[[Choices, Aws], Iterator[Finding]]


def looked(name: str, check: Check, choices: Choices, aws: Aws) -> list[Finding]:
    """Return what a check found; what is absent is refused, what may not be asked is `unchecked`."""
    import botocore.exceptions as refusals

    found: list[Finding] = []
    try:
        found.extend(check(choices, aws))
    except refusals.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code in ABSENT:
            found.append(Finding(name, "refused", *ABSENT[code]))
            return found
        why = "is not allowed" if code in DENIED else f"was refused ({code})"
        hint = f"give the caller the right to {error.operation_name}, or look by hand"
        found.append(Finding(name, "unchecked", f"`{error.operation_name}` {why}", hint))
    except refusals.BotoCoreError as error:
        detail = f"AWS could not be asked ({type(error).__name__})"
        found.append(Finding(name, "unchecked", detail, "check credentials and network"))
    return found
