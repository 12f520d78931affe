"""The pieces of an answer: one per token, in order, final, and together exactly the visible text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

import pytest

from container.text.detok import ByteDetokenizer, ByteRules, ByteTable, Detokenizer
from container.text.stream import Piece, TextStream
from tests.text import build
from tests.text.conftest import Shelf

SPECIAL = 0


class Spelled:
    """A model whose id n is the n-th of the given byte strings; id 0 is special and spells `<e>`."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = ["<e>", *(piece.decode("latin-1") for piece in pieces)]

    def is_special(self, token: int, /) -> bool:
        return token == SPECIAL

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        def latin(piece: str) -> bytes:
            return piece.encode("latin-1")

        skip = frozenset({SPECIAL}) if skip_special_tokens else frozenset()
        return ByteDetokenizer(ByteTable(ByteRules(latin, latin, 0), self.pieces), prompt_ids, skip)


def run(stream: TextStream, ids: Iterable[int]) -> tuple[list[Piece], list[str]]:
    """Return all pieces, and the text as it stood after each push."""
    pieces: list[Piece] = []
    states = []
    for index, token in enumerate(ids):
        pieces += stream.push(token, index)
        states.append("".join(piece.text for piece in pieces))
    pieces += stream.finish()
    assert [piece.tag for piece in pieces] == list(range(len(pieces))), "in order, none twice, none skipped"
    return pieces, states


