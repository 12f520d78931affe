"""Tools of a chat request: what is offered, what may be called, and what that makes of the generation.

Owns: `tools`, `tool_choice`, `parallel_tool_calls` and their rules.
Must not know: messages, how replies look, how a grammar is followed.
Invariant: what a request may call is a subset of what it offers. Names are checked words; descriptions and
    schemas are untrusted text and reach the template unchanged.

    tool_choice     the prompt       the answer
    none            no tools         any text
    auto            all tools        any text, or calls; refused where the template knows no calls
    required        all tools        one call or more
    a function      all tools        one call of it

Arguments are held to the function's schema while they are written. With `strict` a schema that cannot be
followed is refused; without it the arguments may then be any JSON object, as OpenAI's are best effort.
A template that ignores tools is given nothing in their place: the prompt stays as the client wrote it, and
only the grammar carries names and schemas (`required`, a function). Legacy `functions` are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Final

from container.engine.request import Grammar, GrammarKind
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.schema import schema_text
from container.text.tool_format import Shape, ToolFormat
from sagemaker_entry.dialects.bounds import check_prompt_bytes
from sagemaker_entry.dialects.fields import Fields, invalid_type, invalid_value, missing, unsupported
from sagemaker_entry.dialects.openai_messages import NAME, NAME_RULE
from sagemaker_entry.dialects.presenter import ParseOptions, encode
from sagemaker_entry.dialects.tool_grammar import MAX_CALLS, Function, tool_grammar
from sagemaker_entry.dialects.tool_schema import ANY_ARGUMENTS, NO_ARGUMENTS, check_schema
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest
from sagemaker_entry.grammars import grammar_refused

MAX_TOOLS: Final = 128  # OpenAI's
MAX_DESCRIPTION_CHARS: Final = 32_768
CHOICES: Final = ("none", "auto", "required")
# Written as templates write JSON, so that a model sees what it was trained on; no room for endless space.
_LAYOUT: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Tool:
    """One offered function."""

    name: str
    strict: bool
    schema: dict[str, Any] = field(repr=False)
    shown: dict[str, Any] = field(repr=False)  # what the template sees


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What of the offered tools an answer may use; `held` is False where the engine follows no grammar."""

    form: ToolFormat
    offered: tuple[Tool, ...] = field(repr=False)
    callable: tuple[Tool, ...] = field(repr=False)
    free: bool
    many: bool
    held: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.callable)

    @property
    def most(self) -> int:
        """How many calls one answer may make."""
        return MAX_CALLS if self.many else 1

    @property
    def shown(self) -> tuple[dict[str, Any], ...]:
        """The tools as the template is given them."""
        return tuple(tool.shown for tool in self.offered)

    def hold(self, request: GenerationRequest) -> GenerationRequest:
        """Return `request` with its answer held to calls; raises ApiError where that cannot be combined.

        A grammar it has already is that of a document, an answer as good as a call where calls are free.
        """
        if not self.held:
            return request
        for name, asked in (("ignore_eos", request.ignore_eos), ("min_tokens", request.min_tokens > 0)):
            if asked:  # after a call the answer ends, and nothing else could be drawn
                rule = f"`{name}` cannot be combined with `tools`"
                raise ApiError(Code.INVALID_REQUEST, param=name, rule=rule)
        grammar = self._grammar(request.sampling.grammar, exact=True)
        loose = all(tool.strict for tool in self.callable)
        return dataclasses.replace(
            request,
            sampling=dataclasses.replace(request.sampling, grammar=grammar),
            grammar_field="tools",
            grammar_fallback=None if loose else self._grammar(request.sampling.grammar, exact=False),
        )

    def _grammar(self, document: Grammar | None, *, exact: bool) -> Grammar:
        if (
            document is not None
            and self.free
            and (document.kind is not GrammarKind.JSON_SCHEMA or self.form.shape is Shape.BARE)
        ):
            rule = "`response_format` cannot be combined with tools that the model may choose to call"
            raise ApiError(Code.INVALID_REQUEST, param="response_format", rule=rule)
        functions = [Function(tool.name, _schema_text(tool, exact=exact)) for tool in self.callable]
        content = None if document is None or not self.free else document.text
        try:
            return tool_grammar(self.form, functions, free=self.free, many=self.many, content=content)
        except ValueError:
            too_large = invalid_value("tools", "smaller: the grammar made of them exceeds its limit")
        raise too_large


