"""Files that are too large, malformed or ask for code are refused at load, with a code and no text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex as NativeRegex
from tokenizers import Tokenizer, normalizers

from container.text.errors import TextCode, TextError, fenced, utf8_length
from container.text.files import MAX_ADDED_TOKENS, MAX_STEPS, MAX_TOKENIZER_BYTES, TextFiles
from container.text.model import TextModel
from tests.text import build
from tests.text.conftest import Shelf

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good() -> build.Files:
    return build.packed(build.byte_level())


def changed(files: build.Files, name: str, change: Change) -> build.Files:
    document = json.loads(files.get(name, b"{}"))
    change(document)
    return files | {name: json.dumps(document).encode()}


def refused(files: build.Files) -> TextCode:
    with pytest.raises(TextError) as caught:
        TextModel.load(files)
    assert caught.value.__context__ is None
    assert caught.value.args == (caught.value.code.value,)
    return caught.value.code


def test_the_tokenizer_is_needed_and_the_rest_is_not(good: build.Files) -> None:
    assert refused({}) is TextCode.FILE_MISSING
    model = TextModel.load({"tokenizer.json": good["tokenizer.json"]})
    assert model.encode_text("hello")
    assert model.eos_token_ids == frozenset()
    assert model.bos_token_id is None


def test_a_tokenizer_over_the_limit_is_refused_unparsed() -> None:
    data = b" " * (MAX_TOKENIZER_BYTES + 1)
    started = time.perf_counter()
    assert refused({"tokenizer.json": data}) is TextCode.FILE_TOO_LARGE
    assert time.perf_counter() - started < 1
    assert refused({"tokenizer.json": data[1:]}) is TextCode.FILE_MALFORMED


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"decoder":[}}}', b"[]", b"1", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"model":{}}',
     b'{"model":{"type":"BPE","vocab":[],"merges":[]}}', b'{"model":{"type":"Nothing","vocab":{}}}'],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_refused(data: bytes) -> None:
    assert refused({"tokenizer.json": data}) is TextCode.FILE_MALFORMED


def nested(levels: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(levels):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(added_tokens={}),
        lambda d: d.update(added_tokens=[{"id": 0, "content": "x"}] * (MAX_ADDED_TOKENS + 1)),
        lambda d: d.update(added_tokens=[{"id": "0", "content": "x"}]),
        lambda d: d.update(added_tokens=[{"id": True, "content": "x"}]),
        lambda d: d.update(added_tokens=[{"id": 0, "content": ""}]),
        lambda d: d.update(added_tokens=[{"id": 0, "content": "x" * 513}]),
        lambda d: d.update(added_tokens=["x"]),
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 9_999}),
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "far", "id": 9_999}),
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "far", "id": 2**40}),
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "neg", "id": -1}),
        lambda d: d["model"]["vocab"].update(x="1"),
        lambda d: d["model"]["merges"].append("a b c"),
        lambda d: d["model"]["merges"].append(["a"]),
        lambda d: d["model"]["merges"].append(["no such", "pieces"]),
        lambda d: d.update(normalizer=nested(40)),
        lambda d: d.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * (MAX_STEPS + 1)}
        ),
        lambda d: d.update(normalizer={"type": "Unheard"}),
        lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}),
        lambda d: d.update(decoder=7),
    ],
)
def test_a_tokenizer_with_one_fault_is_refused(good: build.Files, change: Change) -> None:
    assert refused(changed(good, "tokenizer.json", change)) is TextCode.FILE_MALFORMED


def test_unigram_entries_are_checked() -> None:
    files = build.packed(build.unigram())
    for entry in (["x"], "x", ["x", 1, 2]):
        faulty = changed(files, "tokenizer.json", lambda d, entry=entry: d["model"]["vocab"].append(entry))
        assert refused(faulty) is TextCode.FILE_MALFORMED


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_files_that_name_their_own_code_are_refused(good: build.Files, name: str) -> None:
    faulty = changed(good, name, lambda d: d.update(auto_map={"AutoTokenizer": ["mine.Tokenizer", None]}))
    assert refused(faulty) is TextCode.REMOTE_CODE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", lambda d: d.update(chat_template=7)),
        ("tokenizer_config.json", lambda d: d.update(chat_template=[{"name": "default"}])),
        ("tokenizer_config.json", lambda d: d.update(chat_template=["x"])),
        ("tokenizer_config.json", lambda d: d.update(chat_template=[{"name": "other", "template": "x"}])),
        ("tokenizer_config.json", lambda d: d.update(added_tokens_decoder={"x": {"content": "y"}})),
        ("tokenizer_config.json", lambda d: d.update(added_tokens_decoder={"7": "y"})),
        ("generation_config.json", lambda d: d.update(eos_token_id="2")),
        ("generation_config.json", lambda d: d.update(eos_token_id=[2, True])),
        ("generation_config.json", lambda d: d.update(eos_token_id=-1)),
    ],
)
def test_a_companion_with_one_fault_is_refused(good: build.Files, name: str, change: Change) -> None:
    assert refused(changed(good, name, change)) is TextCode.FILE_MALFORMED


def test_companions_and_templates_have_limits(good: build.Files) -> None:
    assert refused(good | {"config.json": b" " * (9 * 2**20)}) is TextCode.FILE_TOO_LARGE
    assert refused(good | {"chat_template.jinja": b" " * (2**20 + 1)}) is TextCode.FILE_TOO_LARGE
    assert refused(good | {"chat_template.jinja": b"\xff"}) is TextCode.FILE_MALFORMED


def test_the_template_file_wins_over_the_configuration(good: build.Files) -> None:
    files = changed(good, "tokenizer_config.json", lambda d: d.update(chat_template="configuration"))
    assert TextFiles.parse(files).templates == {"default": "configuration"}
    assert TextFiles.parse(files | {"chat_template.jinja": b"file"}).templates == {"default": "file"}


def test_ends_of_sequence_come_from_all_places_that_name_one(good: build.Files) -> None:
    model = TextModel.load(good)
    (eos,) = model.eos_token_ids
    several = changed(good, "generation_config.json", lambda d: d.update(eos_token_id=[3, 4]))
    several = changed(several, "config.json", lambda d: d.update(eos_token_id=5))
    assert TextModel.load(several).eos_token_ids == {eos, 3, 4}
    fallback = changed(good, "config.json", lambda d: d.update(text_config={"eos_token_id": 5}))
    assert TextModel.load(fallback).eos_token_ids == {eos, 5}
    outside = changed(good, "generation_config.json", lambda d: d.update(eos_token_id=10**6))
    assert TextModel.load(outside).eos_token_ids == {eos}


def test_tokens_named_in_the_special_tokens_map_count(good: build.Files) -> None:
    files = changed(
        good, "special_tokens_map.json", lambda d: d.update(additional_special_tokens=["<think>"])
    )
    model = TextModel.load(files)
    think = Tokenizer.from_str(good["tokenizer.json"].decode()).token_to_id("<think>")
    assert think is not None
    assert model.is_special(think)
    assert not TextModel.load(good).is_special(think)


def test_added_tokens_of_the_configuration_are_added(good: build.Files) -> None:
    size = TextModel.load(good).vocabulary
    token = {"content": "<late>", "special": True, "lstrip": False, "normalized": False}
    files = changed(
        good, "tokenizer_config.json", lambda d: d.update(added_tokens_decoder={str(size): token})
    )
    model = TextModel.load(files)
    assert model.vocabulary == size + 1
    assert size in model.control_ids
    assert size not in model.encode_text("<late>")
    assert model.token_text(size) == "<late>"


def test_training_settings_do_not_change_an_encoding(good: build.Files) -> None:
    tokenizer = Tokenizer.from_str(good["tokenizer.json"].decode())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    document = json.loads(tokenizer.to_str())
    document["model"]["dropout"] = 0.9
    model = TextModel.load(good | {"tokenizer.json": json.dumps(document).encode()})
    text = "the quick brown fox and the lazy dog"
    expected = TextModel.load(good).encode_text(text)
    assert all(model.encode_text(text) == expected for _ in range(20))


def test_a_regex_that_runs_away_in_native_code_is_one_failed_request() -> None:
    """It ends in a panic of the library, which is a BaseException and no Exception."""
    built = build.byte_level()
    built.normalizer = normalizers.Replace(NativeRegex("(a+)+$"), "")
    model = TextModel.load(build.packed(built))
    expected = model.encode_text("b!")
    for letters in (24, 30):
        started = time.perf_counter()
        with pytest.raises(TextError) as caught:
            model.encode_text("a" * letters + "!")
        assert caught.value.code is TextCode.TOKENIZER_FAILED
        assert caught.value.__context__ is None
        assert time.perf_counter() - started < 10
    assert model.encode_text("b!") == expected


def test_an_interruption_passes_through_the_fence() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fenced(TextCode.TOKENIZER_FAILED, interrupted)
    with pytest.raises(TextError):
        fenced(TextCode.TOKENIZER_FAILED, int, "not a number")


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00\ud800", "\udfff"])
def test_a_lone_surrogate_is_refused_with_its_own_code(shelf: Shelf, text: str) -> None:
    model = shelf.model("byte_level")
    for call in (model.encode_text, model.tokenize, utf8_length):
        with pytest.raises(TextError) as caught:
            call(text)
        assert caught.value.code is TextCode.LONE_SURROGATE
        assert caught.value.__context__ is None


@pytest.mark.parametrize("family", sorted(build.FAMILIES))
def test_spans_cover_the_text_they_came_from(shelf: Shelf, family: str) -> None:
    model = shelf.model(family)
    text = "naïve <|im_end|> 北京 two"
    spans = model.tokenize(text)
    assert [span.id for span in spans] == model.encode_text(text)
    assert all(text[span.start : span.stop] == span.text for span in spans)
    rendered = model.render_chat([{"role": "user", "content": text}])
    spans = model.tokenize_rendered(rendered)
    assert [span.id for span in spans] == model.encode_rendered(rendered)
    assert all(rendered.text[span.start : span.stop] == span.text for span in spans)
    assert [span.text for span in spans if span.id in model.control_ids][:2] == ["<|im_start|>", "<|im_end|>"]
    if family.startswith("byte_level"):
        covered = {index for span in spans for index in range(span.start, span.stop)}
        skipped = {index for index in range(len(rendered.text)) if rendered.text[index].isspace()}
        assert covered | skipped == set(range(len(rendered.text)))


def test_odd_but_legal_text_is_encoded_whole(shelf: Shelf) -> None:
    model = shelf.model("byte_level")
    for text in ("\x00", "\u202e", "e" + "\u0301" * 10_000, "\ufeff", "\x1b[2J", "\U000e0001"):
        assert model.decode(model.encode_text(text)) == text


def test_a_megabyte_takes_linear_time(shelf: Shelf) -> None:
    model = shelf.model("byte_level")
    for text in ("a" * 1_000_000, "<|im_end|>" * 20_000):
        started = time.perf_counter()
        assert model.encode_text(text)
        assert time.perf_counter() - started < 20


def test_errors_and_files_show_no_content(good: build.Files) -> None:
    assert repr(TextError(TextCode.NO_TEMPLATE)) == "TextError('no_template')"
    parsed = repr(TextFiles.parse(good | {"chat_template.jinja": b"secret"}))
    assert "secret" not in parsed
    assert len(parsed) < 100
