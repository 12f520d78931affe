"""JSON schemas as clients send them, made into schemas every keyword of which is followed.

Owns: the keywords that are followed, those that ask for nothing, the bounds, what `closed` means.
Must not know: HTTP, which dialect sent the schema, how a grammar is built or followed.
Invariant: what leaves here holds keywords of FOLLOWED alone and refers to itself alone; an error names a
keyword and never shows a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.regex_bounds import check_regex
from container.text.schema_ends import endless

MAX_GRAMMAR_CHARS: Final = 256 * 1024  # what the engine takes
MAX_LEAST: Final = 65_536  # of a minimum: more characters or items than an answer can have
MAX_DEPTH: Final = 64
MAX_SCHEMAS: Final = 8192  # schemas in one; more would not be built in time
# A model that writes white space for ever would never finish; this is enough to indent 16 levels by four.
WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{0,64}"

MAPS: Final = frozenset({"properties", "$defs", "definitions"})  # name -> schema
LISTS: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SINGLE: Final = frozenset({"additionalProperties", "items", "additionalItems"})
VALUES: Final = frozenset(
    {
        "type", "enum", "const", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
        "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "required",
        "minProperties", "maxProperties", "$ref",
    }
)  # fmt: skip
FOLLOWED: Final = MAPS | LISTS | SINGLE | VALUES | {"$schema"}
# Words for people and for other programs; by their definition no document is right or wrong by them.
ANNOTATIONS: Final = frozenset(
    {
        "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
        "$comment", "contentEncoding", "contentMediaType", "contentSchema", "externalDocs", "xml",
    }
)  # fmt: skip
# Known to JSON Schema or OpenAPI, and not followed: refused by name.
UNSUPPORTED: Final = frozenset(
    {
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
        "patternProperties", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas",
        "unevaluatedProperties", "unevaluatedItems", "$id", "id", "$anchor", "$dynamicRef",
        "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "nullable", "discriminator",
    }
)  # fmt: skip
_OFF: Final = frozenset({"uniqueItems", "nullable"})  # false asks for nothing
_LEAST: Final = frozenset({"minLength", "minItems", "minProperties"})
_NEWEST: Final = "json-schema.org/draft/2020-12/schema"
_OLDEST: Final = "json-schema.org/draft-04/schema"
_DRAFTS: Final = frozenset(
    {
        _OLDEST,
        "json-schema.org/draft-06/schema",
        "json-schema.org/draft-07/schema",
        "json-schema.org/draft/2019-09/schema",
        _NEWEST,
    }
)
_TYPES: Final = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
_COUNTS: Final = _LEAST | {"maxLength", "maxItems", "maxProperties"}
_NUMBERS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})

ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}


def schema_text(schema: object, *, closed: bool) -> str:
    """Return `schema` as the text of a grammar.

    `closed` forbids properties that are not listed wherever a schema has `properties`, be it an empty one,
    and does not say otherwise.
    Raises GrammarError.
    """
    if not isinstance(schema, dict):
        raise GrammarError(GrammarReason.NOT_A_SCHEMA)
    made = _Reader(closed).root(schema)
    for target in _references(made):
        _check_reference(made, target)
    made = _finite(made)
    made["x-guidance"] = {"whitespace_pattern": WHITESPACE}
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(GrammarReason.TOO_LARGE)
    return text


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` with `false` for what is endless in it, else a model that began it could never end.

    Raises GrammarError where that is all of it, or where a reference led through what is gone.
    """
    without = endless(schema, lambda target: _resolved(schema, target))
    if id(schema) in without:
        raise GrammarError(GrammarReason.UNSATISFIABLE)
    if not without:
        return schema

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(each) for each in value]
        if not isinstance(value, dict):
            return value
        if id(value) in without:
            return False
        return {
            keyword: {name: kept(each) for name, each in inner.items()}
            if keyword in MAPS
            else kept(inner)
            if keyword in LISTS | SINGLE
            else inner
            for keyword, inner in value.items()
        }

    made: dict[str, Any] = kept(schema)
    for target in _references(made):
        _check_reference(made, target)
    return made


