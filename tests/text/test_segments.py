"""Control tokens are found by the rules of the tokenizers library, and only in what the template wrote."""

from __future__ import annotations

import random
import time

from tokenizers import AddedToken, Tokenizer, models

from container.text.segments import ControlMatcher, Cut
from container.text.vocabulary import ControlToken

FLAGS = {
    "<a>": {},
    "<a>b": {},
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<lr>": {"lstrip": True, "rstrip": True},
    "word": {"single_word": True},
    "a<": {},
    "[x]": {},
}


def matcher() -> ControlMatcher:
    return ControlMatcher(
        [ControlToken(index, content, True, **flags) for index, (content, flags) in enumerate(FLAGS.items())]
    )


def all_of(text: str) -> list[tuple[int, int]]:
    return [(0, len(text))]


def test_the_leftmost_and_then_the_longest_token_wins() -> None:
    text = "a<a>b<a>"
    assert matcher().cuts(text, all_of(text)) == [Cut(0, 2, 6), Cut(5, 8, 0)]
    assert matcher().cuts("<a>b", all_of("<a>b")) == [Cut(0, 4, 1)]


def test_the_cuts_are_those_of_the_library() -> None:
    library = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    library.add_tokens([AddedToken(c, normalized=False, **flags) for c, flags in FLAGS.items()])
    dice = random.Random(3)
    parts = [*FLAGS, " ", "  ", "\n", "\u00a0", "z", "_", "9", "é", "<", "a", ">"]
    for _ in range(3_000):
        text = "".join(dice.choices(parts, k=dice.randrange(9)))
        encoding = library.encode(text)
        expected = [
            Cut(*span, token - 1)
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token > 0
        ]
        assert matcher().cuts(text, all_of(text)) == expected, text


def test_a_token_outside_or_across_the_trusted_ranges_is_text() -> None:
    text = "<a><a><a>"
    assert matcher().cuts(text, [(3, 6)]) == [Cut(3, 6, 0)]
    assert matcher().cuts(text, [(1, 5)]) == []
    assert matcher().cuts(text, [(0, 2), (2, 3)]) == []
    assert matcher().cuts(text, []) == []


def test_text_of_the_client_does_not_hide_the_token_after_it() -> None:
    """`a` of the client and `<` of the template spell a token: its own `<a>` must still be found."""
    assert matcher().cuts("a<a>", [(1, 4)]) == [Cut(1, 4, 0)]


def test_white_space_of_the_client_is_swallowed_as_the_library_does() -> None:
    assert matcher().cuts("x  <lr>  y", [(3, 7)]) == [Cut(1, 9, 4)]
    assert matcher().cuts("<r>   <lr>", [(0, 3), (6, 10)]) == [Cut(0, 6, 3), Cut(6, 10, 4)]


def test_a_single_word_token_needs_borders_on_both_sides() -> None:
    assert matcher().cuts("word", all_of("word")) == [Cut(0, 4, 5)]
    assert matcher().cuts("words", [(0, 4)]) == []
    assert matcher().cuts("swword", [(2, 6)]) == []


def test_a_vocabulary_without_control_tokens_cuts_nothing() -> None:
    assert ControlMatcher([]).cuts("<a>", [(0, 3)]) == []


def test_a_text_full_of_beginnings_takes_linear_time() -> None:
    text = "<a" * 100_000
    started = time.perf_counter()
    assert matcher().cuts(text, all_of(text)) == [Cut(i, i + 2, 6) for i in range(1, 199_998, 2)]
    assert time.perf_counter() - started < 4
