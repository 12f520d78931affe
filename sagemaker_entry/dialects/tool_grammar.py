"""The grammar an answer is held to when tools are offered, in the model's own call format.

Owns: the text of the grammar (Lark, as llguidance reads it).
Must not know: HTTP, fields, how a grammar is followed.
Invariant: what the grammar accepts, the parser of the same format reads as calls of the functions given; with
    `free`, any other text is accepted too, until a call begins. After the last call the answer ends.

A mark that is a control token is written by its id, `<[5]>`: the same letters are not the mark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from container.engine.request import Grammar, GrammarKind
from container.text.tool_format import Mark, Shape, ToolFormat

MAX_CALLS: Final = 32  # in one answer: a small model would repeat itself until its tokens end
MAX_GRAMMAR_CHARS: Final = 256 * 1024  # what the engine takes
_ANYTHING: Final = r"/(.|\n)*/"
_NO_CALL: Final = r"/(.|\n)*/ & ~/[ \t\n\r]*\{[ \t\n\r]*\"name\"(.|\n)*/"


@dataclass(frozen=True, slots=True)
class Function:
    """One function that may be called; `schema` is the JSON text of what its arguments must be."""

    name: str
    schema: str = field(repr=False)


def tool_grammar(
    form: ToolFormat,
    functions: Sequence[Function],
    *,
    free: bool,
    many: bool,
    content: str | None = None,
) -> Grammar:
    """Return the grammar of answers that call `functions`.

    `free`: text without a call is an answer as well, or, with `content` (the text of a JSON schema), a
    document of that schema. `many`: up to MAX_CALLS calls. Raises ValueError when it is larger than the
    engine takes, or when `free` needs calls that can be told from text.
    """
    if free and not form.recognised:
        raise ValueError("calls of this format cannot be told from text")
    rules = ["%llguidance {}"]
    rules += _start(form, free=free, content=content)
    rules += _body(form, functions, MAX_CALLS if many else 1)
    rules += [f"args_{index}: %json {function.schema}" for index, function in enumerate(functions)]
    text = "\n".join(rules) + "\n"
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError("the grammar is too large")
    return Grammar(GrammarKind.LARK, text)


def _start(form: ToolFormat, *, free: bool, content: str | None) -> list[str]:
    """Return the rules up to the first call's own text."""
    begin = "" if form.begin is None else _mark(form.begin)
    if form.shape is Shape.BARE and begin:
        begin = f"{begin}?"
    if not free:
        return [f"start: {begin} body"]
    if content is not None:
        if form.shape is Shape.BARE:
            raise ValueError("a bare call cannot be told from a JSON document")
        return [f"start: document | {begin} body", f"document: %json {content}"]
    spoken = f"<[{_ranges(form.spoken)}]>"
    more = f" ({spoken} TEXT)*" if form.spoken else ""
    rules = [f"TEXT: {_ANYTHING}"]
    if form.shape is Shape.BARE:
        return [f"start: other | {begin} body", f"other: OTHER{more}", f"OTHER: {_NO_CALL}", *rules]
    rules += ["start: said | head body", f"said: TEXT{more}"]
    if form.begin is not None and form.begin.token is None:
        before = f"(TEXT {spoken})* " if form.spoken else ""
        return [*rules, f"head: {before}trigger", f"trigger[lazy]: TEXT {begin}"]
    return [*rules, f"head: said {begin}"]


def _body(form: ToolFormat, functions: Sequence[Function], most: int) -> list[str]:
    """Return the rules from the first call's own text to the end of the answer."""
    if form.shape is Shape.NAMED:
        return _named(form, functions, most)
    heads = [f'{{"name": "{function.name}", "{form.key}": ' for function in functions]
    calls = [f'{_text(head)} args_{index} "}}"' for index, head in enumerate(heads)]
    rules = ["call: " + " | ".join(calls)]
    begin = "" if form.begin is None else _mark(form.begin)
    end = "" if form.end is None else _mark(form.end)
    if form.shape is Shape.TAGGED:
        inner = _text(form.inner)
        more = f"{_text(form.between)} {begin} tagged"
        return [f"body: tagged{_times(more, most)}", f"tagged: {inner} call {inner} {end}", *rules]
    if form.shape is Shape.BARE:
        return ["body: call", *rules]
    return [f'body: "[" call{_times(_text(", ") + " call", most)} "]" {end}', *rules]


def _named(form: ToolFormat, functions: Sequence[Function], most: int) -> list[str]:
    if form.begin is None or form.arguments is None:
        raise AssertionError("a named call has a mark before its name and one before its arguments")
    call_id = "" if form.call_id is None else f"{_mark(form.call_id)} ID"
    calls = [
        f"{_text(function.name)} {call_id} {_mark(form.arguments)} args_{index}"
        for index, function in enumerate(functions)
    ]
    rules = [f"body: call{_times(f'{_mark(form.begin)} call', most)}", "call: " + " | ".join(calls)]
    return [*rules, "ID: /[A-Za-z0-9]{9}/"] if call_id else rules


def _times(rule: str, most: int) -> str:
    """Return `rule` repeated up to `most` - 1 times, after the first."""
    return f" ({rule}){{0,{most - 1}}}" if most > 1 else ""


def _mark(mark: Mark) -> str:
    return _text(mark.text) if mark.token is None else f"<[{mark.token}]>"


def _text(text: str) -> str:
    return json.dumps(text) if text else ""


def _ranges(tokens: Sequence[int]) -> str:
    """Return ids as `3-5,9`."""
    parts: list[list[int]] = []
    for token in sorted(tokens):
        if parts and token == parts[-1][1] + 1:
            parts[-1][1] = token
        else:
            parts.append([token, token])
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in parts)
