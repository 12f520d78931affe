"""What a person chooses when a template is deployed: the parameters of each variant.

Owns: names, types, patterns, ranges, defaults, example values, the groups of the console's form. Must not
know: which property of a resource a parameter ends in.
Invariant: a parameter without a default must be given; one with an empty default may stay empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from infra.templates.instances import BATCH, ENDPOINT, HOST_IMAGES
from infra.templates.variants import Variant

Default = str | int | None

SERVING: Final = ("realtime", "async", "component")
ANY: Final = (*SERVING, "batch", "train")
LOG_DAYS: Final = (365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)  # a year or more


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter; CloudFormation and `deploy plan` check ranges, choices and patterns."""

    name: str
    group: str
    text: str
    default: Default = None
    example: str = ""
    kind: str = "String"
    pattern: str = ""
    rule: str = ""  # what a value must be, in words
    choices: tuple[str | int, ...] = ()
    low: int | None = None
    high: int | None = None
    traffic: tuple[str, ...] = ANY
    source: str = ""
    network: str = ""

    @property
    def shown(self) -> str:
        """A value to start from: the default, else the example."""
        return self.example if self.default is None else str(self.default)

    @property
    def constraint(self) -> str:
        """What a value must be, as one sentence part."""
        if self.choices:  # CloudFormation lists them itself
            return ""
        if self.low is not None:
            return f"a whole number from {self.low} to {self.high}"
        return self.rule

    def refuses(self, value: str) -> bool:
        """Whether `value` breaks the rules, as CloudFormation would find before anything is made."""
        if self.choices:
            return value not in {str(choice) for choice in self.choices}
        if self.kind == "Number":
            whole = re.fullmatch(r"[0-9]{1,9}", value)
            return whole is None or not (self.low or 0) <= int(value) <= (self.high or 10**9)
        return bool(self.pattern) and re.fullmatch(self.pattern, value) is None


def of(variant: Variant) -> tuple[Parameter, ...]:
    """Return the parameters of `variant`, in the order of the form."""
    from infra.templates.parameter_table import TABLE

    return tuple(
        parameter
        for parameter in TABLE
        if variant.traffic in parameter.traffic
        and parameter.source in ("", variant.source)
        and parameter.network in ("", variant.network)
        and not (parameter.name == "DeploymentStyle" and variant.source == "package")
    )


def default_of(parameter: Parameter, variant: Variant) -> Default:
    """Return the default in `variant`: one that may go to zero starts with a floor of zero."""
    if parameter.name == "MinInstances" and variant.traffic in ("async", "component"):
        return 0
    if parameter.name == "MaxInstances" and variant.traffic in ("async", "component"):
        return 2
    return parameter.default


def choices_of(parameter: Parameter, variant: Variant) -> tuple[str | int, ...]:
    """Return the choices in `variant`: batch transform has fewer instance types."""
    if parameter.name == "InstanceType" and variant.traffic == "batch":
        return tuple(BATCH)
    return parameter.choices


def low_of(parameter: Parameter, variant: Variant) -> int | None:
    """Return the least value in `variant`: an instance-scaled endpoint cannot go to zero."""
    if parameter.name == "MinInstances" and variant.traffic == "realtime":
        return 1
    return parameter.low


INSTANCE_TYPES: Final = tuple(ENDPOINT)
CUDA: Final = tuple(HOST_IMAGES)
