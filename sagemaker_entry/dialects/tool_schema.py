"""What a function's `parameters` may be.

Owns: the shape a schema must have to be one.
Must not know: grammars, which keywords a grammar can follow.
Invariant: nothing is fetched, and a schema that is none (an unknown type, a pattern that is none) is refused
    whether it would be followed or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from sagemaker_entry.dialects.fields import invalid_value
from sagemaker_entry.errors import ApiError

TYPES: Final = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})
MAX_ENUM: Final = 1000  # OpenAI's, over a whole schema
MAX_PATTERN_CHARS: Final = 512
MAX_BOUND: Final = 1_000_000  # of a length or count: no answer is longer
ANY_ARGUMENTS: Final[dict[str, Any]] = {"type": "object"}
NO_ARGUMENTS: Final[dict[str, Any]] = {"type": "object", "properties": {}}

_MAPS: Final = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE: Final = (
    "items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_BOUNDS: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Words that are faults in every dialect of regular expressions; others may only be unknown to Python's.
_FAULTS: Final = ("unterminated", "missing )", "unbalanced", "nothing to repeat", "min repeat greater")


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse what is no JSON schema of an object; raises ApiError that names `param`."""
    if schema.get("type", "object") != "object":
        raise invalid_value(param, "a schema of type `object`")
    enums = 0
    for each in _schemas(schema, param):
        enums += len(_listed(each, "enum", param))
        _check_one(each, param)
    if enums > MAX_ENUM:
        raise invalid_value(param, f"a schema with at most {MAX_ENUM} values in `enum`")


def _schemas(root: dict[str, Any], param: str) -> Iterator[dict[str, Any]]:
    """Yield `root` and every schema inside it."""
    waiting: list[Any] = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise invalid_value(param, "made of schemas: objects, true or false")
        yield schema
        for name in _MAPS:
            inner = schema.get(name)
            if inner is not None and not isinstance(inner, dict):
                raise invalid_value(param, f"a schema whose `{name}` is an object")
            waiting.extend((inner or {}).values())
        for name in _LISTS:
            waiting.extend(_listed(schema, name, param))
        waiting.extend(schema[name] for name in _SINGLE if name in schema and not _tuple(schema, name))
        if _tuple(schema, "items"):
            waiting.extend(schema["items"])


def _tuple(schema: dict[str, Any], name: str) -> bool:
    return name == "items" and isinstance(schema.get(name), list)  # older drafts


def _listed(schema: dict[str, Any], name: str, param: str) -> list[Any]:
    value = schema.get(name, [])
    if not isinstance(value, list):
        raise invalid_value(param, f"a schema whose `{name}` is a list")
    return value


def _check_one(schema: dict[str, Any], param: str) -> None:
    types = schema.get("type", [])
    for kind in types if isinstance(types, list) else [types]:
        if not isinstance(kind, str) or kind not in TYPES:
            raise invalid_value(param, "a schema of the types JSON has")
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        raise invalid_value(param, "a schema that refers to itself only")
    required = _listed(schema, "required", param)
    if not all(isinstance(name, str) for name in required):
        raise invalid_value(param, "a schema whose `required` is a list of names")
    for name in _BOUNDS:
        bound = schema.get(name, 0)
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound <= MAX_BOUND:
            raise invalid_value(param, f"a schema whose `{name}` is from 0 to {MAX_BOUND}")
    if "pattern" in schema:
        _check_pattern(schema["pattern"], param)


def _check_pattern(pattern: object, param: str) -> None:
    error: ApiError | None = None
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARS:
        error = invalid_value(param, f"a schema of patterns of at most {MAX_PATTERN_CHARS} characters")
    else:
        try:
            re.compile(pattern)
        except re.error as caught:
            if caught.msg.startswith(_FAULTS):
                error = invalid_value(param, "a schema whose patterns are regular expressions")
        except (RecursionError, OverflowError):
            error = invalid_value(param, "a schema whose patterns are regular expressions")
    if error is not None:
        raise error
