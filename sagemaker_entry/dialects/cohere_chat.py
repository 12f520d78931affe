"""Cohere's v1 chat body to a generation request.

Owns: its fields, its history, what its tools become. Must not know: how the reply looks.
Invariant: a field is honoured or refused by name. A call of v1 has no id: calls get one by their place, and a
    result goes to the first open call of its name and parameters.

    preamble       system message                 TOOL, tool_results    results of earlier calls; a call that
    chat_history   USER CHATBOT SYSTEM TOOL                             the history lacks is put before them
    message        the user's, last
"""

from __future__ import annotations

import re
from typing import Any, Final

from sagemaker_entry.dialects.bounds import check_prompt_bytes, utf8_bytes
from sagemaker_entry.dialects.cohere_chat_reply import ChatPresenter
from sagemaker_entry.dialects.cohere_fields import (
    in_format,
    read_format,
    read_frames,
    read_max_tokens,
    read_safety,
    read_sampling,
    read_seed,
    read_stops,
    refuse_unless,
)
from sagemaker_entry.dialects.cohere_frames import Frames
from sagemaker_entry.dialects.fields import Fields, invalid_type, invalid_value, missing
from sagemaker_entry.dialects.openai_fields import served_model
from sagemaker_entry.dialects.openai_messages import MAX_TOOL_CALLS, NAME, NAME_RULE
from sagemaker_entry.dialects.openai_tools import MAX_TOOLS, ToolUse, read_tools
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions, encode
from sagemaker_entry.dialects.response_format import check_combination
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ChatPrompt, GenerationRequest, Prompt, TextPrompt

ROLES: Final = {"USER": "user", "CHATBOT": "assistant", "SYSTEM": "system", "TOOL": "tool"}
MAX_PARAMETERS: Final = 128  # of one tool
# Python's names for types, which Cohere documents, and JSON's own.
_TYPES: Final = {
    **dict.fromkeys(("str", "string"), "string"),
    **dict.fromkeys(("int", "integer"), "integer"),
    **dict.fromkeys(("float", "number"), "number"),
    **dict.fromkeys(("bool", "boolean"), "boolean"),
    **dict.fromkeys(("list", "array"), "array"),
    **dict.fromkeys(("dict", "object"), "object"),
}
_LIST_OF: Final = re.compile(r"list\[([a-z]{1,16})\]")


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    limits = options.limits
    _refuse_unserved(fields)
    frames = read_frames(fields, options)
    tools = _tools(fields, options)
    raw = bool(fields.boolean("raw_prompting"))
    conversation = Conversation(options)
    prompt = _raw_prompt(fields, options) if raw else _prompt(fields, conversation, tools)
    request = GenerationRequest(
        prompts=(prompt,),
        sampling=read_sampling(fields, limits),
        seed=read_seed(fields),
        model=served_model(fields, limits),
        max_tokens=read_max_tokens(fields, limits),
        stop=read_stops(fields, "stop_sequences", limits),
        stream=frames is not None,
    )
    warnings = read_safety(fields)
    grammar = read_format(fields, "schema")
    fields.finish()
    request = in_format(request, grammar, with_tools=tools is not None)
    check_combination(request)
    presenter = ChatPresenter(frames or Frames.BARE, conversation.history, tools, warnings)
    return Parsed(request if tools is None else tools.hold(request), presenter)


def _refuse_unserved(fields: Fields) -> None:
    """Refuse what needs a server's memory, a search, or documents to cite."""
    fields.refuse(("conversation_id", "max_input_tokens"))
    refuse_unless(fields, "connectors", ([],))
    refuse_unless(fields, "search_queries_only", (False,))
    refuse_unless(fields, "documents", ([],))
    refuse_unless(fields, "prompt_truncation", ("OFF",))
    refuse_unless(fields, "return_prompt", (False,))
    fields.text("citation_quality")  # without documents there is nothing to cite
    # One step or several is the caller's way of using the calls; the model is asked the same way.
    fields.boolean("force_single_step")


def _raw_prompt(fields: Fields, options: ParseOptions) -> Prompt:
    for name in ("preamble", "chat_history", "tools", "tool_results"):
        if fields.value(name):
            rule = f"`{name}` cannot be combined with `raw_prompting`"
            raise ApiError(Code.INVALID_REQUEST, param=name, rule=rule)
    text = fields.text("message")
    if not text:
        raise invalid_value("message", "not empty")
    check_prompt_bytes(utf8_bytes(text), options.limits)
    return TextPrompt(text)


def _prompt(fields: Fields, conversation: Conversation, tools: ToolUse | None) -> Prompt:
    preamble = fields.text("preamble")
    if preamble:
        conversation.messages.append({"role": "system", "content": preamble})
    conversation.read(fields)
    return ChatPrompt(
        messages=conversation.checked(), tools=() if tools is None else tools.shown, template_kwargs={}
    )


