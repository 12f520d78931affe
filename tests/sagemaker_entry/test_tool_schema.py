"""Schemas of arguments: what is none is refused, whether a grammar could follow it or not."""

from __future__ import annotations

from typing import Any

import pytest

from sagemaker_entry.dialects.tool_schema import check_schema
from sagemaker_entry.errors import ApiError, Code

PARAM = "tools[0].function.parameters"


def inside(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"properties": {}},
        inside({"type": ["string", "null"]}),
        inside({"enum": ["a", 1, None]}),
        inside(True),
        inside({"type": "string", "pattern": "^[a-z]+$", "format": "date", "maxLength": 20}),
        inside({"type": "string", "pattern": r"^\p{L}+$"}),  # no fault, only not Python's
        inside({"$ref": "#/$defs/x"}) | {"$defs": {"x": {"type": "integer"}}},
        inside({"type": "array", "items": {"anyOf": [{"type": "null"}, {"const": 3}]}}),
        inside({"type": "array", "items": [{"type": "null"}]}),
        inside({"patternProperties": {"^x": {}}, "not": {"type": "null"}, "vendor": {"type": "what"}}),
    ],
)
def test_schemas_are_taken_as_they_are(schema: dict[str, Any]) -> None:
    check_schema(schema, PARAM)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": ["object"]},
        {"properties": []},
        {"properties": {"x": 5}},
        {"properties": {"x": None}},
        inside({"type": "text"}),
        inside({"type": 5}),
        inside({"type": ["string", None]}),
        inside({"type": "string", "pattern": "("}),
        inside({"type": "string", "pattern": "[a-"}),
        inside({"type": "string", "pattern": "*a"}),
        inside({"type": "string", "pattern": 5}),
        inside({"type": "string", "pattern": "(" * 5000}),
        inside({"type": "string", "pattern": "(" * 250 + ")" * 250 + "("}),
        inside({"$ref": "http://169.254.169.254/x"}),
        inside({"$ref": "file:///etc/passwd"}),
        inside({"$ref": 5}),
        inside({"enum": "abc"}),
        inside({"enum": list(range(1001))}),
        inside({"anyOf": {}}),
        inside({"items": 5}),
        inside({"required": "x"}),
        inside({"required": [5]}),
        inside({"minItems": 10**9}),
        inside({"maxLength": -1}),
        inside({"maxLength": True}),
        inside({"$defs": []}),
        {"additionalProperties": {"type": "what"}},
    ],
)
def test_what_is_no_schema_is_refused_without_its_text(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema(schema, PARAM)
    error = caught.value
    assert (error.code, error.param, error.status) == (Code.INVALID_VALUE, PARAM, 400)
    assert "169.254" not in error.message and error.__context__ is None


def test_a_deep_and_wide_schema_is_read_in_a_moment() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(60):
        schema = inside(schema)
    check_schema(schema, PARAM)
    check_schema({"properties": {str(n): {"type": "string"} for n in range(20_000)}}, PARAM)
