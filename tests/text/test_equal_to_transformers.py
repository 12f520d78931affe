"""Ordinary conversations get the ids that transformers gives, for every family and every template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from container.text.model import TextModel
from tests.text import build
from tests.text.conftest import Shelf

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place, <b>now</b> & 'later'",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "  leading and trailing spaces \n"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "naïve café, Straße, Москва, 北京, 😀 👩‍👩‍👧 🇫🇷\n\n\ttabs\n"},
    ],
    [
        {"role": "user", "content": "def main():\n    return {'a': [1, 2]}  # <b> | im_start </x>"},
        {"role": "assistant", "content": "a", "name": None},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " \n "},
        {"role": "user", "content": "x" * 700 + " 1234567890" * 40},
    ],
]


def reference(files: build.Files, directory: Path, template: str) -> PreTrainedTokenizerFast:
    path = directory / "tokenizer.json"
    path.write_bytes(files["tokenizer.json"])
    named = json.loads(files["tokenizer_config.json"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **named)
    tokenizer.chat_template = template
    return tokenizer


def expected(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("template", sorted(build.TEMPLATES))
@pytest.mark.parametrize("family", sorted(build.FAMILIES))
def test_a_benign_conversation_has_the_same_ids(
    shelf: Shelf, tmp_path: Path, family: str, template: str
) -> None:
    model = shelf.model(family, template)
    tokenizer = reference(shelf.files(family), tmp_path, build.TEMPLATES[template])
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            ids = model.encode_chat(messages, add_generation_prompt=prompt)
            assert ids == expected(tokenizer, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("family", ["byte_level", "metaspace", "legacy_sentencepiece", "unigram"])
def test_a_hundred_random_conversations_have_the_same_ids(shelf: Shelf, tmp_path: Path, family: str) -> None:
    model = shelf.model(family, "headers")
    tokenizer = reference(shelf.files(family), tmp_path, build.TEMPLATES["headers"])
    dice = random.Random(7)
    alphabet = "abc  \n\t.,é北😀<>|[]/_ş\u200d\ufeff0\u0301"
    for _ in range(100):
        messages = [
            {"role": role, "content": "".join(dice.choices(alphabet, k=dice.randrange(40)))}
            for role in dice.choices(["user", "assistant", "system"], k=dice.randrange(1, 5))
        ]
        assert model.encode_chat(messages) == expected(tokenizer, messages, add_generation_prompt=True)


def test_tools_arguments_and_reasoning_have_the_same_ids(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.model("byte_level", "reasoning")
    tokenizer = reference(shelf.files("byte_level"), tmp_path, build.TEMPLATES["reasoning"])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "n": 1.5}}}
    messages = [
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": "1"},
        {"role": "assistant", "content": "It rains."},
    ]
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        ids = model.encode_chat(messages, TOOLS, template_kwargs=options)
        assert ids == expected(tokenizer, messages, tools=TOOLS, add_generation_prompt=True, **options)


def test_reasoning_in_an_earlier_answer_is_still_found_by_the_template(shelf: Shelf) -> None:
    """The template compares the client's text with a control token: equality must not depend on origin."""
    model = shelf.model("byte_level", "reasoning")
    answered = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nthe secret thought\n</think>\n\nthe answer"},
        {"role": "user", "content": "again"},
    ]
    text = model.render_chat(answered).text
    assert "the answer" in text
    assert "the secret thought" not in text


@pytest.mark.parametrize("template", ["chatml", "headers", "turns", "reasoning"])
@pytest.mark.parametrize("ending", ["The answer is", "The answer is ", " \nThe answer\n is \n"])
def test_a_continued_final_message_has_the_same_ids(
    shelf: Shelf, tmp_path: Path, template: str, ending: str
) -> None:
    model = shelf.model("byte_level", template)
    tokenizer = reference(shelf.files("byte_level"), tmp_path, build.TEMPLATES[template])
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ending}]
    ids = model.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ids == expected(tokenizer, messages, continue_final_message=True)


def test_the_tool_template_serves_requests_with_tools(shelf: Shelf) -> None:
    templates = [
        {"name": "default", "template": "<|user|>{{ messages[0].content }}"},
        {"name": "tool_use", "template": "<|tool|>{{ tools | length }}{{ messages[0].content }}"},
    ]
    files = build.packed(build.byte_level(), {"chat_template": templates})
    model = TextModel.load(files)
    try:
        question = [{"role": "user", "content": "hi"}]
        assert model.render_chat(question).text == "<|user|>hi"
        assert model.render_chat(question, TOOLS).text == "<|tool|>1hi"
    finally:
        model.close()


def test_the_beginning_of_sequence_is_written_once(shelf: Shelf) -> None:
    model = shelf.model("metaspace", "headers")
    bos = model.bos_token_id
    ids = model.encode_chat([{"role": "user", "content": "<s> hi <s>"}])
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_raw_text_is_wrapped_as_the_post_processor_does(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    for single in ("<s> $A", "$A", "<s> $A </s>"):
        built = build.metaspace()
        ids = [(content, built.token_to_id(content)) for content in ("<s>", "</s>")]
        built.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        files = build.packed(built)
        model = TextModel.load(files)
        tokenizer = reference(files, tmp_path, "")
        for text in ("hello", "", " two  words ", "é北😀"):
            assert model.encode_text(text) == tokenizer(text)["input_ids"]
            assert [span.id for span in model.tokenize(text)] == tokenizer(text)["input_ids"]
        assert model.encode_text("<s><s></s>").count(ids[0][1]) == single.count("<s>")


@pytest.mark.parametrize(
    "flags", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]
)
def test_flags_of_the_configuration_replace_the_post_processor(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    files = build.packed(build.metaspace(), flags)
    assert TextModel.load(files).encode_text("hello") == reference(files, tmp_path, "")("hello")["input_ids"]


@pytest.mark.real_model
def test_the_demo_model_has_the_same_ids_as_transformers(
    demo_checkpoint: Path, demo_model: TextModel
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint, local_files_only=True)
    for messages in CONVERSATIONS:
        assert demo_model.encode_chat(messages) == expected(tokenizer, messages, add_generation_prompt=True)
        for message in messages:
            assert demo_model.encode_text(message["content"]) == tokenizer(message["content"])["input_ids"]
    ends = GenerationConfig.from_pretrained(demo_checkpoint, local_files_only=True).eos_token_id
    assert demo_model.eos_token_ids == {tokenizer.eos_token_id, *ends}