class Conversation:
    """Messages for the template, and the history as a v1 reply returns it."""

    def __init__(self, options: ParseOptions) -> None:
        self.messages: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self._limits = options.limits
        self._open: list[tuple[str, str, Any]] = []  # id, name, parameters of calls without a result
        self._calls = 0

    def read(self, fields: Fields) -> None:
        """Take `chat_history`, `message` and `tool_results`; raises ApiError."""
        for index, item in enumerate(fields.items("chat_history", high=self._limits.max_messages) or ()):
            self._entry(fields.inner(item, f"chat_history[{index}]"))
            self.history.append(item)
        message = fields.text("message")
        if message is None:
            raise invalid_type("message", "a string")
        results = fields.items("tool_results", high=MAX_TOOL_CALLS) or []
        if message:
            self.messages.append({"role": "user", "content": message})
            self.history.append({"role": "USER", "message": message})
        elif not results:
            raise invalid_value("message", "not empty")
        if results:
            self._results([fields.inner(r, f"tool_results[{i}]") for i, r in enumerate(results)])
            self.history.append({"role": "TOOL", "tool_results": results})

    def checked(self) -> tuple[dict[str, Any], ...]:
        """Return the messages; raises ApiError for more text than the window can hold."""
        total = 0
        for message in self.messages:
            total += utf8_bytes(message["content"] or "")
            total += sum(len(encode(c["function"]["arguments"])) for c in message.get("tool_calls", ()))
        check_prompt_bytes(total, self._limits)
        return tuple(self.messages)

    def _entry(self, entry: Fields) -> None:
        role = entry.choice("role", ROLES)
        if role is None:
            raise missing(entry.name("role"))
        text = entry.text("message")
        calls = entry.items("tool_calls", high=MAX_TOOL_CALLS) or []
        results = entry.items("tool_results", high=MAX_TOOL_CALLS) or []
        entry.finish()
        if role == "TOOL":
            if not results:
                raise missing(entry.name("tool_results"))
            inner = [entry.inner(r, entry.name(f"tool_results[{i}]")) for i, r in enumerate(results)]
            self._results(inner)
            return
        if calls and role == "CHATBOT":
            inner = [entry.inner(c, entry.name(f"tool_calls[{i}]")) for i, c in enumerate(calls)]
            self._called([_call(each) for each in inner], text)
            return
        if text is None:
            raise missing(entry.name("message"))
        self.messages.append({"role": ROLES[role], "content": text})

    def _called(self, calls: list[tuple[str, Any]], text: str | None) -> None:
        made = []
        for name, parameters in calls:
            call = f"call_{self._calls}"
            self._calls += 1
            self._open.append((call, name, parameters))
            function = {"name": name, "arguments": parameters}
            made.append({"id": call, "type": "function", "function": function})
        self.messages.append({"role": "assistant", "content": text or None, "tool_calls": made})

    def _results(self, results: list[Fields]) -> None:
        read = [_result(each) for each in results]
        known = [(name, parameters) for _, name, parameters in self._open]
        unknown = []
        for name, parameters, _ in read:
            if (name, parameters) in known:
                known.remove((name, parameters))
            else:
                unknown.append((name, parameters))
        if unknown:
            self._called(unknown, None)
        for name, parameters, outputs in read:
            found = next(each for each in self._open if each[1:] == (name, parameters))
            self._open.remove(found)
            content = encode(outputs).decode()
            self.messages.append({"role": "tool", "tool_call_id": found[0], "content": content})


def _call(fields: Fields) -> tuple[str, Any]:
    name = fields.text("name", pattern=NAME, rule=NAME_RULE)
    if name is None:
        raise missing(fields.name("name"))
    parameters = fields.mapping("parameters") or {}
    fields.ignore(("generation_id",))  # of a call as an older reply carries it
    fields.finish()
    return name, parameters


def _result(fields: Fields) -> tuple[str, Any, list[Any]]:
    call = fields.nested("call")
    if call is None:
        raise missing(fields.name("call"))
    name, parameters = _call(call)
    outputs = fields.items("outputs", high=MAX_PARAMETERS)
    if outputs is None:
        raise missing(fields.name("outputs"))
    fields.finish()
    return name, parameters, outputs


def _tools(fields: Fields, options: ParseOptions) -> ToolUse | None:
    """Take `tools` and return them as the chat template and the grammar know tools."""
    items = fields.items("tools", high=MAX_TOOLS)
    if not items:
        return None
    converted = [_tool(fields.inner(item, f"tools[{index}]")) for index, item in enumerate(items)]
    return read_tools(Fields({"tools": converted}, options.unknown_fields), options)


def _tool(fields: Fields) -> dict[str, Any]:
    name = fields.text("name", pattern=NAME, rule=NAME_RULE)
    if name is None:
        raise missing(fields.name("name"))
    function: dict[str, Any] = {"name": name, "description": fields.text("description")}
    definitions = fields.mapping("parameter_definitions") or {}
    if len(definitions) > MAX_PARAMETERS:
        rule = f"an object of at most {MAX_PARAMETERS} parameters"
        raise invalid_value(fields.name("parameter_definitions"), rule)
    fields.finish()
    properties: dict[str, Any] = {}
    required = []
    path = fields.name("parameter_definitions")
    for parameter, value in definitions.items():
        definition = fields.inner(value, path)
        properties[parameter] = _json_type(definition)
        if (description := definition.text("description")) is not None:
            properties[parameter]["description"] = description
        if definition.boolean("required"):
            required.append(parameter)
        definition.finish()
    function["parameters"] = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": function}


def _json_type(definition: Fields) -> dict[str, Any]:
    kind = definition.text("type")
    if kind is None:
        raise missing(definition.name("type"))
    listed = _LIST_OF.fullmatch(kind.lower())
    named = listed[1] if listed else kind.lower()
    if named not in _TYPES:
        raise invalid_value(definition.name("type"), f"one of {', '.join(_TYPES)} or a list of one")
    if listed:
        return {"type": "array", "items": {"type": _TYPES[named]}}
    return {"type": _TYPES[named]}
