"""Ids become text one at a time: whole characters, nothing twice, nothing lost."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from container.text.detok import ByteDetokenizer, ByteRules, ByteTable, WindowDetokenizer, byte_rules
from container.text.model import TextModel
from tests.text import build
from tests.text.conftest import Shelf

BYTE_FAMILIES = ["byte_level", "metaspace", "metaspace_always", "legacy_sentencepiece"]
TEXTS = [
    "",
    " ",
    "a",
    " a",
    "  two  spaces  ",
    "naïve café, Straße, Москва, 北京, 東京",
    "😀👩‍👩‍👧🇫🇷🏳️‍🌈👍🏽e\u0301\u0302" + "\u0323" * 40,
    "tab\tnew\nline\r\nNUL\x00 bell\x07 escape\x1b[31m",
    "\u202eright to left\u202c \u200b\ufeff\u2028 \ufffd replacement \ufffd",
    "\ud7ff\ue000\U0010ffff\ufdd0\uffff unassigned \u0378",
    "<0x41> <|im_end|> \u2581 \u0120",
]


def streamed(model: TextModel, ids: Iterable[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = model.detokenizer(prompt, skip_special_tokens=False)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def native(shelf: Shelf, family: str) -> Tokenizer:
    return Tokenizer.from_str(shelf.files(family)["tokenizer.json"].decode())


def code_points() -> str:
    """Every code point that can be encoded, shuffled so that neighbours share no leading bytes."""
    points = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    random.Random(5).shuffle(points)
    return "".join(map(chr, points))


@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
def test_every_code_point_survives_in_whole_characters(shelf: Shelf, family: str) -> None:
    """Each character is given as its single bytes, so that every one is split everywhere."""
    model = shelf.model(family)
    spell = {model.token_bytes(token): token for token in reversed(range(model.vocabulary))}
    byte_ids = [spell[bytes([byte])] for byte in range(256)]
    points = code_points()
    text = points if family == "byte_level" else points[::256]
    detokenizer = model.detokenizer([byte_ids[0x41]], skip_special_tokens=False)
    push = detokenizer.push
    for char in text:
        *head, last = char.encode()
        for byte in head:
            assert not push(byte_ids[byte])
        assert push(byte_ids[last]) == char
    assert not detokenizer.pending
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", BYTE_FAMILIES)
def test_the_parts_make_the_text_that_was_encoded(shelf: Shelf, family: str, text: str) -> None:
    model = shelf.model(family)
    ids = model.encode_text(text)
    parts = streamed(model, ids)
    if family == "byte_level":
        assert "".join(parts) == text
    else:
        shown = text.replace(build.MARK, " ")
        shown = shown[1:] if family == "metaspace" and shown.startswith(" ") else shown
        assert "".join(parts) in {shown, shown.removeprefix(" ")}
    assert "".join(parts) == native(shelf, family).decode(ids, skip_special_tokens=False)
    assert not any("\ufffd" in part for part in parts if "\ufffd" not in text)


@pytest.mark.parametrize("family", sorted(build.FAMILIES))
def test_streams_from_any_prompt_tail_continue_the_text(shelf: Shelf, family: str) -> None:
    """Wherever the prompt ends, what follows is what the whole text has more."""
    model = shelf.model(family)
    ids = model.encode_text("the café in 北京 is 😀 open, user and assistant talk 1234 times")
    for end in range(1, len(ids) + 1):
        before = "".join(streamed(model, ids[:end]))
        if "\ufffd" in before:
            continue  # the cut is inside a character: what follows begins with that character
        assert before + "".join(streamed(model, ids[end:], ids[:end])) == "".join(streamed(model, ids))


def test_a_prompt_that_ends_inside_a_character_is_completed(shelf: Shelf) -> None:
    model = shelf.model("byte_level")
    spell = {model.token_bytes(token): token for token in reversed(range(model.vocabulary))}
    ids = [spell[bytes([byte])] for byte in "x😀".encode()]
    for end in range(2, len(ids)):
        assert "".join(streamed(model, ids[end:], ids[:end])) == "😀"


@pytest.mark.parametrize("family", ["byte_level", "metaspace", "legacy_sentencepiece"])
def test_random_ids_agree_with_the_library_where_they_spell_characters(shelf: Shelf, family: str) -> None:
    model = shelf.model(family)
    library = native(shelf, family)
    dice = random.Random(family)
    agreed = 0
    for _ in range(300):
        ids = dice.choices(range(model.vocabulary), k=dice.randrange(30))
        expected = library.decode(ids, skip_special_tokens=False)
        if family == "byte_level" or "\ufffd" not in expected:
            assert model.decode(ids, skip_special_tokens=False) == expected
            agreed += 1
    assert agreed > 20


@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
def test_the_library_streams_the_same_text(shelf: Shelf, family: str) -> None:
    model = shelf.model(family)
    library = native(shelf, family)
    prompt = model.encode_text("the user")
    ids = model.encode_text("Москва, 北京 and 😀 are fine, of course")
    stream = DecodeStream(ids=prompt, skip_special_tokens=False)
    expected = "".join(stream.step(library, token) or "" for token in ids)
    assert "".join(streamed(model, ids, prompt)) == expected


def test_broken_bytes_become_replacement_characters_and_the_rest_goes_on(shelf: Shelf) -> None:
    model = shelf.model("byte_level")
    spell = {model.token_bytes(token): token for token in reversed(range(model.vocabulary))}
    data = b"a\xff\xfeb\xe2\x82c\xc0\x80\xed\xa0\x80\xf0\x9f\x98"
    ids = [spell[bytes([byte])] for byte in data]
    parts = streamed(model, ids)
    assert "".join(parts) == data.decode("utf-8", "replace")
    assert parts[-1] == "\ufffd"  # the unfinished emoji, at the end only
    assert "".join(parts) == native(shelf, "byte_level").decode(ids)


def test_ids_outside_the_vocabulary_are_silent(shelf: Shelf) -> None:
    for family in ("byte_level", "word_piece"):
        model = shelf.model(family)
        for token in (-1, model.vocabulary, 2**31, 2**70):
            assert model.token_text(token) == ""
            assert not model.is_special(token)
            detokenizer = model.detokenizer([token], skip_special_tokens=True)
            assert detokenizer.push(token) == ""


def test_special_ids_of_the_prompt_do_not_make_a_text_begin_twice(shelf: Shelf) -> None:
    """After a prompt of hidden tokens alone, the first word loses the space that marks it."""
    model = shelf.model("metaspace")
    hello = model.encode_text("hello")
    assert "".join(streamed(model, hello)) == "hello"
    bos = model.bos_token_id
    assert bos is not None
    hidden = model.detokenizer([bos], skip_special_tokens=True)
    assert "".join(map(hidden.push, hello)) == "hello"
    shown = model.detokenizer([bos], skip_special_tokens=False)
    assert "".join(map(shown.push, hello)) == " hello"
    for hidden_tokens in (1, 50):
        inside = model.detokenizer([*hello, *[bos] * hidden_tokens], skip_special_tokens=True)
        assert "".join(map(inside.push, hello)) == " hello"


@pytest.mark.parametrize("family", ["word_piece", "unigram"])
def test_other_decoders_give_the_librarys_text(shelf: Shelf, family: str) -> None:
    model = shelf.model(family)
    library = native(shelf, family)
    for text in ("the user and the assistant talk", "capital of France is Paris . what is it ?"):
        ids = model.encode_text(text)
        assert "".join(streamed(model, ids)) == library.decode(ids)
        assert model.decode(ids) == library.decode(ids)


class TestWindow:
    """The detokenizer for decoders we do not know, on a decoder that spells bytes."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def test_it_holds_unfinished_characters(self) -> None:
        data = "a😀é北b".encode()
        window = WindowDetokenizer(self.decode, [], frozenset())
        parts = [window.push(byte) for byte in data]
        assert "".join(parts) == "a😀é北b"
        assert not any("\ufffd" in part for part in parts)
        assert window.flush() == ""

    def test_it_gives_up_after_a_while(self) -> None:
        window = WindowDetokenizer(self.decode, [], frozenset())
        parts = [window.push(0xFF) for _ in range(20)]
        assert "\ufffd" in "".join(parts)
        assert sum(map(len, parts)) + len(window.flush()) == 20

    def test_it_flushes_what_is_left(self) -> None:
        window = WindowDetokenizer(self.decode, [0x41], frozenset())
        assert window.push(0xF0) == ""
        assert window.pending
        assert window.flush() == "\ufffd"
        assert window.flush() == ""

    def test_it_looks_at_a_bounded_number_of_ids(self) -> None:
        sizes = []

        def decode(ids: Sequence[int]) -> str:
            sizes.append(len(ids))
            return self.decode(ids)

        window = WindowDetokenizer(decode, [0x41] * 1000, frozenset())
        for _ in range(500):
            window.push(0x42)
        assert max(sizes) <= 16


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        [],
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC"},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Replace"}]},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}]},
        {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "stop": 1}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [1]},
        {"type": "Sequence", "decoders": {}},
    ],
)
def test_a_decoder_that_is_not_byte_by_byte_is_left_to_the_library(decoder: object) -> None:
    assert byte_rules(decoder) is None


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    rules = byte_rules({"type": "ByteLevel"})
    assert rules is not None
    assert sorted(rules.piece(char) for char in ByteLevel.alphabet()) == sorted(
        bytes([b]) for b in range(256)
    )


def test_a_hundred_thousand_tokens_take_linear_time() -> None:
    rules = ByteRules(str.encode, str.encode, 0)
    detokenizer = ByteDetokenizer(ByteTable(rules, ["ab"]), [0] * 1_000_000, frozenset())
    started = time.perf_counter()
    for _ in range(100_000):
        detokenizer.push(0)
    assert time.perf_counter() - started < 5


def test_special_tokens_are_those_the_library_skips(shelf: Shelf) -> None:
    for family in sorted(build.FAMILIES):
        library = json.loads(shelf.files(family)["tokenizer.json"])
        special = {token["id"] for token in library["added_tokens"] if token["special"]}
        model = shelf.model(family)
        assert {token for token in range(model.vocabulary) if model.is_special(token)} == special
        unknown = {0} if family not in {"byte_level", "byte_level_whole_words", "folding"} else set()
        assert special - unknown <= model.control_ids
        assert not unknown & model.control_ids