def read_tools(fields: Fields, options: ParseOptions) -> ToolUse | None:
    """Take the fields; None where the answer cannot call anything. Raises ApiError."""
    items = fields.items("tools", high=MAX_TOOLS) or []
    parallel = fields.boolean("parallel_tool_calls") is not False
    tools: dict[str, Tool] = {}
    for index, item in enumerate(items):
        tool = _tool(fields.inner(item, f"tools[{index}]"))
        if tool.name in tools:
            raise invalid_value(f"tools[{index}].function.name", "unique")
        tools[tool.name] = tool
    choice, only = _choice(fields, tools)
    if choice == "none":
        return None
    check_prompt_bytes(sum(len(encode(tool.shown)) for tool in tools.values()), options.limits)
    form = options.tool_format()
    free = choice == "auto"
    if free and not form.recognised:
        raise ApiError(Code.TOOLS_UNSUPPORTED, param="tools")
    called = tuple(tools.values()) if only is None else (tools[only],)
    held = options.limits.grammar
    if not held and (not free or any(tool.strict for tool in called)):
        raise unsupported("tool_choice" if not free else "tools.function.strict")
    many = parallel and only is None and form.many
    return ToolUse(form, tuple(tools.values()), called, free=free, many=many, held=held)


def _choice(fields: Fields, tools: dict[str, Tool]) -> tuple[str, str | None]:
    """Return one of CHOICES, and the name of the one function that is required, if it is one."""
    value = fields.value("tool_choice")
    if value is None or value == "none":
        return ("auto" if tools and value is None else "none"), None
    if not isinstance(value, (str, dict)):
        raise invalid_type("tool_choice", "a string or an object")
    if isinstance(value, str) and value not in CHOICES:
        raise invalid_value("tool_choice", f"one of {', '.join(CHOICES)}, or a function")
    only = None if isinstance(value, str) else _function_name(fields.inner(value, "tool_choice"))
    if not tools:
        raise ApiError(Code.INVALID_REQUEST, param="tool_choice", rule="`tool_choice` needs `tools`")
    if only is None:
        return str(value), None
    if only not in tools:
        raise invalid_value("tool_choice.function.name", "the name of one of `tools`")
    return "required", only


def _function_name(choice: Fields) -> str:
    if choice.choice("type", ("function",)) is None:
        raise missing(choice.name("type"))
    function = choice.nested("function")
    if function is None:
        raise missing(choice.name("function"))
    name = _name(function)
    function.finish()
    choice.finish()
    return name


def _tool(fields: Fields) -> Tool:
    if fields.choice("type", ("function",)) is None:
        raise missing(fields.name("type"))
    function = fields.nested("function")
    if function is None:
        raise missing(fields.name("function"))
    name = _name(function)
    description = function.text("description")
    if description is not None and len(description) > MAX_DESCRIPTION_CHARS:
        raise invalid_value(function.name("description"), f"at most {MAX_DESCRIPTION_CHARS} characters")
    schema = function.mapping("parameters")
    if schema is None:
        schema = NO_ARGUMENTS  # OpenAI: a function without them takes none; templates read them unasked
    check_schema(schema, function.name("parameters"))
    strict = bool(function.boolean("strict"))
    function.finish()
    fields.finish()
    shown = {"name": name, "description": description or "", "parameters": schema}
    return Tool(name, strict, schema, {"type": "function", "function": shown})


def _name(function: Fields) -> str:
    name = function.text("name", pattern=NAME, rule=NAME_RULE)
    if name is None:
        raise missing(function.name("name"))
    return name


def _schema_text(tool: Tool, *, exact: bool) -> str:
    """Return the schema arguments are held to; not `exact`: any object, unless the tool is strict."""
    schema: dict[str, Any] = ANY_ARGUMENTS
    if exact or tool.strict:
        refusal: ApiError | None = None
        try:
            schema = json.loads(schema_text({**tool.schema, "type": "object"}, closed=tool.strict))
        except GrammarError as error:
            if tool.strict or error.reason is GrammarReason.NOT_A_SCHEMA:
                refusal = grammar_refused(error, "tools")
        if refusal is not None:
            raise refusal
    return json.dumps({**schema, "x-guidance": _LAYOUT}, ensure_ascii=False)
