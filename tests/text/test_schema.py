"""Schemas of clients: what is followed, what is dropped, what is refused and with which keyword."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.regex_bounds import MAX_EXPANDED, MAX_GROUP_DEPTH, MAX_REGEX_CHARS, check_regex
from container.text.schema import (
    ANNOTATIONS,
    FOLLOWED,
    MAX_DEPTH,
    MAX_GRAMMAR_CHARS,
    MAX_SCHEMAS,
    UNSUPPORTED,
    schema_text,
)


def made(schema: Any, *, closed: bool = False) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(schema_text(schema, closed=closed))
    assert result.pop("x-guidance")
    return result


def refusal(schema: Any, *, closed: bool = False) -> tuple[GrammarReason, str | None]:
    with pytest.raises(GrammarError) as caught:
        schema_text(schema, closed=closed)
    assert str(caught.value) == caught.value.reason.value
    return caught.value.reason, caught.value.keyword


def test_the_three_lists_of_keywords_do_not_overlap() -> None:
    assert not FOLLOWED & ANNOTATIONS
    assert not FOLLOWED & UNSUPPORTED
    assert not ANNOTATIONS & UNSUPPORTED


@pytest.mark.parametrize("keyword", sorted(UNSUPPORTED - {"$id", "id"}))
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"items": s}, lambda s: {"properties": {"a": s}}])
def test_every_unsupported_keyword_is_refused_by_name_at_any_level(keyword: str, wrap: Any) -> None:
    assert refusal(wrap({keyword: {}})) == (GrammarReason.UNSUPPORTED_KEYWORD, keyword)


def test_an_address_is_dropped_at_the_root_and_refused_below_it() -> None:
    assert made({"$id": "https://example.com/x", "type": "string"}) == {"type": "string"}
    assert refusal({"items": {"$id": "x"}}) == (GrammarReason.UNSUPPORTED_KEYWORD, "$id")


@pytest.mark.parametrize("keyword", [*sorted(ANNOTATIONS), "x-kubernetes-validations", "x-guidance"])
def test_annotations_are_dropped_because_they_ask_for_nothing(keyword: str) -> None:
    assert made({"type": "string", keyword: {"lenient": True}}) == {"type": "string"}
    assert made({"type": "array", "items": {keyword: 1}}) == {"type": "array", "items": {}}


def test_a_client_cannot_steer_the_grammar_library() -> None:
    text = schema_text({"x-guidance": {"lenient": True, "whitespace_pattern": "a"}}, closed=False)
    assert list(json.loads(text)["x-guidance"]) == ["whitespace_pattern"]
    assert "lenient" not in text


@pytest.mark.parametrize("keyword", ["uniqueItems", "nullable"])
def test_a_keyword_that_is_off_asks_for_nothing(keyword: str) -> None:
    assert made({"type": "array", keyword: False}) == {"type": "array"}
    assert refusal({"type": "array", keyword: True}) == (GrammarReason.UNSUPPORTED_KEYWORD, keyword)


def test_an_unknown_keyword_is_refused_and_a_property_of_that_name_is_not() -> None:
    assert refusal({"maxlength": 3}) == (GrammarReason.UNKNOWN_KEYWORD, "maxlength")
    schema = {"properties": {"maxlength": {"type": "string"}, "not": {}, "$ref": {"type": "integer"}}}
    assert made(schema) == schema
    assert made({"const": {"maxlength": {"$ref": "x"}}, "enum": [{"not": 1}]})


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        "object",
        5,
        True,
        {"items": 5},
        {"properties": []},
        {"properties": {"a": "string"}},
        {"anyOf": {}},
        {"anyOf": [5]},
        {"pattern": 5},
        {"$ref": 5},
        {"additionalProperties": "no"},
        {"type": "strin"},
        {"type": []},
        {"type": ["string", 5]},
        {"minLength": "x"},
        {"minLength": -1},
        {"maxItems": 1.5},
        {"maxItems": True},
        {"minimum": "0"},
        {"exclusiveMinimum": True},
        {"multipleOf": 0},
        {"required": "a"},
        {"required": [1]},
        {"enum": []},
        {"enum": {"a": 1}},
        {"format": 5},
        {"items": [{}]},
    ],
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    assert refusal(schema)[0] is GrammarReason.NOT_A_SCHEMA


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "other.json#/x",
        "#/$defs/missing",
        "#name",
        "#/$defs",
        "#/enum/0",
        "#/$defs/a/type",
        "#/anyOf/7",
        "#/anyOf/x",
        "",
    ],
)
def test_a_reference_that_leads_nowhere_or_outside_is_refused(target: str) -> None:
    schema = {"$defs": {"a": {"type": "string"}}, "enum": [{}], "anyOf": [{"$ref": target}]}
    assert refusal(schema) == (GrammarReason.REFERENCE, "$ref")


@pytest.mark.parametrize(
    "target",
    ["#", "#/$defs/a", "#/$defs/b~1c~0d", "#/anyOf/1", "#/properties/p/items", "#/additionalProperties"],
)
def test_a_reference_to_a_schema_of_its_own_is_kept(target: str) -> None:
    schema = {
        "$defs": {"a": {"type": "string"}, "b/c~d": {}},
        "anyOf": [{"properties": {"x": {"$ref": target}}}, {}],
        "properties": {"p": {"items": {}}},
        "additionalProperties": {},
    }
    assert made(schema) == schema


def test_references_that_only_lead_to_each_other_are_refused() -> None:
    circle = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    assert refusal({"$defs": circle, "$ref": "#/$defs/a"}) == (GrammarReason.REFERENCE, "$ref")
    assert refusal({"$ref": "#"}) == (GrammarReason.REFERENCE, "$ref")


def test_closing_leaves_open_what_says_so_and_what_names_no_properties() -> None:
    schema = {
        "properties": {
            "map": {"type": "object"},
            "open": {"properties": {"a": {}}, "additionalProperties": True},
            "list": {"items": {"properties": {"a": {}}}},
            "empty": {"properties": {}},
        }
    }
    closed = made(schema, closed=True)
    assert closed["additionalProperties"] is False
    inner = closed["properties"]
    assert inner["map"] == {"type": "object"}
    assert inner["open"]["additionalProperties"] is True
    assert inner["list"]["items"]["additionalProperties"] is False
    assert inner["empty"]["additionalProperties"] is False
    assert made(schema) == schema, "nothing is closed unasked"


def test_closed_schemas_that_would_forbid_each_other_are_refused() -> None:
    both = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert made(both) == both
    assert refusal(both, closed=True) == (GrammarReason.UNSUPPORTED_KEYWORD, "allOf")
    assert made({"allOf": [{"type": "string"}]}, closed=True)


@pytest.mark.parametrize("keyword", ["minLength", "minItems", "minProperties"])
def test_a_minimum_no_answer_can_reach_is_refused_and_a_maximum_is_not(keyword: str) -> None:
    assert refusal({keyword: 10**9}) == (GrammarReason.TOO_LARGE, keyword)
    most = keyword.replace("min", "max")
    assert made({most: 10**9}) == {most: 10**9}


@pytest.mark.parametrize(
    "draft", ["http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"]
)
def test_a_known_draft_is_kept_and_any_other_refused(draft: str) -> None:
    assert made({"$schema": draft}) == {"$schema": draft}
    for other in ("https://json-schema.org/draft/next/schema", "draft-07", 7, draft + "x"):
        assert refusal({"$schema": other}) == (GrammarReason.UNSUPPORTED_KEYWORD, "$schema")
    assert refusal({"items": {"$schema": draft}}) == (GrammarReason.UNSUPPORTED_KEYWORD, "$schema")


def test_older_drafts_keep_their_own_forms() -> None:
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}
    assert made(old) == old
    tuples = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}]}
    assert made(tuples) == tuples
    assert refusal(tuples | {"exclusiveMinimum": True}) == (GrammarReason.NOT_A_SCHEMA, "exclusiveMinimum")


def test_depth_number_and_size_are_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        deep = {"items": deep}
    assert refusal(deep) == (GrammarReason.TOO_LARGE, None)
    assert made(deep["items"]) == deep["items"]
    doubling: dict[str, Any] = {"type": "string"}
    for _ in range(40):  # 2^40 schemas if it were followed to the end
        doubling = {"anyOf": [doubling, doubling]}
    assert refusal(doubling) == (GrammarReason.TOO_LARGE, None)
    assert MAX_SCHEMAS < 2**20
    assert refusal({"const": "x" * MAX_GRAMMAR_CHARS}) == (GrammarReason.TOO_LARGE, None)


@pytest.mark.parametrize(
    "pattern",
    [
        "a{65537}", "(a{300}){300}", "(((a{100}){100}){100}){100}", r"[\s\S]{0,100000}", "(ab?){33000}",
        "a{9999999}",
        r"(\]{300}){300}", "([]]{300}){300}", "([^]a]{300}){300}", r"([\]]{300}){300}", r"(\p{Lu}{300}){300}",
        "(" * (MAX_GROUP_DEPTH + 1) + ")" * (MAX_GROUP_DEPTH + 1), "a" * (MAX_REGEX_CHARS + 1),
        "(a{ 300 , 300 }){300}", "(a{300,}){300}",
    ],
)  # fmt: skip
def test_a_regular_expression_that_grows_too_large_is_refused_unbuilt(pattern: str) -> None:
    with pytest.raises(GrammarError) as caught:
        check_regex(pattern)
    assert caught.value.reason is GrammarReason.TOO_LARGE
    assert refusal({"pattern": pattern}) == (GrammarReason.TOO_LARGE, "pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        "", "a{65536}", "(a+)+b", "(.*){50}", r"\d{4}-\d{2}", "[a{99999}]", r"\(a{9}\{99999\}",
        "[[:alpha:]]{1,63}",
        "(a{256}){256}", "{99999}", "a|b|c", ")a{9}", "\\", "[", "(?:x{10}){10}", "x{a}", r"\x{61}{3}",
    ],
)  # fmt: skip
def test_a_regular_expression_within_its_bounds_is_left_to_the_library(pattern: str) -> None:
    check_regex(pattern)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=r"ab()[]{}0123,\^|*?", max_size=60))
def test_the_count_of_any_text_ends_and_is_no_smaller_than_its_plain_letters(pattern: str) -> None:
    try:
        check_regex(pattern)
    except GrammarError as error:
        assert error.reason is GrammarReason.TOO_LARGE
        assert "{" in pattern, "only a counted repetition or depth grows in sixty characters"
    assert MAX_EXPANDED > 60


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted(FOLLOWED | {"title", "not", "x-a"})) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans())
def test_any_value_becomes_a_schema_of_followed_keywords_or_a_refusal(schema: Any, closed: bool) -> None:
    try:
        result = made(schema, closed=closed)
    except GrammarError:
        return
    assert set(result) <= FOLLOWED
    assert made(result, closed=closed) == result, "what was made is made of itself again"
