"""The vendor's chat template: conversations to text that knows who wrote which part of it.

Owns: which template serves, what it is given, the checks at load.
Must not know: Jinja, token ids, HTTP.
Invariant: templates come from the model's files alone; nothing a client sends is parsed as one, and every
    string a client sends stays untrusted.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from container.text.errors import TextCode, TextError
from container.text.provenance import Span
from container.text.worker import CHILDREN, RENDER_S, Renderer

# One field's names among the APIs templates were written for; templates read the first, gpt-oss the second.
REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
# Arguments of ours, and names whose meaning a template relies on.
RESERVED_NAMES: Final = frozenset(
    {
        "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
        "raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner", "self",
    }
)  # fmt: skip
_PROBES: Final = (
    ({"role": "user", "content": "probe"},),
    ({"role": "system", "content": "probe"}, {"role": "user", "content": "probe"}),
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation. `trusted` are the ranges, in characters, that the template wrote."""

    text: str = field(repr=False)
    trusted: tuple[Span, ...] = ()


class ChatTemplate:
    """Renders conversations in child processes. Safe to call from many threads."""

    def __init__(
        self,
        sources: Mapping[str, str],
        tokens: Mapping[str, str],
        *,
        children: int = CHILDREN,
        render_s: float = RENDER_S,
    ) -> None:
        """`sources` has `default`; `tokens` are the names (`bos_token`) a template may write.

        Raises TextError when a template does not compile, cannot render a plain question, or exceeds its
        limits doing so.
        """
        self._names = frozenset(sources)
        self._reserved = RESERVED_NAMES | tokens.keys()
        setup = {"templates": dict(sources), "tokens": dict(tokens)}
        self._renderer = Renderer(_encoded(setup), children=children, render_s=render_s)
        self.probe = self._first_probe()

    def _first_probe(self) -> Rendered:
        failure = None
        for messages in _PROBES:
            try:
                return self.render(messages)
            except TextError as error:
                failure = error.code
                if failure is TextCode.TEMPLATE_TIMEOUT:
                    break
        self.close()
        raise TextError(failure or TextCode.TEMPLATE_FAILED)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Return the conversation as the template writes it.

        Raises TextError (lone surrogate, too large, reserved name, template failed, template timeout).
        """
        arguments = dict(template_kwargs or {})
        if any(name in self._reserved or not name.isidentifier() or name[0] == "_" for name in arguments):
            raise TextError(TextCode.RESERVED_NAME)
        conversation = [_given(message) for message in messages]
        mark = None
        if continue_final_message:
            mark = secrets.token_hex(16)  # nothing that came in can hold it
            _append_mark(conversation, mark)
        reply = self._renderer.render(
            _encoded(
                {
                    "template": "tool_use" if tools and "tool_use" in self._names else "default",
                    "messages": conversation,
                    "tools": list(tools) or None,
                    "add_generation_prompt": add_generation_prompt and not continue_final_message,
                    "arguments": arguments,
                }
            )
        )
        if "error" in reply:
            raise TextError(TextCode.TEMPLATE_FAILED)
        rendered = Rendered(reply["text"], tuple((start, stop) for start, stop in reply["spans"]))
        return rendered if mark is None else _cut_at_mark(rendered, mark)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the idle children."""
        return self._renderer.pids

    def close(self) -> None:
        """End the child processes. Idempotent."""
        self._renderer.close()


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template sees of a message: no None fields, reasoning under the names in use."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING_FIELDS if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _append_mark(conversation: list[dict[str, Any]], mark: str) -> None:
    content = conversation[-1].get("content") if conversation else None
    if not isinstance(content, str):
        raise TextError(TextCode.TEMPLATE_FAILED)
    conversation[-1]["content"] = f"{content}{mark} "  # the space tells whether the template trims


def _cut_at_mark(rendered: Rendered, mark: str) -> Rendered:
    """Return the text up to the end of the final message; trimmed when the template trims."""
    position = rendered.text.rfind(mark)
    if position < 0:
        raise TextError(TextCode.TEMPLATE_FAILED)
    text = rendered.text[:position]
    if not rendered.text.startswith(" ", position + len(mark)):
        text = text.rstrip()
    trusted = ((start, min(stop, len(text))) for start, stop in rendered.trusted)
    return Rendered(text, tuple(span for span in trusted if span[0] < span[1]))


def _encoded(frame: dict[str, Any]) -> bytes:
    """Return `frame` as JSON; raises TextError on a lone surrogate or a value JSON has no form for."""
    text = None
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        text = json.dumps(frame, ensure_ascii=False, allow_nan=False, default=_as_dict)
    if text is None:
        raise TextError(TextCode.TEMPLATE_FAILED)
    payload = None
    with contextlib.suppress(UnicodeEncodeError):  # its exception would carry the text
        payload = text.encode()
    if payload is None:
        raise TextError(TextCode.LONE_SURROGATE)
    return payload


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError
