"""Reading rendered templates as CloudFormation does, and looking things up in them.

Owns: the loader of the short forms, small queries. Must not know: any promise.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import yaml

from infra.templates.render import FOLDER, ROOT, template_name
from infra.templates.variants import BY_NAME

Template = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with CloudFormation's tags."""


def _intrinsic(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    if suffix == "GetAtt":
        value = value.split(".", 1)
    return {"Ref" if suffix == "Ref" else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _intrinsic)


def parse(text: str) -> Template:
    """Return the template in `text`, with intrinsics in their long form."""
    loaded: Template = yaml.load(text, _Loader)
    return loaded


@functools.cache
def _read(name: str) -> Template:
    return parse((ROOT / FOLDER / template_name(BY_NAME[name])).read_text(encoding="utf-8"))


def rendered(name: str) -> Template:
    """Return a copy of the committed template of variant `name`."""
    return copy.deepcopy(_read(name))


def of_type(template: Template, kind: str) -> dict[str, Any]:
    """Return the properties of every resource of CloudFormation type AWS::`kind`, by logical ID."""
    return {
        logical_id: found.get("Properties", {})
        for logical_id, found in template["Resources"].items()
        if found["Type"] == f"AWS::{kind}"
    }


def values(value: Any, key: str) -> list[Any]:
    """Return every value that stands under `key`, anywhere in `value`."""
    found: list[Any] = []
    if isinstance(value, dict):
        found += [held for name, held in value.items() if name == key]
        value = list(value.values())
    if isinstance(value, list):
        for held in value:
            found += values(held, key)
    return found


def statements(document: Any) -> list[dict[str, Any]]:
    """Return a policy's statements, those behind a condition included."""
    return [
        (held["Fn::If"][1] if "Fn::If" in held else held)
        for held in document["Statement"]
        if isinstance(held, dict)
    ]


def listed(value: Any) -> list[Any]:
    """Return a value that may be one or many as many."""
    return value if isinstance(value, list) else [value]


def texts(value: Any) -> list[str]:
    """Return every text in `value`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for held in value.values() for text in texts(held)]
    if isinstance(value, list):
        return [text for held in value for text in texts(held)]
    return []
