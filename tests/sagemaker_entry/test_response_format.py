"""`response_format` and `grammar`: what becomes a grammar, what is refused and how the refusal is worded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from container.engine.request import Grammar, GrammarKind
from container.ranks.translation import MAX_GRAMMAR_CHARS as ENGINE_GRAMMAR_CHARS
from container.text.schema import MAX_GRAMMAR_CHARS
from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.dialects.presenter import error_body, openai_error, status_of, tgi_error
from sagemaker_entry.errors import Code
from tests.sagemaker_entry.dialect_samples import chat, completion, refused, requested, tgi

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {"name": {"type": "string"}, "home": {"type": "object", "properties": {"x": {}}}},
    "required": ["name"],
}
CLOSED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "home": {"type": "object", "properties": {"x": {}}, "additionalProperties": False},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def wanted(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", **fields}}


def grammar_of(body: dict[str, Any], route: Route = Route.CHAT) -> Grammar | None:
    return requested(route, body).sampling.grammar


def schema_of(body: dict[str, Any], route: Route = Route.CHAT) -> dict[str, Any]:
    grammar = grammar_of(body, route)
    assert grammar is not None and grammar.kind is GrammarKind.JSON_SCHEMA
    schema: dict[str, Any] = json.loads(grammar.text)
    assert list(schema.pop("x-guidance")) == ["whitespace_pattern"]
    return schema


@pytest.mark.parametrize("absent", [{}, {"response_format": None}, {"response_format": {"type": "text"}}])
def test_plain_text_asks_for_no_grammar(absent: dict[str, Any]) -> None:
    assert grammar_of(chat(**absent)) is None
    assert grammar_of(completion(**absent), Route.COMPLETIONS) is None


def test_a_json_object_is_any_object() -> None:
    assert schema_of(chat(response_format={"type": "json_object"})) == {"type": "object"}


def test_a_strict_schema_is_closed_at_every_level_that_lists_properties() -> None:
    assert schema_of(chat(response_format=wanted(schema=PERSON, strict=True))) == CLOSED


@pytest.mark.parametrize("strict", [{}, {"strict": None}, {"strict": False}])
def test_a_schema_that_is_not_strict_stays_open_and_loses_its_annotations(strict: dict[str, Any]) -> None:
    opened = {name: value for name, value in PERSON.items() if name != "title"}
    assert schema_of(chat(response_format=wanted(schema=PERSON, description="d", **strict))) == opened


def test_a_schema_that_says_so_itself_stays_open_in_strict_mode() -> None:
    schema = PERSON | {"additionalProperties": {"type": "integer"}}
    made = schema_of(chat(response_format=wanted(schema=schema, strict=True)))
    assert made["additionalProperties"] == {"type": "integer"}


def test_the_order_of_properties_is_the_clients() -> None:
    names = ["z", "a", "m", "b"]
    made = schema_of(chat(response_format=wanted(schema={"properties": {n: {} for n in names}})))
    assert list(made["properties"]) == names


def test_the_prompt_is_the_same_with_and_without_a_form() -> None:
    with_form = requested(Route.CHAT, chat(response_format=wanted(schema=PERSON)))
    assert with_form.prompts == requested(Route.CHAT, chat()).prompts


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": PERSON},
        {"type": "json", "value": json.dumps(PERSON)},
        {"type": "json_object", "value": PERSON},
        {"type": "json_schema", "value": {"schema": PERSON}},
        {"type": "json_schema", "value": {"name": "x", "strict": False, "schema": PERSON}},
    ],
)
def test_tgi_takes_a_schema_in_each_of_its_forms_and_closes_it(grammar: dict[str, Any]) -> None:
    assert schema_of(tgi(grammar=grammar), Route.GENERATE) == CLOSED
    assert schema_of(chat(response_format=grammar)) == CLOSED, "TGI's chat takes the same forms"
    assert requested(Route.GENERATE, tgi(grammar=grammar)).grammar_field == "grammar"


def test_tgi_takes_a_regular_expression_as_it_is() -> None:
    given = {"type": "regex", "value": r"[a-z]{1,3}/\d+"}
    expected = Grammar(GrammarKind.REGEX, r"[a-z]{1,3}/\d+")
    assert grammar_of(tgi(grammar=given), Route.GENERATE) == expected
    assert grammar_of(chat(response_format=given)) == expected
    assert grammar_of(tgi(grammar=None), Route.GENERATE) is None


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ("json_object", Code.INVALID_TYPE, "response_format"),
        ({}, Code.MISSING_FIELD, "response_format.type"),
        ({"type": "grammar"}, Code.INVALID_VALUE, "response_format.type"),
        ({"type": "json_object", "typo": 1}, Code.UNKNOWN_FIELD, "response_format.typo"),
        ({"type": "json_object", "json_schema": {}}, Code.UNKNOWN_FIELD, "response_format.json_schema"),
        ({"type": "json_schema"}, Code.MISSING_FIELD, "response_format.json_schema"),
        (wanted(), Code.MISSING_FIELD, "response_format.json_schema.schema"),
        (wanted(schema=[]), Code.INVALID_TYPE, "response_format.json_schema.schema"),
        (wanted(schema="{}"), Code.INVALID_TYPE, "response_format.json_schema.schema"),
        (wanted(schema={}, strict="yes"), Code.INVALID_TYPE, "response_format.json_schema.strict"),
        (wanted(schema={}, typo=1), Code.UNKNOWN_FIELD, "response_format.json_schema.typo"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            Code.MISSING_FIELD,
            "response_format.json_schema.name",
        ),
        (wanted(schema={}) | {"json_schema": {"name": "a b"}}, Code.INVALID_VALUE, None),
        ({"type": "regex"}, Code.MISSING_FIELD, "response_format.value"),
        ({"type": "regex", "value": 5}, Code.INVALID_TYPE, "response_format.value"),
        ({"type": "regex", "value": ""}, Code.GRAMMAR_INVALID, "response_format"),
        ({"type": "regex", "value": "(((a{100}){100}){100}){100}"}, Code.GRAMMAR_INVALID, "response_format"),
        ({"type": "regex", "value": "(" * 30_000 + ")" * 30_000}, Code.GRAMMAR_INVALID, "response_format"),
    ],
)
def test_malformed_forms_are_refused_with_the_place_named(form: Any, code: Code, param: str | None) -> None:
    error = refused(Route.CHAT, chat(response_format=form))
    assert error.code is code
    assert status_of(Dialect.OPENAI_CHAT, error) == 400
    if param is not None:
        assert error.param == param


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ({"type": "json", "value": {}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "json", "value": "{}"}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "json", "value": "nonsense"}, "the body is not one JSON document"),
        ({"type": "json", "value": '{"properties": {}, "properties": {}}'}, None),
        ({"type": "json", "value": 5}, "`grammar.value` must be an object, or a string that holds one"),
        ({"type": "json"}, "`grammar.value` is required"),
        ({"value": "x"}, "`grammar.type` is required"),
        ({"type": "text", "value": ""}, None),
        ({"type": "json_schema", "value": {"name": "x"}}, "`grammar.value.schema` is required"),
        ({"type": "json", "value": {"properties": {"a": {"not": {}}}}}, "grammar is not valid: `not`: "
         "a keyword of it is not supported"),
        ({"type": "regex", "value": "a{70000}"}, "grammar is not valid: it is too large"),
    ],
)  # fmt: skip
def test_tgi_refusals_have_its_status_and_its_words(grammar: Any, sentence: str | None) -> None:
    error = refused(Route.GENERATE, tgi(grammar=grammar))
    assert status_of(Dialect.TGI, error) in (400, 422)
    if sentence is not None:
        assert tgi_error(error)["error"] == f"Input validation error: {sentence}"


def test_a_refused_schema_names_the_keyword_and_shows_nothing_else() -> None:
    secret = "s3cr3t"
    for schema, named in (
        ({"properties": {secret: {"not": {"const": secret}}}}, "`not`"),
        ({"properties": {secret: {"frobnicate": secret}}}, "`frobnicate`"),
        ({"$ref": f"https://{secret}/x"}, "`$ref`"),
        ({"type": "object", f"<{secret}>": 1}, "`(unprintable)`"),
    ):
        error = refused(Route.CHAT, chat(response_format=wanted(schema=schema)))
        body = error_body(Dialect.OPENAI_CHAT, error, "id")[0].decode()
        assert error.code is Code.GRAMMAR_INVALID
        assert named in error.message
        assert secret not in body.replace(f"<{secret}>", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ["x"]), ("stop_token_ids", [5]), ("ignore_eos", True), ("min_tokens", 1)],
)
def test_what_keeps_an_answer_from_its_end_cannot_be_combined_with_a_form(name: str, value: Any) -> None:
    form = {"type": "json_object"}
    error = refused(Route.CHAT, chat(response_format=form, max_tokens=5, **{name: value}))
    assert (error.code, error.param) == (Code.INVALID_REQUEST, name)
    assert openai_error(error, "id")["message"] == f"`{name}` cannot be combined with `response_format`"
    requested(Route.CHAT, chat(response_format={"type": "text"}, max_tokens=5, **{name: value}))


def test_tgi_names_its_own_field_when_stop_strings_meet_a_grammar() -> None:
    grammar = {"type": "regex", "value": "a+"}
    error = refused(Route.GENERATE, tgi(grammar=grammar, stop=["x"]))
    assert error.message == "`stop` cannot be combined with `grammar`"
    requested(Route.GENERATE, tgi(grammar=grammar, stop=[]))


def test_what_only_chooses_among_allowed_tokens_is_combined_with_a_form() -> None:
    request = requested(
        Route.CHAT,
        chat(
            response_format={"type": "json_object"},
            n=3,
            logit_bias={"5": -100},
            presence_penalty=1,
            logprobs=True,
            stop=None,
            min_tokens=0,
        ),
    )
    assert request.choices == 3 and request.sampling.grammar is not None


def test_the_longest_grammar_accepted_here_is_accepted_by_the_engine() -> None:
    assert MAX_GRAMMAR_CHARS <= ENGINE_GRAMMAR_CHARS
    schema = {"enum": ["x" * 1000 + str(number) for number in range(300)]}
    error = refused(Route.CHAT, chat(response_format=wanted(schema=schema)))
    assert "it is too large" in error.message
