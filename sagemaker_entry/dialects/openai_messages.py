"""Chat messages of the OpenAI shape, checked into plain mappings for the chat template.

Owns: roles, content parts, tool calls, their order rules. Must not know: templates, tokens.
Invariant: a returned message has a role of the list, plain-string content (or tool calls), and bounded names;
its text is untrusted and unchanged.
"""

from __future__ import annotations

import re
from typing import Any, Final

from sagemaker_entry import strict_json
from sagemaker_entry.dialects.bounds import check_prompt_bytes, utf8_bytes
from sagemaker_entry.dialects.fields import Fields, invalid_type, invalid_value, missing
from sagemaker_entry.dialects.presenter import ParseOptions, encode
from sagemaker_entry.errors import ApiError

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME_RULE: Final = "1 to 64 letters, digits, `-` or `_`"
CALL_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
CALL_ID_RULE: Final = "1 to 128 letters, digits, `_`, `.`, `:` or `-`"
MAX_PARTS: Final = 2048  # content parts of one message
MAX_TOOL_CALLS: Final = 128


def read_messages(fields: Fields, options: ParseOptions) -> tuple[dict[str, Any], ...]:
    """Take `messages`.

    Raises ApiError: for shapes, for a list with nothing but system messages, for a tool result without its
    call, and for more text than the window can hold.
    """
    items = fields.items("messages", high=options.limits.max_messages)
    if items is None:
        raise missing("messages")
    calls: set[str] = set()
    messages = []
    text_bytes = 0
    for index, item in enumerate(items):
        message = _message(fields.inner(item, f"messages[{index}]"), calls)
        text_bytes += _text_bytes(message)
        messages.append(message)
    check_prompt_bytes(text_bytes, options.limits)
    if all(message["role"] == "system" for message in messages):
        raise invalid_value("messages", "a list with at least one message that is not `system`")
    return tuple(messages)


def _message(fields: Fields, calls: set[str]) -> dict[str, Any]:
    role = fields.choice("role", ROLES)
    if role is None:
        raise missing(fields.name("role"))
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = _content(fields)
    name = fields.text("name", pattern=NAME, rule=NAME_RULE)
    if name is not None:
        message["name"] = name
    if role == "assistant":
        _assistant(fields, message, calls)
    elif role == "tool":
        call = fields.text("tool_call_id", pattern=CALL_ID, rule=CALL_ID_RULE)
        if call is None:
            raise missing(fields.name("tool_call_id"))
        if call not in calls:
            raise invalid_value(fields.name("tool_call_id"), "the id of an earlier tool call")
        message["tool_call_id"] = call
    if message["content"] is None and "tool_calls" not in message:
        raise missing(fields.name("content"))
    fields.finish()
    return message


def _assistant(fields: Fields, message: dict[str, Any], calls: set[str]) -> None:
    """Take what only an assistant message has, nulls of a message that came from a reply included."""
    fields.ignore(("annotations",))
    fields.refuse(("refusal", "audio", "function_call"))
    reasoning = fields.text("reasoning_content")
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    items = fields.items("tool_calls", high=MAX_TOOL_CALLS)
    if not items:
        return
    message["tool_calls"] = []
    for index, item in enumerate(items):
        call = _tool_call(fields.inner(item, fields.name(f"tool_calls[{index}]")))
        calls.add(call["id"])
        message["tool_calls"].append(call)


def _content(fields: Fields) -> str | None:
    """Return the message's text; parts are joined with nothing between, as templates join them."""
    content = fields.value("content")
    if content is None or isinstance(content, str):
        return content
    name = fields.name("content")
    if not isinstance(content, list):
        raise invalid_type(name, "a string or a list of text parts")
    if not 0 < len(content) <= MAX_PARTS:
        raise invalid_value(name, f"a list of 1 to {MAX_PARTS} parts")
    return "".join(_part(fields.inner(item, f"{name}[{index}]")) for index, item in enumerate(content))


def _part(part: Fields) -> str:
    kind = part.text("type")
    if kind is None:
        raise missing(part.name("type"))
    if kind != "text":
        raise invalid_value(part.name("type"), "`text`: this model takes text only")
    text = part.text("text")
    if text is None:
        raise missing(part.name("text"))
    part.finish()
    return text


def _tool_call(fields: Fields) -> dict[str, Any]:
    call = fields.text("id", pattern=CALL_ID, rule=CALL_ID_RULE)
    if call is None:
        raise missing(fields.name("id"))
    fields.choice("type", ("function",))
    function = fields.nested("function")
    if function is None:
        raise missing(fields.name("function"))
    name = function.text("name", pattern=NAME, rule=NAME_RULE)
    if name is None:
        raise missing(function.name("name"))
    arguments = _arguments(function)
    function.finish()
    fields.finish()
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(function: Fields) -> dict[str, Any]:
    """Return the arguments as a mapping: templates print them as JSON, a string would be quoted twice."""
    text = function.text("arguments")
    if not text:
        return {}
    parsed: Any
    try:
        parsed = strict_json.loads(text.encode())
    except ApiError:
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid_value(function.name("arguments"), "a JSON object in a string")
    return parsed


def _text_bytes(message: dict[str, Any]) -> int:
    total = utf8_bytes(message["content"] or "") + utf8_bytes(message.get("reasoning_content", ""))
    for call in message.get("tool_calls", ()):
        total += len(encode(call["function"]["arguments"]))
    return total
