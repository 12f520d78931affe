"""How a model writes tool calls, learnt from what its own chat template makes of a made-up call.

Owns: the shapes of call texts, the marks round them, reading both off rendered probes; short call ids.
Must not know: Jinja, requests, grammars, HTTP.
Invariant: a format says how the template itself writes a call. A template whose calls are written in no known
    shape gets the plain one, which is never `recognised`: without a grammar nothing can be read from it.

    tagged   <tool_call>\\n{"name": N, "arguments": A}\\n</tool_call>      Hermes, Qwen
    listed   [TOOL_CALLS][{"name": N, "arguments": A}, ...]               Mistral, Granite
    named    [TOOL_CALLS]N[ARGS]A                                         newer Mistral
    bare     {"name": N, "parameters": A}                                 Llama 3, as the whole answer
    plain    [{"name": N, "arguments": A}, ...]                           ours: the template knows no calls
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

Message = Mapping[str, Any]
# Messages and tools to text; None when the template refuses them.
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], str | None]

SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")  # the only ids Mistral's templates take
SHORT_ID_CHARS: Final = 9
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ANSWER_MARK_CHARS: Final = 12  # of the end of a prompt: enough to know "the assistant's turn" by
_OFFERED: Final = "probe_offered"
_CALLED: Final = "probe_called"
_KEY: Final = "probe_key"


class Shape(enum.StrEnum):
    """The forms of a call text."""

    TAGGED = "tagged"
    LISTED = "listed"
    NAMED = "named"
    BARE = "bare"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Mark:
    """A fixed text of the format; `token` is its id where the vocabulary has it as one control token.

    A mark with a token is that token alone: the same letters written out mean nothing.
    """

    text: str
    token: int | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One model's way of calling tools."""

    shape: Shape
    shown: bool  # the template tells the model about the tools offered
    many: bool = True  # several calls in one answer are the template's own way
    key: str = "arguments"
    begin: Mark | None = None
    end: Mark | None = None  # of a call (tagged), or of the list (listed)
    call_id: Mark | None = None  # named: an id of the model's own stands between name and arguments
    arguments: Mark | None = None  # named
    inner: str = ""  # tagged: white space between a mark and the object
    between: str = ""  # tagged: white space between calls
    short_ids: bool = False  # the template takes ids of nine letters and digits only
    # Control tokens that are ordinary parts of an answer (`<think>`); a free text may hold them.
    spoken: tuple[int, ...] = ()

    @property
    def recognised(self) -> bool:
        """True when calls can be told from text, so that the model may choose whether to call."""
        return self.shown and self.shape is not Shape.PLAIN

    @property
    def marks(self) -> tuple[Mark, ...]:
        found = (self.begin, self.end, self.call_id, self.arguments)
        return tuple(mark for mark in found if mark is not None)


NO_TOOLS: Final = ToolFormat(Shape.PLAIN, shown=False)

_ARGUMENTS: Final = rf'\{{\s*"{_KEY}":\s*7\s*\}}'
_OBJECT: Final = (
    rf'\{{\s*(?:"type":\s*"function",\s*)?"name":\s*"{_CALLED}",\s*"(?P<key>arguments|parameters)":\s*'
    rf'{_ARGUMENTS}(?:,\s*"id":\s*"[^"]*")?\s*\}}'
)
_TAGGED: Final = re.compile(
    rf"(?P<begin><(?P<tag>[a-z_]*(?:tool|func)[a-z_]*)>)(?P<inner>\s*){_OBJECT}\s*(?P<end></(?P=tag)>)"
)
_LISTED: Final = re.compile(
    rf"(?P<begin>\[TOOL_CALLS\]|<\|tool_call\|>)\s*\[\s*{_OBJECT}[^\]]*\](?P<end><\|/tool_call\|>)?"
)
_NAMED: Final = re.compile(
    rf"(?P<begin>\[TOOL_CALLS\]){_CALLED}(?P<id>\[CALL_ID\])?[^\[\]]*(?P<arguments>\[ARGS\]){_ARGUMENTS}"
)
_BARE: Final = re.compile(_OBJECT)
# What Hermes and Qwen templates tell the model, for templates that do not write past calls themselves.
_TOLD: Final = re.compile(r"<tool_call>\s*\{")


def learn(render: Render, token_of: Callable[[str], int | None], spoken: Sequence[int] = ()) -> ToolFormat:
    """Return the format of the template behind `render`.

    `token_of` names the control token a text is, if any; `spoken` are the control tokens a client may see.
    """
    prompt = render([{"role": "user", "content": "probe"}], [_offer()])
    shown = prompt is not None and _OFFERED in prompt
    for many, call_id in ((True, "call_a"), (False, "call_a"), (True, "abcdefgh0"), (False, "abcdefgh0")):
        written = render(_called(call_id, calls=2 if many else 1), [_offer()] if shown else [])
        found = None if written is None else _read(written, (prompt or "").rstrip()[-ANSWER_MARK_CHARS:])
        if found is not None:
            short = len(call_id) == SHORT_ID_CHARS
            return _made(found, token_of, spoken, shown=shown, many=many, short_ids=short)
    if shown and prompt is not None and _TOLD.search(prompt):
        usual = {"begin": "<tool_call>", "end": "</tool_call>", "inner": "\n", "between": "\n"}
        return _made((Shape.TAGGED, usual), token_of, spoken, shown=True, many=True, short_ids=False)
    return ToolFormat(Shape.PLAIN, shown=shown)


def _offer() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {_KEY: {"type": "integer", "description": "probe"}}}
    function = {"name": _OFFERED, "description": "probe", "parameters": parameters}
    return {"type": "function", "function": function}


def _called(call_id: str, *, calls: int) -> list[dict[str, Any]]:
    ids = [call_id[:-1] + str(number) for number in range(calls)]
    function = {"name": _CALLED, "arguments": {_KEY: 7}}
    made = [{"id": each, "type": "function", "function": function} for each in ids]
    results = [{"role": "tool", "tool_call_id": each, "name": _CALLED, "content": "8"} for each in ids]
    user = {"role": "user", "content": "probe"}
    return [user, {"role": "assistant", "content": "", "tool_calls": made}, *results]


def _read(written: str, prompt_end: str) -> tuple[Shape, dict[str, str]] | None:
    """Return the shape of the calls in `written` and its parts, None when no shape fits.

    A bare call must stand where an answer starts: after what a prompt ends with.
    """
    for shape, pattern in (
        (Shape.TAGGED, _TAGGED),
        (Shape.LISTED, _LISTED),
        (Shape.NAMED, _NAMED),
        (Shape.BARE, _BARE),
    ):
        found = pattern.search(written)
        if found is None:
            continue
        starts = written[: found.start()].rstrip().endswith(prompt_end)
        if shape is Shape.BARE and not (prompt_end and starts):
            continue
        parts = {name: text for name, text in found.groupdict().items() if text is not None}
        if shape is Shape.TAGGED:
            following = pattern.search(written, found.end())
            gap = "\n" if following is None else written[found.end() : following.start()]
            parts["between"] = gap if not gap.strip() else "\n"
        return shape, parts
    return None


def _made(
    found: tuple[Shape, dict[str, str]],
    token_of: Callable[[str], int | None],
    spoken: Sequence[int],
    *,
    shown: bool,
    many: bool,
    short_ids: bool,
) -> ToolFormat:
    shape, parts = found

    def mark(name: str) -> Mark | None:
        text = parts.get(name)
        return None if text is None else Mark(text, token_of(text))

    begin = mark("begin")
    if shape is Shape.BARE and (token := token_of("<|python_tag|>")) is not None:
        begin = Mark("<|python_tag|>", token)  # Llama 3 may write it before a call
    made = ToolFormat(
        shape,
        shown=shown,
        many=many and shape is not Shape.BARE,
        key=parts.get("key", "arguments"),
        begin=begin,
        end=mark("end"),
        call_id=mark("id"),
        arguments=mark("arguments"),
        inner=parts.get("inner", ""),
        between=parts.get("between", ""),
        short_ids=short_ids,
    )
    if shape is Shape.NAMED and any(each.token is None for each in made.marks):
        return ToolFormat(Shape.PLAIN, shown=shown)  # a name has no end without the token after it
    own = {each.token for each in made.marks}
    return replace(made, spoken=tuple(token for token in spoken if token not in own))


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return `messages` with every call id as nine letters and digits; equal ids stay equal."""
    return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: Message) -> Message:
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": short_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return changed


def short_id(call_id: str) -> str:
    """Return `call_id` where it is one, else nine letters and digits made from it."""
    if SHORT_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "replace")).digest())
    digits = []
    for _ in range(SHORT_ID_CHARS):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(digits)
