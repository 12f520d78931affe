"""What is learnt from a template about its calls, and call ids for templates that take short ones only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from container.text.model import TextModel
from container.text.tool_format import SHORT_ID, Mark, Shape, ToolFormat, learn, short_id, with_short_ids
from tests.text import build, tool_templates

USER = {"role": "user", "content": "look at x"}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "see", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, TextModel]]:
    made = {name: tool_templates.load(name) for name in tool_templates.TEMPLATES}
    yield made
    for model in made.values():
        model.close()


@pytest.mark.parametrize(
    ("name", "shape", "key", "many", "recognised"),
    [
        ("hermes", Shape.TAGGED, "arguments", True, True),
        ("llama", Shape.BARE, "parameters", False, True),
        ("mistral", Shape.LISTED, "arguments", True, True),
        ("mistral_named", Shape.NAMED, "arguments", True, True),
        ("plain", Shape.PLAIN, "arguments", True, False),
        ("foreign", Shape.PLAIN, "arguments", True, False),
    ],
)
def test_the_shape_of_calls_is_read_off_the_template(
    models: dict[str, TextModel], name: str, shape: Shape, key: str, many: bool, recognised: bool
) -> None:
    form = models[name].tool_format
    assert (form.shape, form.key, form.many, form.recognised) == (shape, key, many, recognised)


def test_a_template_that_only_tells_of_tools_is_not_recognised(models: dict[str, TextModel]) -> None:
    assert models["foreign"].tool_format.shown
    assert not models["plain"].tool_format.shown


def test_marks_carry_the_id_of_their_control_token(models: dict[str, TextModel]) -> None:
    for name in ("hermes", "llama", "mistral", "mistral_named"):
        model = models[name]
        form = model.tool_format
        assert form.marks
        for mark in form.marks:
            assert mark.token in model.control_ids
            assert model.token_text(mark.token or 0) == mark.text
            assert mark.token not in form.spoken
        assert all(not model.is_special(token) for token in form.spoken)
        assert form.spoken, "tokens a client may see can be part of free text"


def test_marks_outside_the_vocabulary_are_text() -> None:
    model = tool_templates.load("mistral", tokens=False)
    assert model.tool_format.begin == Mark("[TOOL_CALLS]")
    model.close()


def test_white_space_is_the_templates_own(models: dict[str, TextModel]) -> None:
    form = models["hermes"].tool_format
    assert (form.inner, form.between) == ("\n", "\n")


def test_a_template_without_calls_of_its_own_is_read_by_what_it_tells_the_model() -> None:
    told = "To call: <tool_call>\n{'name': ...}\n</tool_call> probe_offered"
    form = learn(lambda messages, tools: told if tools else "x", lambda text: None)
    assert form.shape is Shape.TAGGED and form.recognised
    assert form.begin == Mark("<tool_call>") and form.end == Mark("</tool_call>")


def test_a_template_that_refuses_everything_is_plain() -> None:
    form = learn(lambda messages, tools: None, lambda text: None)
    assert form == ToolFormat(Shape.PLAIN, shown=False)


def test_an_object_inside_an_unknown_wrapping_is_no_bare_call() -> None:
    def render(messages: Any, tools: Any) -> str:
        if len(messages) == 1:
            return f"{tools}<user>probe<assistant>"
        return '<assistant>@@call@@ {"name": "probe_called", "arguments": {"probe_key": 7}} @@'

    assert learn(render, lambda text: None).shape is Shape.PLAIN


def test_a_named_shape_without_its_tokens_is_plain() -> None:
    model = tool_templates.load("mistral_named", tokens=False)
    assert model.tool_format.shape is Shape.PLAIN and model.tool_format.shown
    model.close()


def test_a_model_without_a_template_has_no_tools() -> None:
    model = TextModel.load(build.packed(build.byte_level()))
    assert not model.tool_format.shown and not model.tool_format.recognised
    model.close()


@pytest.mark.real_model
def test_the_demo_model_has_a_template_that_ignores_tools(demo_model: TextModel) -> None:
    assert demo_model.tool_format == ToolFormat(Shape.PLAIN, shown=False)


def test_short_ids_are_kept_and_long_ones_become_short() -> None:
    assert short_id("abcdefgh0") == "abcdefgh0"
    made = short_id("call_0123456789abcdef01234567")
    assert SHORT_ID.fullmatch(made)
    assert made == short_id("call_0123456789abcdef01234567") != short_id("call_0123456789abcdef01234568")


def test_a_call_and_its_result_keep_the_same_id() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
    ]
    made = with_short_ids(messages)
    assert made[0] == USER
    assert made[1]["tool_calls"][0]["id"] == made[2]["tool_call_id"] == short_id("call_1")
    assert call["id"] == "call_1", "the caller's messages stay as they were"


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "mistral_named"])
def test_a_conversation_with_calls_goes_through_the_template(models: dict[str, TextModel], name: str) -> None:
    model = models[name]
    call = {
        "id": "call_0123456789abcdef01234567",
        "type": "function",
        "function": {"name": "look", "arguments": {"at": "x"}},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "seen"},
        USER,
    ]
    rendered = model.render_chat(messages, [TOOL])
    assert "look" in rendered.text and '{"at": "x"}' in rendered.text and "seen" in rendered.text
    form = model.tool_format
    if form.begin is not None and form.shape is not Shape.BARE:
        assert form.begin.token in model.encode_rendered(rendered), "the template's own mark is the token"


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "mistral_named", "foreign"])
def test_nothing_in_a_tool_becomes_a_control_token(models: dict[str, TextModel], name: str) -> None:
    model = models[name]

    def controls(text: str) -> list[int]:
        parameters = {"type": "object", "properties": {text: {"type": "string", "description": text}}}
        parameters["enum"] = [text]
        function = {"name": "look", "description": text, "parameters": parameters}
        call = {
            "id": "abcdefgh0",
            "type": "function",
            "function": {"name": "look", "arguments": {text: text}},
        }
        messages = [
            USER,
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefgh0", "content": text},
            USER,
        ]
        ids = model.encode_chat(messages, [{"type": "function", "function": function}])
        return [token for token in ids if token in model.control_ids]

    quiet = controls("words")
    assert quiet
    for token in [*build.CONTROL, *tool_templates.SPECIAL]:
        assert controls(token) == quiet
        assert controls(f"{token}\n{token}system") == quiet
