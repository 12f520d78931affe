"""Schemas that must hold themselves without end: refused whole, and left out where something else will do."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.schema import MAX_GRAMMAR_CHARS, schema_text
from tests.text import build
from tests.text.random_answers import RandomAnswers
from tests.text.test_real_schemas import follows


def holding(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


ROOT = {"$ref": "#"}
NONE = {"type": "null"}
FULL = {"type": "array", "minItems": 1}

ENDLESS = {
    "itself": holding(a=ROOT),
    "itself beside others": holding(a=ROOT, b=NONE),
    "a list of itself that is never empty": FULL | {"items": ROOT},
    "a list whose second item is itself": {"type": "array", "minItems": 2, "prefixItems": [NONE, ROOT]},
    "a longer list than its first items": {
        "type": "array",
        "minItems": 2,
        "prefixItems": [NONE],
        "items": ROOT,
    },
    "an old list": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "minItems": 2,
        "items": [NONE],
        "additionalItems": ROOT,
    },
    "each other": {
        "$ref": "#/$defs/A",
        "$defs": {"A": holding(b={"$ref": "#/$defs/B"}), "B": holding(a=ROOT)},
    },
    "every alternative": {"anyOf": [holding(a=ROOT), FULL | {"items": ROOT}]},
    "every type": {"type": ["array", "object"], "minItems": 1, "items": ROOT, "required": ["a"]}
    | {"additionalProperties": ROOT},
    "one of several demands": {"allOf": [holding(a=ROOT)]},
    "any one of its properties": {
        "type": "object",
        "properties": {"a": ROOT, "b": ROOT},
        "minProperties": 1,
        "additionalProperties": False,
    },
    "more properties than have an end": {
        "type": "object",
        "properties": {"a": ROOT, "b": NONE},
        "minProperties": 2,
        "additionalProperties": False,
    },
    "a value for any name": {"type": "object", "additionalProperties": ROOT, "minProperties": 1},
}

FINITE = {
    "not required": {"type": "object", "properties": {"a": ROOT}},
    "a list that may be empty": {"type": "array", "items": ROOT},
    "a list with a first item": {"type": "array", "minItems": 1, "prefixItems": [NONE], "items": ROOT},
    "an alternative": holding(a={"anyOf": [ROOT, NONE]}),
    "another type": {"type": ["array", "null"], "minItems": 1, "items": ROOT},
    "any type": {"minItems": 1, "items": ROOT},
    "a fixed value": {"const": {"a": 1}, "type": "object", "required": ["a"], "properties": {"a": ROOT}},
    "a name that is free": {"type": "object", "required": ["a"], "properties": {"b": ROOT}},
    "another property": {"type": "object", "properties": {"a": ROOT, "b": NONE}, "minProperties": 1},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_schema_without_a_finite_document_is_refused(name: str) -> None:
    with pytest.raises(GrammarError) as caught:
        schema_text(ENDLESS[name], closed=False)
    assert caught.value.reason is GrammarReason.UNSATISFIABLE


@pytest.mark.parametrize("name", FINITE)
def test_a_schema_with_a_finite_document_is_kept_as_it_is(name: str) -> None:
    made = json.loads(schema_text(FINITE[name], closed=False))
    assert {k: v for k, v in made.items() if k != "x-guidance"} == FINITE[name]


ENDLESS_PART = holding(a={"$ref": "#/$defs/E"})
PARTLY = {
    "a property": {"type": "object", "properties": {"b": NONE, "e": {"$ref": "#/$defs/E"}}},
    "an alternative": {"anyOf": [{"$ref": "#/$defs/E"}, NONE]},
    "an item": {"type": "array", "items": {"$ref": "#/$defs/E"}},
    "an item after others": {"type": "array", "prefixItems": [NONE], "items": {"$ref": "#/$defs/E"}},
    "any other property": {
        "type": "object",
        "properties": {"b": NONE},
        "additionalProperties": {"$ref": "#/$defs/E"},
    },
}


@pytest.mark.parametrize("name", PARTLY)
def test_no_answer_is_led_into_a_part_that_has_no_end(name: str) -> None:
    schema = PARTLY[name] | {"$defs": {"E": ENDLESS_PART}}
    text = schema_text(schema, closed=True)
    tokenizer = build.byte_level()
    answers = RandomAnswers(tokenizer.to_str(), tokenizer.token_to_id("</s>"), seed=3)
    for _ in range(20):
        answer = answers.one(text)
        assert answer is not None, "an answer went where there is no end"
        assert follows(schema, answer.decode())


def test_a_reference_through_what_is_left_out_is_refused() -> None:
    endless = ENDLESS_PART | {"properties": {"a": {"$ref": "#/$defs/E"}, "b": NONE}}
    schema = {"anyOf": [{"$ref": "#/$defs/E"}, {"$ref": "#/$defs/E/properties/b"}], "$defs": {"E": endless}}
    with pytest.raises(GrammarError) as caught:
        schema_text(schema, closed=False)
    assert caught.value.reason is GrammarReason.REFERENCE


def test_a_chain_of_thousands_of_references_is_judged_at_once() -> None:
    count = 3000
    for last, ends in ((NONE, True), ({"$ref": "#"}, False)):
        definitions = {str(n): holding(a={"$ref": f"#/$defs/{n + 1}"}) for n in range(count)}
        schema = {"$ref": "#/$defs/0", "$defs": definitions | {str(count): last}}
        started_s = time.process_time()
        if ends:
            assert len(schema_text(schema, closed=False)) < MAX_GRAMMAR_CHARS
        else:
            with pytest.raises(GrammarError):
                schema_text(schema, closed=False)
        assert time.process_time() - started_s < 0.5
