"""What is to be deployed: a variant, a stack's name, a region, a value for each parameter.

Owns: reading parameter files and options. Must not know: AWS.
Invariant: a name that the variant has no parameter for is refused; missing values stay so, the plan tells.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.report import CommandError, ExitCode
from infra.templates import params
from infra.templates.variants import BY_NAME, Variant

if TYPE_CHECKING:
    from infra.deploy.memory import Need

STACK: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{0,127}")


@dataclass(frozen=True, slots=True)
class Choices:
    """A deployment; `values` holds given values and defaults, by parameter."""

    variant: Variant
    stack: str
    region: str
    values: dict[str, str]
    need: Need | None = None  # what a context takes of an accelerator's memory

    def number(self, name: str) -> int:
        """Return a parameter as a number; 0 where the variant has none or it is malformed."""
        text = self.values.get(name, "0")
        return int(text) if text.isdecimal() else 0

    @property
    def instance_types(self) -> tuple[str, ...]:
        """The instance types in the order they are tried."""
        names = (self.values.get(f"InstanceType{suffix}", "") for suffix in ("", "2", "3"))
        return tuple(name for name in names if name)

    def parameters(self) -> list[dict[str, str]]:
        """Return the values in CloudFormation's form."""
        return [{"ParameterKey": name, "ParameterValue": value} for name, value in self.values.items()]


def read(variant: str, stack: str, region: str, file: Path | None, given: list[str]) -> Choices:
    """Return the deployment that file and `NAME=VALUE` texts describe; raises CommandError."""
    if variant not in BY_NAME:
        hint = "one of " + ", ".join(BY_NAME)
        raise CommandError(ExitCode.USAGE, "bad_argument", f"`{variant}` is not a template", hint)
    if STACK.fullmatch(stack) is None:
        hint = "begin with a letter; letters, digits and hyphens, at most 128"
        raise CommandError(ExitCode.USAGE, "bad_argument", f"`{stack}` cannot name a stack", hint)
    chosen = BY_NAME[variant]
    values = {
        parameter.name: str(default)
        for parameter in params.of(chosen)
        if (default := params.default_of(parameter, chosen)) is not None
    }
    known = {parameter.name for parameter in params.of(chosen)}
    for name, value in (_entries(file) | _options(given)).items():
        if name not in known:
            hint = f"see infra/rendered/{variant}.parameters.example.json"
            raise CommandError(ExitCode.USAGE, "bad_argument", f"`{variant}` has no parameter `{name}`", hint)
        values[name] = value
    return Choices(chosen, stack, region, values)


def _entries(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        loaded: Any = json.loads(file.read_text(encoding="utf-8"))
        return {entry["ParameterKey"]: str(entry["ParameterValue"]) for entry in loaded}
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = "a list of {ParameterKey, ParameterValue}, as in infra/rendered/*.parameters.example.json"
        raise CommandError(
            ExitCode.USAGE, "bad_argument", f"`{file.name}` is no parameter file", hint
        ) from error


def _options(given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise CommandError(ExitCode.USAGE, "bad_argument", f"`{text}` is not NAME=VALUE")
    return {text.partition("=")[0]: text.partition("=")[2] for text in given}
