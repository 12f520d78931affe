"""Stop strings are found where they complete first, and no more is held back than could begin one."""

from __future__ import annotations

import random
import time

import pytest

from container.text.stops import Match, StopMatcher


def expected_match(text: str, stops: list[str]) -> Match | None:
    """The definition: the earliest end; of the matches that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return Match(end - len(longest), end, longest)
    return None


def expected_held(text: str, stops: list[str]) -> int:
    """The definition: the longest end of the text that begins a stop string, short of all of it."""
    sizes = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) and s != text[-n:] for s in stops)), 0)


def test_random_texts_agree_with_the_definition() -> None:
    dice = random.Random(2)
    matched = 0
    for _ in range(4_000):
        stops = ["".join(dice.choices("ab", k=dice.randrange(1, 6))) for _ in range(dice.randrange(4))]
        text = "".join(dice.choices("abc", k=dice.randrange(20)))
        matcher = StopMatcher(stops)
        done = ""
        found = None
        while found is None and len(done) < len(text):
            part = text[len(done) : len(done) + dice.randrange(1, 4)]
            found = matcher.push(part)
            done += part
            if found is None:
                assert matcher.held == expected_held(done, stops)
        assert found == expected_match(done, stops)
        assert found is not None or expected_match(text, stops) is None
        matched += found is not None
    assert matched > 500


def test_every_way_to_cut_a_stop_string_finds_it() -> None:
    text, stop = "xxUser:yy", "User:"
    for cuts in range(2 ** (len(text) - 1)):
        matcher = StopMatcher([stop])
        parts, start = [], 0
        for index in range(1, len(text) + 1):
            if index == len(text) or cuts >> (index - 1) & 1:
                parts.append(text[start:index])
                start = index
        found = next(filter(None, map(matcher.push, parts)))
        assert found == Match(2, 7, stop)


def test_the_match_that_completes_earliest_wins_over_the_one_that_starts_earliest() -> None:
    assert StopMatcher(["abcdef", "cd"]).push("abcdef") == Match(2, 4, "cd")


def test_of_two_that_complete_together_the_longest_wins() -> None:
    assert StopMatcher(["cd", "abcd"]).push("abcd") == Match(0, 4, "abcd")
    assert StopMatcher(["abcd", "cd"]).push("abcd") == Match(0, 4, "abcd")


def test_a_stop_inside_the_beginning_of_another_is_found() -> None:
    assert StopMatcher(["aab", "ab"]).push("ab") == Match(0, 2, "ab")
    assert StopMatcher(["xaby", "ab"]).push("xab") == Match(1, 3, "ab")


def test_an_ignored_match_is_not_held_back_for_its_own_sake() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("a stop", ignore=True) is None
    assert matcher.held == 0
    assert matcher.push("stop") == Match(6, 10, "stop")


def test_an_ignored_match_that_begins_a_longer_one_is_still_held() -> None:
    matcher = StopMatcher(["ab", "abc"])
    assert matcher.push("ab", ignore=True) is None
    assert matcher.held == 2
    assert matcher.push("c") == Match(0, 3, "abc")


def test_a_match_may_begin_in_ignored_text() -> None:
    matcher = StopMatcher(["abc"])
    matcher.push("ab", ignore=True)
    assert matcher.push("c") == Match(0, 3, "abc")


def test_without_stop_strings_nothing_is_held() -> None:
    matcher = StopMatcher([])
    assert matcher.push("anything") is None
    assert matcher.held == 0


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_the_worst_stop_strings_take_linear_time() -> None:
    """Sixteen of 256 characters that almost match at every place of half a megabyte."""
    stops = ["a" * 255 + chr(ord("b") + n) for n in range(16)]
    started = time.perf_counter()
    matcher = StopMatcher(stops)
    for _ in range(500):
        assert matcher.push("a" * 1000) is None
    assert matcher.held == 255
    assert time.perf_counter() - started < 10
