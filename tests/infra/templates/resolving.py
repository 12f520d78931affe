"""A template with its intrinsics worked out for given parameter values, as CloudFormation does.

Owns: the few intrinsics that the templates use. Must not know: what a template contains.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

from infra.templates import render
from infra.templates.variants import BY_NAME
from tests.infra.templates.loading import Template, rendered

ACCOUNT, REGION, STACK = "123456789012", "us-east-1", "sr"
KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000"
PSEUDO = {
    "AWS::AccountId": ACCOUNT,
    "AWS::Partition": "aws",
    "AWS::Region": REGION,
    "AWS::StackName": STACK,
    "AWS::URLSuffix": "amazonaws.com",
}
ATTRIBUTES = {
    ("ExecutionRole", "Arn"): f"arn:aws:iam::{ACCOUNT}:role/sr",
    ("Key", "Arn"): KEY,
    ("ModelSg", "GroupId"): "sg-0123456789abcdef0",
    ("EndpointSg", "GroupId"): "sg-0123456789abcdef1",
    ("Model", "ModelName"): "sr-model",
    ("EndpointConfig", "EndpointConfigName"): "sr-config",
}
ABSENT = object()


class Resolver:
    """Works out one template for one set of values."""

    def __init__(self, name: str, **changes: str) -> None:
        self.template: Template = rendered(name)
        entries = json.loads(render.example_text(BY_NAME[name]))
        self.values = {entry["ParameterKey"]: entry["ParameterValue"] for entry in entries} | changes

    def properties(self, logical_id: str) -> dict[str, Any]:
        """Return a resource's properties; raises KeyError where its condition does not hold."""
        held = self.template["Resources"][logical_id]
        if "Condition" in held and not self._holds(held["Condition"]):
            raise KeyError(logical_id)
        made: dict[str, Any] = self.resolve(held["Properties"])
        return made

    def resolve(self, value: Any) -> Any:
        if isinstance(value, list):
            return [made for held in value if (made := self.resolve(held)) is not ABSENT]
        if not isinstance(value, dict):
            return value
        if len(value) == 1 and next(iter(value)).startswith(("Fn::", "Ref")):
            ((function, argument),) = value.items()
            return getattr(self, "_" + function.removeprefix("Fn::").lower())(argument)
        made = {name: made for name, held in value.items() if (made := self.resolve(held)) is not ABSENT}
        if "Environment" in made:  # CloudFormation makes texts of numbers where the service wants texts
            made["Environment"] = {name: str(held) for name, held in made["Environment"].items()}
        return made

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return ABSENT
        if name in self.values:
            kind = self.template["Parameters"][name]["Type"]
            given = self.values[name]
            return int(given) if kind == "Number" else given.split(",") if kind.startswith("List<") else given
        topic = (
            f"arn:aws:sns:{REGION}:{ACCOUNT}:{name}" if name.endswith("Topic") else f"{STACK}-{name.lower()}"
        )
        return PSEUDO.get(name, f"subnet-{name[-1].lower()}" if name.startswith("Subnet") else topic)

    def _getatt(self, path: list[str]) -> str:
        return ATTRIBUTES.get((path[0], path[1]), f"arn:aws:any:{REGION}:{ACCOUNT}:{path[0]}")

    def _sub(self, argument: Any) -> str:
        text, given = (argument, {}) if isinstance(argument, str) else argument

        def fill(found: re.Match[str]) -> str:
            name = found[1]
            if name in given:
                return str(self.resolve(given[name]))
            return str(self._getatt(name.split(".")) if "." in name else self._ref(name))

        return re.sub(r"\$\{([\w:.]+)\}", fill, text)

    def _if(self, argument: list[Any]) -> Any:
        return self.resolve(argument[1] if self._holds(argument[0]) else argument[2])

    def _findinmap(self, argument: list[Any]) -> Any:
        mapping, key, name = (self.resolve(held) for held in argument)
        return self.template["Mappings"][mapping][key][name]

    def _select(self, argument: list[Any]) -> Any:
        return self.resolve(argument[1])[argument[0]]

    def _cidr(self, argument: list[Any]) -> list[str]:
        _, count, bits = argument  # the VPC's own range
        made = ipaddress.ip_network(self.values["VpcCidr"]).subnets(new_prefix=32 - bits)
        return [str(next(made)) for _ in range(count)]

    def _join(self, argument: list[Any]) -> str:
        return str(argument[0]).join(str(held) for held in self.resolve(argument[1]))

    def _holds(self, name: str) -> bool:
        return self._true(self.template["Conditions"][name])

    def _true(self, condition: dict[str, Any]) -> bool:
        ((function, argument),) = condition.items()
        if function == "Fn::Not":
            return not self._true(argument[0])
        left, right = (str(self.resolve(held)) for held in argument)
        return left == right
