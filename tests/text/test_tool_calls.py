"""Calls taken out of answers: every cut of an answer gives the same, nothing is lost, nothing raises."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable

import pytest

from container.text.tool_calls import (
    MAX_HELD_SPACE,
    CallArguments,
    CallStarted,
    Said,
    ToolCallParser,
    ToolDelta,
)
from container.text.tool_format import Mark, Shape, ToolFormat

BEGIN = Mark("<tool_call>")
END = Mark("</tool_call>")
TAGGED = ToolFormat(Shape.TAGGED, shown=True, begin=BEGIN, end=END, inner="\n", between="\n")
LISTED = ToolFormat(Shape.LISTED, shown=True, begin=Mark("[TOOL_CALLS]"))
ENDED_LIST = ToolFormat(Shape.LISTED, shown=True, begin=BEGIN, end=END)
BARE = ToolFormat(Shape.BARE, shown=True, key="parameters", many=False)
PLAIN = ToolFormat(Shape.PLAIN, shown=False)
TOKENS = ToolFormat(Shape.TAGGED, shown=True, begin=Mark("<tool_call>", 7), end=Mark("</tool_call>", 8))
TOKEN_LIST = ToolFormat(Shape.LISTED, shown=True, begin=Mark("[TOOL_CALLS]", 7))
NAMED = ToolFormat(
    Shape.NAMED,
    shown=True,
    begin=Mark("[TOOL_CALLS]", 7),
    call_id=Mark("[CALL_ID]", 8),
    arguments=Mark("[ARGS]", 9),
)
TEXT_FORMS = [TAGGED, LISTED, ENDED_LIST, BARE, PLAIN]
NAMES = frozenset({"look", "go"})
LOOK = '{"name": "look", "arguments": {"at": [1, "}\\"<tool_call>"]}}'
GO = '{"name": "go", "arguments": {}}'
LOOKED = ("look", '{"at": [1, "}\\"<tool_call>"]}')
WENT = ("go", "{}")
Part = str | Mark


def parse(
    form: ToolFormat, parts: Iterable[Part], *, eager: bool = False, most: int = 32, hidden: bool = True
) -> list[ToolDelta]:
    parser = ToolCallParser(form, NAMES, eager=eager, most=most)
    found: list[ToolDelta] = []
    for part in parts:
        if isinstance(part, Mark):
            found += parser.push_mark(part, "" if hidden else part.text)
        else:
            found += parser.push(part)
    return found + parser.finish()


def folded(found: Iterable[ToolDelta]) -> tuple[str, list[tuple[str, str]]]:
    """Return what was said and called; checks the order of the deltas on the way."""
    said = ""
    calls: list[tuple[str, str]] = []
    for delta in found:
        if isinstance(delta, Said):
            assert delta.text
            said += delta.text
        elif isinstance(delta, CallStarted):
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        else:
            assert delta.index == len(calls) - 1, "arguments belong to the call announced last"
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return said, calls


def cut(text: str, dice: random.Random) -> list[str]:
    edges = sorted(dice.choices(range(len(text) + 1), k=dice.randrange(8)))
    return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (TAGGED, f"<tool_call>\n{LOOK}\n</tool_call>", "", [LOOKED]),
        (TAGGED, f"I look. \n\n<tool_call>\n{LOOK}\n</tool_call>", "I look.", [LOOKED]),
        (TAGGED, f"<tool_call>{LOOK}</tool_call>\n<tool_call>\n{GO}\n</tool_call>\n", "", [LOOKED, WENT]),
        (TAGGED, f"<tool_call>{LOOK}<tool_call>{GO}", "", [LOOKED, WENT]),
        (TAGGED, f"<tool_call>{LOOK}</tool_call> That was it.", " That was it.", [LOOKED]),
        (TAGGED, f"<tool_call>{LOOK}", "", [LOOKED]),
        (TAGGED, '<tool_call>{"arguments": {}, "id": 5, "name": "go"}</tool_call>', "", [WENT]),
        (TAGGED, '<tool_call>{"name": "go", "parameters": {}}</tool_call>', "", [WENT]),
        (TAGGED, '<tool_call>{"na\\u006de": "g\\u006f", "arguments": {}}</tool_call>', "", [WENT]),
        (LISTED, f"[TOOL_CALLS] [{LOOK}, {GO}]", "", [LOOKED, WENT]),
        (LISTED, f"Sure.[TOOL_CALLS][{LOOK}] ok", "Sure. ok", [LOOKED]),
        (ENDED_LIST, f"<tool_call>[{LOOK}]</tool_call>", "", [LOOKED]),
        (BARE, '{"name": "go", "parameters": {}}', "", [WENT]),
        (BARE, '\n {"name": "go", "parameters": {}}\n', "", [WENT]),
        (BARE, 'So: {"name": "go", "parameters": {}}', 'So: {"name": "go", "parameters": {}}', []),
        (PLAIN, f"[{LOOK},\n{GO}]", "", [LOOKED, WENT]),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_calls_are_found_and_the_rest_is_said(
    form: ToolFormat, text: str, said: str, calls: list[tuple[str, str]], eager: bool
) -> None:
    assert folded(parse(form, [text], eager=eager)) == (said, calls)
    assert folded(parse(form, text, eager=eager)) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call at all",
        "a < b and <tool is no mark",
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call> not json </tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "go"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "go", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "go", "arguments": []}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "go", "name": "go", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "go", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "go", "arguments": {"a": 1',
        '<tool_call>{"name": "' + "x" * 500 + '", "arguments": {}}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>[]</tool_call>",
        "</tool_call>",
        "  leading and trailing  \n",
        " ",
    ],
)
def test_what_is_no_call_is_content_to_the_last_character(text: str) -> None:
    assert folded(parse(TAGGED, [text])) == (text, [])
    assert folded(parse(TAGGED, text)) == (text, [])


def test_a_call_after_one_that_was_none_is_found() -> None:
    text = f"<tool_call>no <tool_call>{GO}</tool_call>"
    assert folded(parse(TAGGED, [text])) == ("<tool_call>no", [WENT])
    assert folded(parse(TAGGED, [f"<tool_call><tool_call>{GO}"])) == ("<tool_call>", [WENT])
    assert folded(parse(TAGGED, [f"<tool_call>{GO} <tool_call>{GO}"])) == ("", [WENT, WENT])


def test_half_a_mark_is_never_said_before_it_is_known_to_be_none() -> None:
    parser = ToolCallParser(TAGGED, NAMES, eager=True, most=32)
    said = ""
    text = f"Look \n<tool_call>{GO}</tool_call>"
    for char in text:
        for delta in parser.push(char):
            if isinstance(delta, Said):
                said += delta.text
        assert "Look".startswith(said)
    assert said == "Look"


def test_only_what_may_begin_a_mark_is_held() -> None:
    parser = ToolCallParser(TAGGED, NAMES, eager=True, most=32)

    def said(text: str) -> str:
        return "".join(delta.text for delta in parser.push(text) if isinstance(delta, Said))

    assert said("words") == "words"
    assert said(" ") == ""
    assert said("<to") == ""
    assert said("ols>") == " <tools>"
    assert said("\n" * (MAX_HELD_SPACE + 3)) == "\n" * 3


def test_arguments_come_as_they_are_written_when_held_to_a_grammar() -> None:
    parser = ToolCallParser(TAGGED, NAMES, eager=True, most=32)
    assert parser.push('<tool_call>\n{"name": "look", "arg') == []
    assert parser.push('uments": ') == []
    assert parser.push('{"a": "on') == [CallStarted(0, "look"), CallArguments(0, '{"a": "on')]
    assert parser.push('e"') == [CallArguments(0, 'e"')]
    assert parser.push("}") == [CallArguments(0, "}")]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


def test_without_a_grammar_a_call_comes_when_it_is_whole() -> None:
    parser = ToolCallParser(TAGGED, NAMES, eager=False, most=32)
    assert parser.push('<tool_call>\n{"name": "look", "arguments": {"a": "one"}') == []
    assert parser.push("}") == [CallStarted(0, "look"), CallArguments(0, '{"a": "one"}')]


def test_a_call_cut_off_under_a_grammar_keeps_what_it_has() -> None:
    text = '<tool_call>\n{"name": "look", "arguments": {"a": "on'
    assert folded(parse(TAGGED, [text], eager=True)) == ("", [("look", '{"a": "on')])
    for end in ("\n</tool", "\n</tool_call>\n<tool_c", '\n</tool_call>\n<tool_call>\n{"name": "l'):
        found = folded(parse(TAGGED, [f"<tool_call>{GO}{end}"], eager=True))
        assert found == ("", [WENT]), "only calls follow a call: the beginning of one is not content"


def test_calls_beyond_the_most_are_content() -> None:
    second = f"<tool_call>{LOOK}</tool_call>"
    assert folded(parse(TAGGED, [f"<tool_call>{GO}</tool_call>{second}"], most=1)) == (second, [WENT])
    assert folded(parse(PLAIN, [f"[{GO}, {LOOK}]"], most=1)) == (f", {LOOK}]", [WENT])


def test_a_mark_that_is_a_token_is_nothing_when_written_out() -> None:
    text = f"<tool_call>{GO}</tool_call>"
    assert folded(parse(TOKENS, [text])) == (text, [])
    assert TOKENS.begin is not None and TOKENS.end is not None
    assert folded(parse(TOKENS, ["so \n", TOKENS.begin, f"\n{GO}\n", TOKENS.end])) == ("so", [WENT])


def test_a_hidden_mark_stays_hidden_and_a_shown_one_shows_when_there_is_no_call() -> None:
    assert TOKENS.begin is not None
    parts: list[Part] = ["a ", TOKENS.begin, "no"]
    assert folded(parse(TOKENS, parts)) == ("a no", [])
    assert folded(parse(TOKENS, parts, hidden=False)) == ("a <tool_call>no", [])
    again: list[Part] = [TOKENS.begin, GO, TOKENS.begin, LOOK]
    assert folded(parse(TOKENS, again, most=1, hidden=False)) == (f"<tool_call>{LOOK}", [WENT])


def test_a_token_list_and_named_calls() -> None:
    assert TOKEN_LIST.begin is not None
    assert folded(parse(TOKEN_LIST, [TOKEN_LIST.begin, f"[{GO}, ", f"{LOOK}]"])) == ("", [WENT, LOOKED])
    begin, call_id, arguments = NAMED.marks
    assert folded(
        parse(NAMED, ["hm", begin, "go", arguments, "{}", begin, "lo", "ok", arguments, '{"a": 1}'])
    ) == (
        "hm",
        [WENT, ("look", '{"a": 1}')],
    )
    assert folded(parse(NAMED, [begin, "go", call_id, "abcdefgh0", arguments, "{}"])) == ("", [WENT])
    assert folded(parse(NAMED, [begin, "fly", arguments, "{}"])) == ("fly{}", [])
    assert folded(parse(NAMED, [begin, "go"])) == ("go", [])
    assert folded(parse(NAMED, [begin, "x" * 1000, arguments, "{}"])) == ("x" * 1000 + "{}", [])
    assert folded(parse(NAMED, [begin, begin, "go", arguments, "{", begin, "go", arguments, "{}"])) == (
        "go{",
        [WENT],
    )


ALPHABET = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", LOOK, GO, '{"name": "go"', '"arguments": {', "<tool",
    f"[TOOL_CALLS][{GO}", f"<tool_call>[{LOOK}]", f"<tool_call>{GO}", "[TOOL", "\n", " ", "x",
    '"', "{", "}", "[", "]", ",", ":", "\\", "1", "e", "null", "é", "</",
]  # fmt: skip


@pytest.mark.parametrize("form", TEXT_FORMS, ids=lambda form: form.shape.value + str(form.end is not None))
def test_every_cut_of_random_text_gives_the_same(form: ToolFormat) -> None:
    dice = random.Random(form.shape.value)
    called = 0
    for _ in range(400):
        opening = dice.choice(["", "", GO, f"[{LOOK}"])
        text = opening + "".join(dice.choices(ALPHABET, k=dice.randrange(1, 14)))
        for eager in (False, True):
            for most in (1, 32):
                whole = folded(parse(form, [text], eager=eager, most=most))
                assert folded(parse(form, cut(text, dice), eager=eager, most=most)) == whole, text
                assert folded(parse(form, text, eager=eager, most=most)) == whole, text
                called += len(whole[1])
                if not whole[1]:
                    assert whole[0] == text
                if not eager:
                    assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole[1])
    assert called > 20, "some of the texts must hold calls"


@pytest.mark.parametrize("form", [TOKENS, TOKEN_LIST, NAMED], ids=lambda form: form.shape.value)
def test_random_tokens_never_raise_and_every_cut_gives_the_same(form: ToolFormat) -> None:
    dice = random.Random(form.shape.value)
    texts = [*ALPHABET, "go", "look", "{}", f"[{GO}"]
    for _ in range(1500):
        parts: list[Part] = [
            dice.choice(form.marks) if dice.random() < 0.4 else dice.choice(texts)
            for _ in range(dice.randrange(1, 12))
        ]
        chars = [piece for part in parts for piece in ([part] if isinstance(part, Mark) else part)]
        for eager in (False, True):
            whole = folded(parse(form, parts, eager=eager))
            assert folded(parse(form, chars, eager=eager)) == whole


@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>",
        "<tool_call>{",
        f"<tool_call>{GO}",
        f"<tool_call>{GO} x",
        " ",
        "<",
        "</",
        '<tool_call>{"',
        "{[",
    ],
)
@pytest.mark.parametrize("pieces", [1, 5])
def test_hostile_answers_take_time_in_proportion(unit: str, pieces: int) -> None:
    def cpu_s(chars: int) -> float:
        text = unit * (chars // len(unit))
        parts = [text] if pieces == 1 else [text[i : i + pieces] for i in range(0, len(text), pieces)]
        began = time.process_time()
        parse(TAGGED, parts, eager=False, most=10**9)
        return time.process_time() - began

    least = {chars: min(cpu_s(chars) for _ in range(3)) for chars in (16_000, 160_000)}
    assert least[160_000] < 30 * least[16_000] + 0.1


def test_a_long_argument_in_small_pieces_takes_time_in_proportion() -> None:
    def cpu_s(chars: int) -> float:
        began = time.process_time()
        head = '<tool_call>{"x": "'
        parse(TAGGED, [head, *["abcd"] * (chars // 4)])
        return time.process_time() - began

    least = {chars: min(cpu_s(chars) for _ in range(3)) for chars in (40_000, 400_000)}
    assert least[400_000] < 40 * least[40_000] + 0.1


def test_no_delta_shows_its_text() -> None:
    for delta in (Said("secret"), CallStarted(0, "secret"), CallArguments(0, "secret")):
        assert "secret" not in repr(delta)
