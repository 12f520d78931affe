"""Tools over a real front: the unmodified OpenAI client calls, and comes again with results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.sagemaker_entry.harness import Server
from tests.text.tool_templates import HERMES, MISTRAL, SPECIAL

CALLS = ("[TOOL_CALLS]",)
SECRET = "canary-41c3"


class look(pydantic.BaseModel):  # its name is the function's
    at: str


def tool(**more: Any) -> Any:
    made: Any = openai.pydantic_function_tool(look)
    made["function"] |= more
    return made


def said(text: str, controls: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return a conversation that makes the engine answer `text`, each of `controls` as its token."""
    digits = ""
    while text:
        index = next((i for i, control in enumerate(controls) if text.startswith(control)), None)
        if index is not None:
            digits += f"{258 + index:04x}"
            text = text[len(controls[index]) :]
            continue
        digits += "".join(f"{byte:04x}" for byte in text[0].encode())
        text = text[1:]
    return [{"role": "user", "content": f"say={digits}"}]


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


@pytest.fixture(scope="module")
def hermes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("hermes"), template=HERMES) as running:
        yield running
    assert "Traceback" not in running.log and SECRET not in running.log


@pytest.fixture(scope="module")
def mistral_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("mistral"), template=MISTRAL, controls=CALLS) as running:
        yield running
    assert "Traceback" not in running.log


def chat(server: Server) -> Any:
    made = openai.OpenAI(api_key="x", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)
    return made.chat.completions


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_is_made_answered_and_followed_up(hermes_server: Server, choice: Any) -> None:
    api = chat(hermes_server)
    asked = said(hermes(("look", '{"at": "é😀"}')))
    reply = api.create(model="", messages=asked, tools=[tool()], tool_choice=choice)
    (made,) = reply.choices
    (call,) = made.message.tool_calls
    assert made.finish_reason == "tool_calls" and made.message.content is None
    assert json.loads(call.function.arguments) == {"at": "é😀"}
    again = api.create(
        model="",
        messages=[
            *asked[:0],
            {"role": "user", "content": "look"},
            made.message,
            {"role": "tool", "tool_call_id": call.id, "content": "seen"},
            *said("It is there."),
        ],
        tools=[tool()],
    )
    assert again.choices[0].message.content == "It is there."
    assert again.choices[0].finish_reason == "stop" and again.choices[0].message.tool_calls is None


def test_streamed_calls_are_put_together_by_the_client(hermes_server: Server) -> None:
    text = "I look. \n" + hermes(("look", '{"at": "x"}'), ("look", '{"at": "y"}'))
    fields: Any = {"model": "", "messages": said(text), "tools": [tool()]}
    with chat(hermes_server).stream(**fields) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion()
    (choice,) = final.choices
    assert choice.message.content == "I look." and choice.finish_reason == "tool_calls"
    assert [call.function.parsed_arguments for call in choice.message.tool_calls] == [
        look(at="x"),
        look(at="y"),
    ]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    chunks = list(chat(hermes_server).create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1
    assert sum(bool(c.delta.tool_calls) for chunk in chunks for c in chunk.choices) > 10


def test_parse_gives_the_model(hermes_server: Server) -> None:
    messages = said(hermes(("look", '{"at": "x"}')))
    reply = chat(hermes_server).parse(model="", messages=messages, tools=[tool()])
    assert reply.choices[0].message.tool_calls[0].function.parsed_arguments == look(at="x")


def test_several_choices_call_each_for_itself(hermes_server: Server) -> None:
    messages = said(hermes(("look", '{"at": "x"}')))
    reply = chat(hermes_server).create(model="", messages=messages, tools=[tool()], n=3)
    ids = {choice.message.tool_calls[0].id for choice in reply.choices}
    assert len(ids) == 3


def test_what_is_no_call_comes_as_it_is(hermes_server: Server) -> None:
    for text in ("<tool_call>\nno\n</tool_call>", hermes(("fly", "{}")), "a <tool b"):
        reply = chat(hermes_server).create(model="", messages=said(text), tools=[tool()])
        assert reply.choices[0].message.content == text and reply.choices[0].message.tool_calls is None


def test_a_call_cut_off_is_a_partial_call(hermes_server: Server) -> None:
    messages = said(hermes(("look", '{"at": "x"}')))
    reply = chat(hermes_server).create(model="", messages=messages, tools=[tool()], max_tokens=50)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.tool_calls[0].function.arguments == '{"at": "'


def test_without_tools_a_call_is_text(hermes_server: Server) -> None:
    text = hermes(("look", '{"at": "x"}'))
    for fields in ({}, {"tools": [tool()], "tool_choice": "none"}):
        reply = chat(hermes_server).create(model="", messages=said(text), **fields)
        assert reply.choices[0].message.content == text


def test_tools_in_the_prompt_are_counted_and_large_ones_refused(hermes_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool(description="words " * 300)]}
    status, reply = hermes_server.invoke(body, "/chat_tokenize")
    assert status == 200 and "words words" in reply["templated_text"]
    status, reply = hermes_server.invoke(
        {**body, "tools": [tool(description="w" * 5000)]}, "/v1/chat/completions"
    )
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


