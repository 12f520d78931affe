"""Formats, bodies and parsed requests the tool tests share.

Owns: samples. Must not know: expectations. Nothing here is collected as a test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from container.text.tool_format import Mark, Shape, ToolFormat
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions
from sagemaker_entry.generation import ChoiceEnd, EndReason, Event, PromptInfo, TextDelta, TokenPiece
from tests.sagemaker_entry.dialect_samples import LIMITS, chat, parsed

HERMES = ToolFormat(
    Shape.TAGGED,
    shown=True,
    begin=Mark("<tool_call>"),
    end=Mark("</tool_call>"),
    inner="\n",
    between="\n",
)
HERMES_TOKENS = dataclasses.replace(
    HERMES, begin=Mark("<tool_call>", 700), end=Mark("</tool_call>", 701), spoken=(702,)
)
MISTRAL = ToolFormat(Shape.LISTED, shown=True, begin=Mark("[TOOL_CALLS]", 700))
LLAMA = ToolFormat(Shape.BARE, shown=True, many=False, key="parameters", begin=Mark("<|python_tag|>", 700))
NAMED = ToolFormat(Shape.NAMED, shown=True, begin=Mark("[TOOL_CALLS]", 700), arguments=Mark("[ARGS]", 701))
IGNORED = ToolFormat(Shape.PLAIN, shown=False)
FORMS = {
    "hermes": HERMES,
    "hermes_tokens": HERMES_TOKENS,
    "mistral": MISTRAL,
    "llama": LLAMA,
    "named": NAMED,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"type": "string"}, "times": {"type": "integer"}},
    "required": ["at"],
}
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "see", "parameters": SCHEMA},
}
GO: dict[str, Any] = {"type": "function", "function": {"name": "go"}}
ONLY_GO = {"type": "function", "function": {"name": "go"}}


def options(form: ToolFormat = HERMES, *, grammar: bool = True) -> ParseOptions:
    return ParseOptions(dataclasses.replace(LIMITS, grammar=grammar), tool_format=lambda: form)


def asked(form: ToolFormat = HERMES, *, grammar: bool = True, **fields: Any) -> Parsed:
    """Return a parsed chat request that offers `look` and `go`."""
    return parsed(Route.CHAT, chat(**{"tools": [LOOK, GO], **fields}), options(form, grammar=grammar))


def call_text(form: ToolFormat, *calls: tuple[str, str]) -> str:
    """Return the text of `calls` (name, arguments) as a model of `form` writes it, marks as letters."""
    begin = form.begin.text if form.begin is not None else ""
    if form.shape is Shape.NAMED:
        return "".join(f"{begin}{name}[ARGS]{arguments}" for name, arguments in calls)
    made = [f'{{"name": "{name}", "{form.key}": {arguments}}}' for name, arguments in calls]
    if form.shape is Shape.TAGGED:
        return "\n".join(f"{begin}\n{call}\n</tool_call>" for call in made)
    return made[0] if form.shape is Shape.BARE else f"{begin}[{', '.join(made)}]"


def pieces_of(form: ToolFormat, text: str, cuts: list[int]) -> list[TokenPiece]:
    """Return `text` as tokens, cut at `cuts`; marks that are tokens are one each and leave no text."""
    found: list[TokenPiece] = []
    rest, place, taken = text, 0, ""

    def flush() -> None:
        nonlocal taken
        if taken:
            found.append(TokenPiece(5, taken, logprob=-0.5))
        taken = ""

    while rest:
        mark = next((m for m in form.marks if m.token is not None and rest.startswith(m.text)), None)
        if mark is not None and mark.token is not None:
            flush()
            found.append(TokenPiece(mark.token, "", special=True, logprob=-0.5))
            place += len(mark.text)
            rest = rest[len(mark.text) :]
            continue
        if place in cuts:
            flush()
        taken += rest[0]
        rest, place = rest[1:], place + 1
    flush()
    return found


def told(pieces: list[TokenPiece], reason: EndReason = EndReason.EOS) -> list[Event]:
    """Return the events of one choice that gives out one piece at a time."""
    made: list[Event] = [PromptInfo(prompt=0, prompt_tokens=5, cached_tokens=0)]
    made += [TextDelta(prompt=0, choice=0, text=piece.text, pieces=(piece,)) for piece in pieces]
    return [*made, ChoiceEnd(prompt=0, choice=0, reason=reason, completion_tokens=len(pieces), seed=9)]
