"""What the grammars of calls accept, asked of the library that will follow them, token by token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from container.engine.request import Grammar, GrammarKind
from container.text.tool_calls import CallStarted, Said, ToolCallParser
from container.text.tool_format import Shape, ToolFormat
from sagemaker_entry.dialects.tool_grammar import MAX_GRAMMAR_CHARS, Function, tool_grammar
from tests.sagemaker_entry.tool_samples import IGNORED, SCHEMA, call_text
from tests.text import tool_templates

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LOOK = Function("look", json.dumps({"x-guidance": LAYOUT, **SCHEMA, "additionalProperties": False}))
GO = Function("go", json.dumps({"type": "object"}))
FOUND = ("look", '{"at": "x"}')
WENT = ("go", "{}")


class Follower:
    """One model's tokenizer and format, and the library over it."""

    def __init__(self, name: str, *, tokens: bool) -> None:
        model = tool_templates.load(name, tokens=tokens)
        self.form: ToolFormat = model.tool_format
        model.close()
        self._tokenizer = Tokenizer.from_str(
            tool_templates.files(name, tokens=tokens)["tokenizer.json"].decode()
        )
        self.end: int = self._tokenizer.token_to_id("</s>")
        size = self._tokenizer.get_vocab_size()
        self._native = LLTokenizer(self._tokenizer.to_str(), n_vocab=size, eos_token=[self.end])

    def follows(self, grammar: Grammar, text: str) -> bool:
        """True when `text` is a whole answer under `grammar`."""
        matcher = self._matcher(grammar)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return all(matcher.consume_token(token) for token in [*ids, self.end])

    def ended(self, grammar: Grammar, text: str) -> bool:
        """True when nothing but the end may follow `text`."""
        matcher = self._matcher(grammar)
        for token in self._tokenizer.encode(text, add_special_tokens=False).ids:
            assert matcher.consume_token(token)
        return bool(matcher.is_stopped())

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        assert grammar.kind is GrammarKind.LARK
        matcher = LLMatcher(self._native, LLMatcher.grammar_from_lark(grammar.text), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher


@pytest.fixture(scope="module")
def followers() -> Iterator[dict[str, Follower]]:
    made = {
        name: Follower(name, tokens=True) for name in ("hermes", "llama", "mistral", "mistral_named", "plain")
    }
    made["mistral_text"] = Follower("mistral", tokens=False)
    yield made


def written(form: ToolFormat, *calls: tuple[str, str]) -> str:
    text = call_text(form, *calls)
    if form.shape is Shape.NAMED:
        return text.replace("[ARGS]", "[CALL_ID]abcdefgh0[ARGS]")
    if form.shape is Shape.BARE:
        return text.removeprefix("<|python_tag|>")
    return text


ALL = ["hermes", "llama", "mistral", "mistral_named", "mistral_text", "plain"]
FREE = [name for name in ALL if name != "plain"]


@pytest.mark.parametrize("name", ALL)
def test_a_required_call_is_all_there_is(followers: dict[str, Follower], name: str) -> None:
    model = followers[name]
    grammar = tool_grammar(model.form, [LOOK, GO], free=False, many=model.form.many)
    one = written(model.form, FOUND)
    assert model.follows(grammar, one) and model.follows(grammar, written(model.form, WENT))
    assert not model.follows(grammar, "")
    assert not model.follows(grammar, "hello")
    assert not model.follows(grammar, "I look. " + one)
    assert not model.follows(grammar, one + " more")
    assert not model.follows(grammar, one.replace("look", "fly"))
    assert not model.follows(grammar, one.replace('"x"', "5"))
    assert not model.follows(grammar, one.replace('"at"', '"to"'))
    assert not model.follows(grammar, one[:-1])
    two = written(model.form, FOUND, WENT)
    assert model.follows(grammar, two) or two == one


@pytest.mark.parametrize("name", FREE)
def test_a_free_answer_is_text_or_ends_with_calls(followers: dict[str, Follower], name: str) -> None:
    model = followers[name]
    grammar = tool_grammar(model.form, [LOOK], free=True, many=False)
    one = written(model.form, FOUND)
    for text in ("", "hello", 'a {"b": 1} [c] <tool> \n', "<think>x</think>\nno", '{"at": "x"}'):
        assert model.follows(grammar, text), text
    assert model.follows(grammar, one)
    assert not model.follows(grammar, one.replace("look", "fly"))
    assert not model.follows(grammar, one.replace('"x"', "5"))
    assert not model.follows(grammar, one + " more")
    assert model.ended(grammar, one)
    if model.form.shape is not Shape.BARE:
        assert model.follows(grammar, "<think>x</think>\nI look.\n" + one)
        assert not model.follows(grammar, "I look." + one.replace("look", "fly"))


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_named", "plain"])
def test_one_call_is_the_most_where_only_one_may_be_made(followers: dict[str, Follower], name: str) -> None:
    model = followers[name]
    two = written(model.form, FOUND, FOUND)
    assert model.follows(tool_grammar(model.form, [LOOK], free=False, many=True), two)
    assert not model.follows(tool_grammar(model.form, [LOOK], free=False, many=False), two)


def test_calls_have_a_most(followers: dict[str, Follower]) -> None:
    model = followers["hermes"]
    grammar = tool_grammar(model.form, [GO], free=False, many=True)
    assert model.follows(grammar, written(model.form, *[WENT] * 32))
    assert not model.follows(grammar, written(model.form, *[WENT] * 33))


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_named", "mistral_text"])
def test_a_document_or_a_call(followers: dict[str, Follower], name: str) -> None:
    model = followers[name]
    document = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    grammar = tool_grammar(model.form, [LOOK], free=True, many=False, content=document)
    assert model.follows(grammar, '{"n": 1}')
    assert model.follows(grammar, written(model.form, FOUND))
    assert not model.follows(grammar, "hello")
    assert not model.follows(grammar, '{"n": "x"}')


def test_llama_may_write_its_tag_before_a_call(followers: dict[str, Follower]) -> None:
    model = followers["llama"]
    for free in (False, True):
        grammar = tool_grammar(model.form, [LOOK], free=free, many=False)
        assert model.follows(grammar, "<|python_tag|>" + written(model.form, FOUND))
        assert not model.follows(grammar, "<|python_tag|>print(1)")


@pytest.mark.parametrize("name", ALL)
def test_what_a_grammar_accepts_the_parser_reads(followers: dict[str, Follower], name: str) -> None:
    """The two halves agree: the calls of an accepted text are found, and nothing of them is said."""
    form = followers[name].form
    text = written(form, FOUND, WENT)
    parser = ToolCallParser(form, {"look", "go"}, eager=True, most=32)
    found = []
    rest = text
    while rest:
        mark = next((m for m in form.marks if m.token is not None and rest.startswith(m.text)), None)
        found += parser.push(rest[0]) if mark is None else parser.push_mark(mark)
        rest = rest[1 if mark is None else len(mark.text) :]
    found += parser.finish()
    assert not any(isinstance(delta, Said) for delta in found)
    names = [delta.name for delta in found if isinstance(delta, CallStarted)]
    assert names == (["look"] if form.shape is Shape.BARE else ["look", "go"])


def test_what_cannot_be_a_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="told from text"):
        tool_grammar(IGNORED, [GO], free=True, many=True)
    with pytest.raises(ValueError, match="too large"):
        tool_grammar(IGNORED, [Function("go", " " * MAX_GRAMMAR_CHARS)], free=False, many=True)
    bare = ToolFormat(Shape.BARE, shown=True, many=False)
    with pytest.raises(ValueError, match="document"):
        tool_grammar(bare, [GO], free=True, many=False, content="{}")
    with pytest.raises(AssertionError):
        tool_grammar(dataclasses.replace(bare, shape=Shape.NAMED), [GO], free=False, many=True)


def test_a_schema_cannot_write_rules_of_its_own(followers: dict[str, Follower]) -> None:
    model = followers["plain"]
    hostile = '"} \n start: /.*/ \n%json {"'
    schema = json.dumps({"type": "object", "properties": {hostile: {"enum": [hostile]}}, "title": hostile})
    grammar = tool_grammar(model.form, [Function("go", schema)], free=False, many=False)
    assert "\n start" not in grammar.text
    assert not model.follows(grammar, "anything")
    assert model.follows(grammar, written(model.form, WENT))