def test_nothing_of_tools_or_calls_is_logged(hermes_server: Server) -> None:
    messages = said(f"{SECRET} " + hermes(("look", f'{{"at": "{SECRET}"}}')))
    fields: Any = {"model": "", "messages": messages, "tools": [tool(description=SECRET)]}
    assert chat(hermes_server).create(**fields).choices[0].message.tool_calls
    with pytest.raises(openai.BadRequestError) as caught:
        chat(hermes_server).create(**fields, tool_choice={"type": "function", "function": {"name": SECRET}})
    assert SECRET not in str(caught.value)
    assert SECRET not in hermes_server.log


def test_a_mark_that_leaves_no_text_still_begins_calls(mistral_server: Server) -> None:
    call = '{"name": "look", "arguments": {"at": "x"}}'
    text = f"Yes.[TOOL_CALLS][{call}, {call.replace('x', 'y')}]"
    fields: Any = {"model": "", "messages": said(text, CALLS), "tools": [tool()]}
    reply = chat(mistral_server).create(**fields)
    (choice,) = reply.choices
    assert choice.message.content == "Yes."
    assert [json.loads(call.function.arguments)["at"] for call in choice.message.tool_calls] == ["x", "y"]
    with chat(mistral_server).stream(**fields) as events:
        final = events.get_final_completion()
    assert len(final.choices[0].message.tool_calls) == 2
    letters = chat(mistral_server).create(**{**fields, "messages": said(text)})
    assert letters.choices[0].message.content == text, "letters that spell the mark are not the mark"


def test_long_call_ids_come_back_through_a_template_that_takes_short_ones(mistral_server: Server) -> None:
    call = {"id": "call_0123456789abcdef01234567", "type": "function"}
    messages = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "tool_calls": [{**call, "function": {"name": "look", "arguments": '{"at": "x"}'}}],
        },
        {"role": "tool", "tool_call_id": call["id"], "content": "seen"},
        *said("Done.", CALLS),
    ]
    reply = chat(mistral_server).create(model="", messages=messages, tools=[tool()])
    assert reply.choices[0].message.content == "Done."


def test_a_template_that_ignores_tools_says_so(server: Server) -> None:
    assert SPECIAL, "the samples are there"
    body = {"messages": said("hi"), "tools": [tool()]}
    status, reply = server.invoke(body)
    assert (status, reply["error"]["code"]) == (400, "tools_unsupported")
    text = '[{"name": "look", "arguments": {"at": "x"}}]'
    forced = chat(server).create(
        model="", messages=said(text), tools=[tool()], tool_choice="required", parallel_tool_calls=False
    )
    assert forced.choices[0].message.tool_calls[0].function.name == "look"
