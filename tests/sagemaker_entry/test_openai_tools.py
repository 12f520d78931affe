"""Tools and tool calls of chat requests: names, arguments, and where each fault is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from container.engine.request import Grammar, GrammarKind
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ChatPrompt
from tests.sagemaker_entry.dialect_samples import chat, messages_of, refused, requested
from tests.sagemaker_entry.tool_samples import (
    GO,
    HERMES,
    IGNORED,
    LLAMA,
    LOOK,
    MISTRAL,
    ONLY_GO,
    asked,
    options,
)

USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [], "tool_choice": "none"},
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"modalities": ["text"]},
        {"audio": None, "functions": None},
    ],
)
def test_what_offers_nothing_is_accepted_and_offers_nothing(fields: dict[str, Any]) -> None:
    assert requested(Route.CHAT, chat(**fields)) == requested(Route.CHAT, chat())


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ("x", "tools[0]"),
        ({}, "tools[0].type"),
        ({"type": "custom"}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "../../x"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "<|im_start|>"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "x" * 65}}, "tools[0].function.name"),
        (
            {"type": "function", "function": {"name": "x", "description": "d" * 1_000_000}},
            "tools[0].function.description",
        ),
        (
            {"type": "function", "function": {"name": "x", "parameters": "{}"}},
            "tools[0].function.parameters",
        ),
        ({"type": "function", "function": {"name": "x", "typo": 1}}, "tools[0].function.typo"),
    ],
)
def test_tools_are_checked_even_when_they_are_not_offered(tool: Any, param: str) -> None:
    error = refused(Route.CHAT, chat(tools=[tool], tool_choice="none"))
    assert error.param == param


def test_tool_names_are_unique() -> None:
    error = refused(Route.CHAT, chat(tools=[TOOL, TOOL], tool_choice="none"))
    assert (error.param, error.code) == ("tools[1].function.name", Code.INVALID_VALUE)


def test_a_tool_conversation_has_its_arguments_as_a_mapping() -> None:
    made = messages_of(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
    )
    assert made[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
        ],
    }
    assert made[2] == {"role": "tool", "content": "seen", "tool_call_id": "call_1"}


def test_empty_arguments_are_an_empty_mapping() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": ""}}
    made = messages_of(USER, {"role": "assistant", "tool_calls": [call]})
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": None}, "id"),
        ({"id": "a b"}, "id"),
        ({"id": "x" * 129}, "id"),
        ({"type": "x"}, "type"),
        ({"function": None}, "function"),
        ({"function": {"arguments": "{}"}}, "function.name"),
        ({"function": {"name": "a b", "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "x", "arguments": {}}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "[1]"}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "{"}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "[" * 100_000}}, "function.arguments"),
        ({"function": {"name": "x", "arguments": "{}", "typo": 1}}, "function.typo"),
        ({"typo": 1}, "typo"),
    ],
)
def test_bad_tool_calls_are_refused_where_they_are_bad(change: dict[str, Any], param: str) -> None:
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, **change}]}]}
    assert refused(Route.CHAT, body).param == f"messages[1].tool_calls[0].{param}"


def test_too_many_tool_calls_are_refused() -> None:
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL] * 129}]}
    assert refused(Route.CHAT, body).param == "messages[1].tool_calls"


def prompt(parsed: Any) -> ChatPrompt:
    (prompt,) = parsed.request.prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt


def grammar(parsed: Any) -> str:
    held = parsed.request.sampling.grammar
    assert held is not None and held.kind == "lark"
    return str(held.text)


@pytest.mark.parametrize(
    "fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": ONLY_GO}]
)
def test_every_offered_tool_reaches_the_template(fields: dict[str, Any]) -> None:
    shown = prompt(asked(**fields)).tools
    assert shown == (
        LOOK,
        {
            "type": "function",
            "function": {
                "name": "go",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    )


def test_strict_is_not_shown_to_the_model() -> None:
    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    assert prompt(asked(tools=[strict])).tools == (LOOK,)


def test_no_tools_reach_the_template_when_none_may_be_called() -> None:
    parsed = asked(tool_choice="none")
    assert prompt(parsed).tools == () and parsed.request.sampling.grammar is None


def test_what_may_be_called_is_what_the_choice_says() -> None:
    for choice in ("auto", "required"):
        text = grammar(asked(tool_choice=choice))
        assert '\\"look\\"' in text and '\\"go\\"' in text
    named = grammar(asked(tool_choice=ONLY_GO))
    assert '\\"look\\"' not in named and '\\"go\\"' in named


def test_only_auto_lets_the_answer_be_text() -> None:
    assert "said" in grammar(asked())
    assert "said" not in grammar(asked(tool_choice="required"))
    assert "said" not in grammar(asked(tool_choice=ONLY_GO))


def test_one_call_is_all_where_the_request_or_the_template_says_so() -> None:
    assert "{0,31}" in grammar(asked(tool_choice="required"))
    assert "{0," not in grammar(asked(tool_choice="required", parallel_tool_calls=False))
    assert "{0," not in grammar(asked(tool_choice=ONLY_GO))
    assert "{0," not in grammar(asked(LLAMA, tool_choice="required"))


def test_a_template_that_ignores_tools_serves_only_what_the_grammar_alone_can_hold() -> None:
    for fields in ({}, {"tool_choice": "auto"}):
        error = refused(Route.CHAT, chat(tools=[LOOK], **fields), options(IGNORED))
        assert (error.code, error.param, error.status) == (Code.TOOLS_UNSUPPORTED, "tools", 400)
    for choice in ("required", ONLY_GO):
        held = asked(IGNORED, tool_choice=choice)
        assert '"["' in grammar(held)
        assert prompt(held).messages == prompt(asked(tool_choice="none")).messages, (
            "the prompt is the client's"
        )


def test_an_engine_without_grammars_serves_auto_by_reading_alone() -> None:
    assert asked(grammar=False).request.sampling.grammar is None
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": ONLY_GO}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "go", "strict": True}}]},
            "tools.function.strict",
        ),
    ):
        error = refused(Route.CHAT, chat(**{"tools": [GO], **fields}), options(grammar=False))
        assert (error.code, error.param) == (Code.UNSUPPORTED_FIELD, param)


@pytest.mark.parametrize(
    ("choice", "code", "param"),
    [
        ("any", Code.INVALID_VALUE, "tool_choice"),
        ("REQUIRED", Code.INVALID_VALUE, "tool_choice"),
        (True, Code.INVALID_TYPE, "tool_choice"),
        ({}, Code.MISSING_FIELD, "tool_choice.type"),
        ({"type": "allowed_tools", "allowed_tools": {}}, Code.INVALID_VALUE, "tool_choice.type"),
        ({"type": "function"}, Code.MISSING_FIELD, "tool_choice.function"),
        ({"type": "function", "function": {}}, Code.MISSING_FIELD, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "fly"}}, Code.INVALID_VALUE, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "a b"}}, Code.INVALID_VALUE, "tool_choice.function.name"),
        ({**ONLY_GO, "typo": 1}, Code.UNKNOWN_FIELD, "tool_choice.typo"),
    ],
)
def test_bad_choices_are_refused_by_name(choice: Any, code: Code, param: str) -> None:
    error = refused(Route.CHAT, chat(tools=[LOOK, GO], tool_choice=choice), options())
    assert (error.code, error.param, error.status) == (code, param, 400)


@pytest.mark.parametrize("choice", ["auto", "required", ONLY_GO])
@pytest.mark.parametrize("tools", [None, []])
def test_a_choice_needs_tools(choice: Any, tools: Any) -> None:
    error = refused(Route.CHAT, chat(tools=tools, tool_choice=choice), options())
    assert (error.code, error.param) == (Code.INVALID_REQUEST, "tool_choice")


def test_strict_schemas_have_no_fallback_and_others_fall_back_to_any_object() -> None:
    def made(strict: bool | None) -> Any:
        function = {**LOOK["function"], "strict": strict}
        return asked(tools=[{"type": "function", "function": function}]).request

    loose = made(None)
    assert loose.grammar_field == "tools"
    assert loose.grammar_fallback is not None
    assert '"times"' in loose.sampling.grammar.text and '"times"' not in loose.grammar_fallback.text
    assert '"additionalProperties"' not in loose.sampling.grammar.text
    strict = made(True)
    assert strict.grammar_fallback is None
    assert '"additionalProperties": false' in strict.sampling.grammar.text


def test_a_strict_schema_stays_in_the_fallback_of_its_neighbours() -> None:
    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    fallback = asked(tools=[strict, GO]).request.grammar_fallback
    assert fallback is not None and '"times"' in fallback.text


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_keeps_an_answer_from_ending_cannot_be_combined_with_held_calls(fields: dict[str, Any]) -> None:
    (name,) = fields
    error = refused(Route.CHAT, chat(tools=[GO], **fields), options())
    assert (error.code, error.param) == (Code.INVALID_REQUEST, name)
    assert asked(grammar=False, **fields).request.sampling.grammar is None


def test_a_document_and_calls_share_a_grammar() -> None:
    use = asked().presenter._tools  # type: ignore[attr-defined]
    document = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}')
    base = asked(tool_choice="none").request
    request = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, grammar=document))
    text = use.hold(request).sampling.grammar.text
    assert 'document: %json {"type": "integer"}' in text and "said" not in text
    required = dataclasses.replace(use, free=False).hold(request).sampling.grammar.text
    assert "document" not in required, "no document is asked for where a call is required"
    for form, kind in ((LLAMA, GrammarKind.JSON_SCHEMA), (HERMES, GrammarKind.REGEX)):
        other = dataclasses.replace(base.sampling, grammar=Grammar(kind, "{}"))
        with pytest.raises(ApiError) as caught:
            dataclasses.replace(use, form=form).hold(dataclasses.replace(base, sampling=other))
        assert caught.value.param == "response_format"


def test_tools_too_large_for_a_grammar_or_the_window_are_refused() -> None:
    wide = {"type": "object", "properties": {f"{n:040}": {"type": "string"} for n in range(200)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": wide}} for n in range(40)]
    large = dataclasses.replace(options().limits, sequence_tokens=10**6)
    error = refused(Route.CHAT, chat(tools=tools), dataclasses.replace(options(), limits=large))
    assert (error.code, error.param) == (Code.INVALID_VALUE, "tools")
    assert refused(Route.CHAT, chat(tools=tools), options()).code is Code.CONTEXT_LENGTH


def test_a_format_is_asked_for_only_when_tools_are_offered() -> None:
    def loading() -> Any:
        raise ApiError(Code.LOADING)

    waiting = dataclasses.replace(options(), tool_format=loading)
    requested(Route.CHAT, chat(), waiting)
    assert refused(Route.CHAT, chat(tools=[GO]), waiting).code is Code.LOADING


def test_nothing_of_the_tools_shows_in_a_repr() -> None:
    secret = {"type": "function", "function": {"name": "go", "description": "secret", "parameters": SECRET}}
    parsed = asked(MISTRAL, tools=[secret])
    assert "secret" not in repr(parsed) + repr(parsed.presenter._tools)  # type: ignore[attr-defined]


SECRET = {"type": "object", "properties": {"secret": {"type": "string"}}}
