"""What form an answer is asked to have: OpenAI's `response_format`, TGI's `grammar`.

Owns: their fields, and what cannot be asked for together with them.
Must not know: how a grammar is checked or followed, what the answer looks like.
Invariant: a form other than plain text becomes a grammar or is refused by name; the prompt is not touched.

Cannot be combined with a form, because they end an answer before it is complete or keep it from ending:
`stop`, `stop_token_ids`, `ignore_eos`, `min_tokens`. Can be: `n` and `best_of` (every choice follows the
grammar by itself), `logit_bias` and penalties (they choose among what the grammar allows; where they leave
nothing to draw, the answer is an error), `max_tokens` (an answer cut by it may be incomplete: `length`).
"""

from __future__ import annotations

import re
from typing import Any, Final

from container.engine.request import Grammar, GrammarKind
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.regex_bounds import check_regex
from container.text.schema import ANY_OBJECT, MAX_GRAMMAR_CHARS, schema_text
from sagemaker_entry import strict_json
from sagemaker_entry.dialects.fields import Fields, invalid_type, missing
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest
from sagemaker_entry.grammars import grammar_refused

KINDS: Final = ("text", "json_object", "json_schema", "json", "regex")  # the last two are TGI's, with `value`
TGI_KINDS: Final = ("json", "json_object", "json_schema", "regex")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_RULE: Final = "1 to 64 letters, digits, `-` or `_`"
_NO_PROPERTIES: Final = "Grammar must have a 'properties' field"  # TGI's own words


def read_response_format(fields: Fields) -> Grammar | None:
    """Take `response_format` of a chat request; None for plain text. Raises ApiError."""
    wanted = fields.nested("response_format")
    if wanted is None:
        return None
    kind = wanted.choice("type", KINDS)
    if kind is None:
        raise missing("response_format.type")
    name = "response_format"
    grammar: Grammar | None = None
    if kind in ("json", "regex") or wanted.value("value") is not None:
        grammar = _tgi(kind, wanted, name)
    elif kind == "json_schema":
        grammar = _openai_schema(wanted, name)
    elif kind == "json_object":
        grammar = schema_grammar(ANY_OBJECT, name, closed=False)
    wanted.finish()
    return grammar


def read_grammar(fields: Fields) -> Grammar | None:
    """Take `grammar` of a TGI request; None when absent. Raises ApiError."""
    wanted = fields.nested("grammar")
    if wanted is None:
        return None
    kind = wanted.choice("type", TGI_KINDS)
    if kind is None:
        raise missing("grammar.type")
    grammar = _tgi(kind, wanted, "grammar")
    wanted.finish()
    return grammar


def check_combination(request: GenerationRequest) -> None:
    """Refuse, by name, what would keep an answer from following its grammar to the end."""
    if request.sampling.grammar is None:
        return
    refused = {
        "stop": bool(request.stop),
        "stop_token_ids": bool(request.stop_token_ids),
        "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens > 0,
    }
    for name, asked in refused.items():
        if asked:
            raise ApiError(
                Code.INVALID_REQUEST,
                param=name,
                rule=f"`{name}` cannot be combined with `{request.grammar_field}`",
            )


def _openai_schema(wanted: Fields, name: str) -> Grammar:
    given = wanted.nested("json_schema")
    if given is None:
        raise missing(f"{name}.json_schema")
    if given.text("name", pattern=_NAME, rule=_NAME_RULE) is None:
        raise missing(f"{name}.json_schema.name")
    given.text("description")
    closed = bool(given.boolean("strict"))
    schema = given.mapping("schema")
    given.finish()
    if schema is None:
        raise missing(f"{name}.json_schema.schema")
    return schema_grammar(schema, f"{name}.json_schema.schema", closed=closed)


def _tgi(kind: str, wanted: Fields, name: str) -> Grammar:
    """Return the grammar in `value`; its schemas are closed, as TGI's own are."""
    value = wanted.value("value")
    if value is None:
        raise missing(f"{name}.value")
    if kind == "regex":
        return _regex(value, name)
    if kind == "json_schema":
        given = wanted.inner(value, f"{name}.value")
        given.text("name")
        given.boolean("strict")
        value = given.mapping("schema")
        given.finish()
        if value is None:
            raise missing(f"{name}.value.schema")
    elif isinstance(value, str):
        value = _parsed(value, name)
    if not isinstance(value, dict):
        raise invalid_type(f"{name}.value", "an object, or a string that holds one")
    if "properties" not in value:
        raise ApiError(Code.GRAMMAR_INVALID, param=name, reason=_NO_PROPERTIES)
    return schema_grammar(value, name, closed=True)


def _regex(value: object, name: str) -> Grammar:
    if not isinstance(value, str):
        raise invalid_type(f"{name}.value", "a string")
    try:
        if not value:
            raise GrammarError(GrammarReason.INVALID_REGEX)
        check_regex(value)
    except GrammarError as error:
        refusal = grammar_refused(error, name)
    else:
        return Grammar(GrammarKind.REGEX, value)
    raise refusal


def _parsed(text: str, name: str) -> Any:
    """Return the JSON in a string, under the rules of a body."""
    if len(text) <= MAX_GRAMMAR_CHARS:
        try:
            return strict_json.loads(text.encode())
        except ApiError as error:
            error.param = f"{name}.value"
            raise
    raise grammar_refused(GrammarError(GrammarReason.TOO_LARGE), name)


def schema_grammar(schema: dict[str, Any], name: str, *, closed: bool) -> Grammar:
    """Return the grammar of `schema`, from the field `name`; `closed`: no properties beside its own."""
    try:
        text = schema_text(schema, closed=closed)
    except GrammarError as error:
        refusal = grammar_refused(error, name)
    else:
        return Grammar(GrammarKind.JSON_SCHEMA, text)
    raise refusal