def spelled(parts: Sequence[bytes]) -> tuple[Spelled, list[int]]:
    return Spelled(*parts), list(range(1, len(parts) + 1))


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def splits(data: bytes) -> Iterable[list[bytes]]:
    """Yield every way to cut `data` into tokens."""
    for marks in itertools.product([False, True], repeat=len(data) - 1):
        places = [0, *(index + 1 for index, cut in enumerate(marks) if cut), len(data)]
        yield [data[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("include_stop", [False, True])
def test_every_split_of_a_stop_string_over_tokens_is_cut_exactly(include_stop: bool) -> None:
    whole = "é stop: x".encode()
    visible = "é stop:" if include_stop else "é "
    end = len(visible.encode())
    for parts in splits(whole):
        model, ids = spelled(parts)
        stream = TextStream(model, [], ["stop:"], include_stop=include_stop)
        pieces, _ = run(stream, ids)
        assert text_of(pieces) == visible
        assert stream.stopped == "stop:"
        begins = list(itertools.accumulate([0, *map(len, parts[:-1])]))
        assert len(pieces) == sum(begin < end for begin in begins), "tokens are cut with the text"


def test_every_split_of_a_text_without_a_match_comes_out_whole() -> None:
    whole = "sto 😀 st".encode()
    for parts in splits(whole):
        model, ids = spelled(parts)
        stream = TextStream(model, [], ["stop", "t!"])
        pieces, _ = run(stream, ids)
        assert text_of(pieces) == whole.decode()
        assert len(pieces) == len(parts)
        assert stream.stopped is None


def test_a_token_that_starts_a_character_goes_with_the_character() -> None:
    """The stop string begins at the character, so its first byte is part of the match."""
    model, ids = spelled([b"a", b"\xc3", b"\xa9", b"b"])
    stream = TextStream(model, [], ["\u00e9"])
    pieces, _ = run(stream, ids)
    assert [piece.text for piece in pieces] == ["a"]


def test_text_is_released_as_soon_as_no_stop_string_can_take_it_back() -> None:
    model, ids = spelled([b"a ", b"st", b"ack ", b"sto", b"re"])
    _, states = run(TextStream(model, [], ["stop"]), ids)
    assert states == ["a ", "a ", "a stack ", "a stack ", "a stack store"]


def test_a_piece_is_held_whole_when_its_end_may_be_taken_back() -> None:
    model, ids = spelled([b"xs", b"t", b"y"])
    _, states = run(TextStream(model, [], ["stop"]), ids)
    assert states == ["", "", "xsty"]


def test_tokens_that_always_end_inside_a_character_do_not_wait_for_the_end() -> None:
    data = "北京東京北京".encode()
    parts = [data[:2], *(data[n : n + 3] for n in range(2, len(data), 3))]
    model, ids = spelled(parts)
    _, states = run(TextStream(model, []), ids)
    assert states == ["", "", "北", "北京", "北京東", "北京東京", "北京東京北京"]


def test_an_unfinished_character_ends_as_a_replacement_on_its_token() -> None:
    model, ids = spelled([b"a", b"\xf0\x9f"])
    pieces, states = run(TextStream(model, []), ids)
    assert states == ["a", "a"]
    assert [piece.text for piece in pieces] == ["a", "\ufffd"]


def test_hidden_special_tokens_add_nothing_and_cannot_match() -> None:
    model = Spelled(b"<", b"e>", b"b")
    stream = TextStream(model, [], ["<e>"])
    pieces, _ = run(stream, [3, SPECIAL, 3])
    assert [(piece.text, piece.special) for piece in pieces] == [("b", False), ("", True), ("b", False)]
    assert stream.stopped is None
    stream = TextStream(model, [], ["<e>"])
    assert text_of(run(stream, [3, 1, SPECIAL, 2, 3])[0]) == "b", "the text around it is one text"
    assert stream.stopped == "<e>"


def test_shown_special_tokens_are_text_and_match() -> None:
    model = Spelled(b"b")
    stream = TextStream(model, [], ["<e>"], skip_special_tokens=False)
    pieces, _ = run(stream, [1, SPECIAL, 1])
    assert text_of(pieces) == "b"
    assert stream.stopped == "<e>"


def test_a_hidden_token_before_the_match_stays_and_one_inside_goes() -> None:
    model, _ = spelled([b"a", b"s", b"t"])
    pieces, _ = run(TextStream(model, [], ["st"]), [1, SPECIAL, 2, SPECIAL, 3])
    assert [piece.token for piece in pieces] == [1, SPECIAL]


def test_nothing_follows_a_match() -> None:
    model, _ = spelled([b"a", b"."])
    stream = TextStream(model, [], ["."])
    assert text_of(stream.push(1)) == "a"
    assert stream.push(2) == []
    assert stream.push(1) == []
    assert stream.finish() == []


def test_a_token_over_the_border_is_cut_and_keeps_its_tag() -> None:
    model, ids = spelled([b"ab.cd"])
    pieces, _ = run(TextStream(model, [], ["."]), ids)
    assert pieces == [Piece(1, "ab", 0, False)]
    pieces, _ = run(TextStream(model, [], ["."], include_stop=True), ids)
    assert pieces == [Piece(1, "ab.", 0, False)]


def test_stop_strings_count_only_after_the_least_number_of_tokens() -> None:
    model, _ = spelled([b".", b"a"])
    for least in range(5):
        stream = TextStream(model, [], ["."], min_tokens=least)
        pieces, _ = run(stream, [1, 2, 1, 2, 1, 2])
        assert text_of(pieces) == [".a.a.a"[:n] for n in (0, 2, 2, 4, 4)][least]


def test_a_text_that_ends_while_held_is_released() -> None:
    model, ids = spelled([b"a", b"st"])
    stream = TextStream(model, [], ["stop"])
    pieces, states = run(stream, ids)
    assert states == ["a", "a"]
    assert [piece.text for piece in pieces] == ["a", "st"]


def test_an_answer_of_no_tokens_is_empty() -> None:
    assert TextStream(Spelled(), [], ["x"]).finish() == []


def test_the_prompt_cannot_match() -> None:
    model, _ = spelled([b"st", b"op"])
    stream = TextStream(model, [1], ["stop"])
    assert text_of(run(stream, [2])[0]) == "op"


def test_pieces_show_no_content_in_their_repr() -> None:
    assert "secret" not in repr(Piece(77, "secret", "secret", False))
    assert "77" not in repr(Piece(77, "secret", "secret", False))


@pytest.mark.parametrize("include_stop", [False, True])
def test_random_streams_show_the_visible_text_and_never_take_back(include_stop: bool) -> None:
    dice = random.Random(9)
    stopped = 0
    for _ in range(3_000):
        parts = [bytes(dice.choices(b"ab\xc3\xa9\xe2", k=dice.randrange(1, 4))) for _ in range(6)]
        model = Spelled(*parts)
        ids = dice.choices(range(7), k=dice.randrange(12))
        stops = ["".join(dice.choices("abé", k=dice.randrange(1, 4))) for _ in range(dice.randrange(3))]
        least = dice.choice([0, 0, 3])
        stream = TextStream(model, [], stops, include_stop=include_stop, min_tokens=least)
        pieces, states = run(stream, ids)
        text = b"".join(parts[token - 1] for token in ids if token).decode("utf-8", "replace")
        shown = text_of(pieces)
        for earlier, later in itertools.pairwise([*states, shown]):
            assert later.startswith(earlier)
        if stream.stopped is None:
            assert shown == text
            assert [piece.token for piece in pieces] == ids
            assert least or not any(stop in text for stop in stops)
        else:
            stopped += 1
            assert text.startswith(shown + ("" if include_stop else stream.stopped))
            assert shown.endswith(stream.stopped) or not include_stop
            assert [piece.token for piece in pieces] == ids[: len(pieces)]
            if not least and not include_stop:
                assert not any(stop in shown for stop in stops)
    assert stopped > 400


@pytest.mark.parametrize("family", sorted(build.FAMILIES))
def test_a_real_vocabulary_streams_what_it_decodes(shelf: Shelf, family: str) -> None:
    model = shelf.model(family)
    prompt = model.encode_chat([{"role": "user", "content": "hello"}])
    ids = model.encode_text("the café in 北京 is 😀 open")
    stream = TextStream(model, prompt, ["never"])
    pieces, _ = run(stream, [*ids, next(iter(model.eos_token_ids))])
    assert len(pieces) == len(ids) + 1
    assert pieces[-1].special
    assert pieces[-1].text == ""
    whole = model.decode([*prompt, *ids])
    assert whole.endswith(text_of(pieces))
    assert text_of(pieces).strip()