class _Reader:
    """Walks one schema."""

    def __init__(self, closed: bool) -> None:
        self._closed = closed
        self._schemas = 0
        self._draft = _NEWEST

    def root(self, schema: dict[str, Any]) -> dict[str, Any]:
        draft = schema.get("$schema")
        if draft is not None:
            self._draft = draft.partition("://")[2].removesuffix("#") if isinstance(draft, str) else ""
            if self._draft not in _DRAFTS:
                raise GrammarError(GrammarReason.UNSUPPORTED_KEYWORD, "$schema")
        # The schema's own address: nothing may refer to it by that, so it says nothing.
        return self._mapping({k: v for k, v in schema.items() if k not in {"$id", "id"}}, 1)

    def _schema(self, value: object, depth: int) -> Any:
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise GrammarError(GrammarReason.NOT_A_SCHEMA)
        if "$schema" in value:
            raise GrammarError(GrammarReason.UNSUPPORTED_KEYWORD, "$schema")
        return self._mapping(value, depth)

    def _mapping(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        self._schemas += 1
        if depth > MAX_DEPTH or self._schemas > MAX_SCHEMAS:
            raise GrammarError(GrammarReason.TOO_LARGE)
        made = {
            keyword: self._value(keyword, value, depth)
            for keyword, value in schema.items()
            if not _says_nothing(keyword, value)
        }
        if self._closed and "properties" in made and "additionalProperties" not in made:
            made["additionalProperties"] = False
        return made

    def _value(self, keyword: str, value: object, depth: int) -> Any:
        if keyword in MAPS:
            return {name: self._schema(each, depth + 1) for name, each in _of(dict, value, keyword).items()}
        if keyword in LISTS:
            if keyword == "allOf" and self._closed and len(_of(list, value, keyword)) > 1:
                raise GrammarError(GrammarReason.UNSUPPORTED_KEYWORD, keyword)  # each would forbid the others
            return [self._schema(each, depth + 1) for each in _of(list, value, keyword)]
        if keyword in SINGLE:
            if keyword == "items" and isinstance(value, list) and self._draft != _NEWEST:
                return [self._schema(each, depth + 1) for each in value]
            return self._schema(value, depth + 1)
        if keyword.startswith("exclusive") and isinstance(value, bool) and self._draft == _OLDEST:
            return value
        if keyword != "$schema":
            _check_value(keyword, value)
        return value


def _says_nothing(keyword: str, value: object) -> bool:
    """True for annotations; raises GrammarError for keywords that are not followed."""
    if keyword in FOLLOWED:
        return False
    if keyword in ANNOTATIONS or keyword.startswith("x-") or (keyword in _OFF and value is False):
        return True
    known = keyword in UNSUPPORTED
    raise GrammarError(GrammarReason.UNSUPPORTED_KEYWORD if known else GrammarReason.UNKNOWN_KEYWORD, keyword)


def _of(kind: type, value: object, keyword: str) -> Any:
    if not isinstance(value, kind):
        raise GrammarError(GrammarReason.NOT_A_SCHEMA, keyword)
    return value


def _check_value(keyword: str, value: object) -> None:
    if not _well_formed(keyword, value):
        raise GrammarError(GrammarReason.NOT_A_SCHEMA, keyword)
    if keyword == "pattern":
        try:
            check_regex(str(value))
        except GrammarError as error:
            raise GrammarError(error.reason, keyword) from None
    elif keyword in _LEAST and isinstance(value, int) and value > MAX_LEAST:
        raise GrammarError(GrammarReason.TOO_LARGE, keyword)
    elif keyword == "$ref" and not str(value).startswith("#"):
        raise GrammarError(GrammarReason.REFERENCE, keyword)


def _well_formed(keyword: str, value: object) -> bool:
    """Return True when `value` is of the kind JSON Schema's own schema asks for."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword in _COUNTS:
        return isinstance(value, int) and number and value >= 0
    if keyword in _NUMBERS:
        return number and (keyword != "multipleOf" or value > 0)  # type: ignore[operator]
    if keyword == "type":
        types = value if isinstance(value, list) else [value]
        return bool(types) and all(isinstance(each, str) and each in _TYPES for each in types)
    if keyword == "required":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if keyword == "enum":
        return isinstance(value, list) and bool(value)
    return keyword == "const" or isinstance(value, str)  # the rest: `pattern`, `format`, `$ref`


def _references(schema: object) -> Iterator[str]:
    """Yield every `$ref` at or below `schema`; values of `enum` and `const` are no schemas."""
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, dict):
        for keyword, value in schema.items():
            if keyword == "$ref":
                yield value
            elif keyword in MAPS:
                for each in value.values():
                    yield from _references(each)
            elif keyword in LISTS | SINGLE:
                yield from _references(value)


def _check_reference(schema: dict[str, Any], target: str) -> None:
    """Raise GrammarError unless the pointer `target` leads to a schema, and not in a circle."""
    seen: set[str] = set()
    while target not in seen:
        seen.add(target)
        found = _resolved(schema, target)
        if not isinstance(found, dict) or "$ref" not in found:
            return
        target = found["$ref"]
    raise GrammarError(GrammarReason.REFERENCE, "$ref")


def _resolved(schema: Any, target: str) -> Any:
    """Follow a JSON pointer through places that hold schemas; raises GrammarError."""
    if target != "#" and not target.startswith("#/"):
        raise GrammarError(GrammarReason.REFERENCE, "$ref")
    within = "schema"
    for part in target.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if within == "list" and name.isdecimal() and int(name) < len(schema):
            schema, within = schema[int(name)], "schema"
        elif within == "map" and name in schema:
            schema, within = schema[name], "schema"
        elif (
            within == "schema"
            and isinstance(schema, dict)
            and name in schema.keys() & (MAPS | LISTS | SINGLE)
        ):
            schema = schema[name]
            within = "map" if name in MAPS else "list" if isinstance(schema, list) else "schema"
        else:
            raise GrammarError(GrammarReason.REFERENCE, "$ref")
    if within != "schema":
        raise GrammarError(GrammarReason.REFERENCE, "$ref")
    return schema
