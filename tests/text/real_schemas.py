"""200 JSON schemas of real interfaces: AWS services, the OpenAI client, JSON Schema itself.

Owns: the choice (by hash, so that it favours nothing) and the conversion of AWS shapes.
Must not know: how schemas are checked or followed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any

from botocore.loaders import Loader
from jsonschema_specifications import REGISTRY
from openai import BaseModel

SERVICES = (
    "acm", "apigateway", "appconfig", "athena", "autoscaling", "backup", "batch", "bedrock-runtime",
    "cloudformation", "cloudtrail", "cloudwatch", "codebuild", "cognito-idp", "dynamodb", "ecr", "ecs", "eks",
    "events", "firehose", "glue", "iam", "kinesis", "kms", "lambda", "logs", "rds", "route53", "s3",
    "sagemaker", "secretsmanager", "sns", "sqs", "ssm", "stepfunctions", "sts", "transcribe", "xray",
)  # fmt: skip
PER_SERVICE = 4
MODULES = ("openai.types", "openai.types.chat", "openai.types.responses", "openai.types.beta")
MODELS = 48
DRAFTS = ("draft-04/schema", "draft-06/schema", "draft-07/schema", "draft/2020-12/schema")

Schema = dict[str, Any]
NUMBERS = {"integer": "integer", "long": "integer", "float": "number", "double": "number"}


def real_schemas() -> list[tuple[str, str, Schema]]:
    """Return (source, name, schema) of all 200, in a fixed order."""
    found = [*_aws(), *_openai(), *_drafts()]
    assert len(found) == len(SERVICES) * PER_SERVICE + MODELS + len(DRAFTS) == 200
    return found


def _chosen(names: Iterable[str], count: int, salt: str) -> list[str]:
    """Return `count` of `names`, those with the least hash."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
    return sorted(ranked[:count])


def _aws() -> Iterator[tuple[str, str, Schema]]:
    loader = Loader()
    for service in SERVICES:
        model = loader.load_service_model(service, "service-2")
        shapes = model["shapes"]
        inputs = {
            operation["input"]["shape"]
            for operation in model["operations"].values()
            if "input" in operation and shapes[operation["input"]["shape"]].get("members")
        }
        for name in _chosen(inputs, PER_SERVICE, service):
            yield f"botocore {service}", name, from_shape(shapes, name)


def from_shape(shapes: dict[str, Any], root: str) -> Schema:
    """Return the JSON schema of one AWS shape; the shapes it uses are in `$defs`."""
    definitions: dict[str, Schema] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            definitions[name] = _shape(shapes[name], waiting)
    top = definitions.pop(root) if not _uses(definitions, root) else {"$ref": f"#/$defs/{root}"}
    return top | ({"$defs": definitions} if definitions else {})


def _uses(definitions: dict[str, Schema], name: str) -> bool:
    return json.dumps({"$ref": f"#/$defs/{name}"})[1:-1] in json.dumps(definitions)


def _shape(shape: Schema, waiting: list[str]) -> Schema:
    def member(inner: Schema) -> Schema:
        waiting.append(inner["shape"])
        return {"$ref": f"#/$defs/{inner['shape']}"}

    kind = shape["type"]
    if kind == "structure":
        made: Schema = {"type": "object"}
        made["properties"] = {name: member(inner) for name, inner in shape.get("members", {}).items()}
        if shape.get("required"):
            made["required"] = shape["required"]
        if shape.get("union"):
            made |= {"minProperties": 1, "maxProperties": 1}
        return {} if shape.get("document") else made
    if kind == "list":
        return {"type": "array", "items": member(shape["member"])} | _bounds(shape, "Items")
    if kind == "map":
        made = {"type": "object", "additionalProperties": member(shape["value"])}
        waiting.append(shape["key"]["shape"])
        return made | _bounds(shape, "Properties")
    if kind == "string":
        limits = {} if "enum" in shape else _bounds(shape, "Length")
        return {"type": "string"} | limits | {k: shape[k] for k in ("enum", "pattern") if k in shape}
    if kind == "timestamp":
        return {"type": "string", "format": "date-time"}
    if kind in NUMBERS:
        bounds = {f"{k}imum": shape[k] for k in ("min", "max") if k in shape}
        return {"type": NUMBERS[kind]} | bounds
    return {"blob": {"type": "string", "contentEncoding": "base64"}, "boolean": {"type": "boolean"}}[kind]


def _bounds(shape: Schema, noun: str) -> Schema:
    return {f"{end}{noun}": int(shape[end]) for end in ("min", "max") if end in shape}


def _openai() -> Iterator[tuple[str, str, Schema]]:
    models: dict[str, type[BaseModel]] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in dir(module):
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, BaseModel):
                models[name] = value
    for name in _chosen(models, MODELS, "openai"):
        yield "openai", name, models[name].model_json_schema()


def _drafts() -> Iterator[tuple[str, str, Schema]]:
    for draft in DRAFTS:
        scheme = "https" if "2020" in draft else "http"
        resource = REGISTRY[f"{scheme}://json-schema.org/{draft}"]
        yield "JSON Schema", draft, resource.contents
