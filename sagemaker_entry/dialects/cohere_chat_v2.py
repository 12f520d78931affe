"""Cohere's v2 chat body to a generation request.

Owns: its fields, and what its messages and tools have that OpenAI's lack. Must not know: how the reply looks.
Invariant: a field is honoured or refused by name; messages are held to the rules of OpenAI's, whose shape
    they share, and errors name the fields as the client wrote them.
"""

from __future__ import annotations

from typing import Any, Final

from sagemaker_entry.dialects.cohere_fields import (
    in_format,
    read_format,
    read_max_tokens,
    read_safety,
    read_sampling,
    read_seed,
    read_stops,
    refuse_unless,
)
from sagemaker_entry.dialects.cohere_v2_reply import ChatV2Presenter
from sagemaker_entry.dialects.fields import Fields, invalid_value, unsupported
from sagemaker_entry.dialects.openai_fields import served_model
from sagemaker_entry.dialects.openai_messages import read_messages
from sagemaker_entry.dialects.openai_tools import ToolUse, read_tools
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions, encode
from sagemaker_entry.dialects.response_format import check_combination
from sagemaker_entry.generation import ChatPrompt, GenerationRequest

TOOL_CHOICES: Final = {"REQUIRED": "required", "NONE": "none"}
CITATIONS: Final = ("FAST", "ACCURATE", "OFF", "ENABLED", "DISABLED")


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    limits = options.limits
    refuse_unless(fields, "documents", ([],))
    _citations(fields)
    fields.integer("priority")  # no client may go before others here
    tools = _tools(fields, options)
    logprobs = bool(fields.boolean("logprobs"))
    request = GenerationRequest(
        prompts=(_prompt(fields, options, tools),),
        sampling=read_sampling(fields, limits, top_logprobs=0 if logprobs else None),
        seed=read_seed(fields),
        model=served_model(fields, limits),
        max_tokens=read_max_tokens(fields, limits),
        stop=read_stops(fields, "stop_sequences", limits),
        stream=bool(fields.boolean("stream")),
    )
    warnings = read_safety(fields)
    grammar = read_format(fields, "json_schema")
    fields.finish()
    request = in_format(request, grammar, with_tools=tools is not None)
    check_combination(request)
    presenter = ChatV2Presenter(tools, warnings, logprobs=logprobs)
    return Parsed(request if tools is None else tools.hold(request), presenter)


def _citations(fields: Fields) -> None:
    """Take `citation_options`: without documents there is nothing to cite, whatever the mode."""
    options = fields.nested("citation_options")
    if options is not None:
        options.choice("mode", CITATIONS)
        options.finish()


def _prompt(fields: Fields, options: ParseOptions, tools: ToolUse | None) -> ChatPrompt:
    items = fields.value("messages")
    if isinstance(items, list):
        items = [_message(item) for item in items]
    messages = read_messages(Fields({"messages": items}, options.unknown_fields), options)
    return ChatPrompt(
        messages=messages,
        tools=() if tools is None else tools.shown,
        template_kwargs=_thinking(fields),
    )


def _thinking(fields: Fields) -> dict[str, Any]:
    """Return what tells a template not to think; asking for thought apart from the answer is refused."""
    thinking = fields.nested("thinking")
    if thinking is None:
        return {}
    if thinking.choice("type", ("enabled", "disabled")) != "disabled":
        raise unsupported("thinking")
    refuse_unless(thinking, "token_budget", ())
    thinking.finish()
    return {"enable_thinking": False}  # the name that templates with a switch give it


def _message(item: Any) -> Any:
    """Return a message with OpenAI's words for what Cohere words otherwise; anything odd stays as it is."""
    if not isinstance(item, dict):
        return item
    message = dict(item)
    plan = message.pop("tool_plan", None)
    content = message.get("content")
    if content == [] and message.get("tool_calls"):
        content = None
    if isinstance(content, list):
        content = [_part(part) for part in content]
    if plan and content is None:
        content = plan
    if message.get("citations") in (None, []):
        message.pop("citations", None)
    return {**message, "content": content}


def _part(part: Any) -> Any:
    """Return a document, as tools give their results, as the text of its data."""
    if not isinstance(part, dict) or part.get("type") != "document":
        return part
    document = part.get("document")
    if not isinstance(document, dict) or "data" not in document:
        raise invalid_value("messages", "made of documents with `data`")
    data = document["data"]
    return {"type": "text", "text": data if isinstance(data, str) else encode(data).decode()}


def _tools(fields: Fields, options: ParseOptions) -> ToolUse | None:
    """Take `tools`, `strict_tools` and `tool_choice`."""
    strict = bool(fields.boolean("strict_tools"))
    choice = fields.choice("tool_choice", TOOL_CHOICES)
    items = fields.value("tools")
    if strict and isinstance(items, list):
        items = [_strict(item) for item in items]
    given: dict[str, Any] = {"tools": items}
    if choice is not None:
        given["tool_choice"] = TOOL_CHOICES[choice]
    return read_tools(Fields(given, options.unknown_fields), options)


def _strict(item: Any) -> Any:
    if not isinstance(item, dict) or not isinstance(item.get("function"), dict):
        return item
    return {**item, "function": {**item["function"], "strict": True}}
