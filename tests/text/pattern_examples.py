"""A short text that each `pattern` of a schema matches, so that a string can be brought to its end.

Owns: the walk over a regular expression. Must not know: masks, tokens, which property a pattern belongs to.
Invariant: an example is a guess; whoever uses it lets the grammar's mask judge every character of it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

_parser: Any = importlib.import_module("re._parser")  # the parse tree `re` compiles; it has no public name
CLASSES = {"CATEGORY_DIGIT": "0", "CATEGORY_WORD": "a", "CATEGORY_SPACE": " ", "CATEGORY_NOT_SPACE": "a"}
OTHERS = "a0-_. "  # tried in turn where a class says what a character must not be


def examples(schema: str) -> list[str]:
    """Return one short example for each pattern in the text of a schema that `re` can read."""
    found = []
    for pattern in dict.fromkeys(_patterns(json.loads(schema))):
        try:
            found.append(_shortest(pattern))
        except re.error:
            continue  # `\p{L}` and the like
    return found


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _patterns(each)
    elif isinstance(value, dict):
        for keyword, each in value.items():
            if keyword == "pattern" and isinstance(each, str):
                yield each
            else:
                yield from _patterns(each)


@cache
def _shortest(pattern: str) -> str:
    return _text(_parser.parse(pattern))


def _text(parsed: Any) -> str:
    return "".join(_piece(str(operator), value) for operator, value in parsed)


def _piece(operator: str, value: Any) -> str:
    if operator == "LITERAL":
        return chr(value)
    if operator == "IN":
        return _of_class(value)
    if operator in {"MAX_REPEAT", "MIN_REPEAT"}:
        least, _, inner = value
        return _text(inner) * least
    if operator == "BRANCH":
        return min((_text(branch) for branch in value[1]), key=len)
    if operator == "SUBPATTERN":
        return _text(value[-1])
    return "a" if operator in {"ANY", "NOT_LITERAL"} else ""  # the rest takes no characters


def _of_class(members: Any) -> str:
    kind, value = members[0]
    if str(kind) == "NEGATE":
        spelled = {chr(v) for k, v in members if str(k) == "LITERAL"}
        return next(character for character in OTHERS if character not in spelled)
    if str(kind) == "CATEGORY":
        return CLASSES.get(str(value), "a")
    return chr(value if str(kind) == "LITERAL" else value[0])
