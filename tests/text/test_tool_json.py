"""The scanner of one JSON value: it ends where json's own decoder ends, however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest

from container.text.tool_json import MAX_DEPTH, MAX_SCALAR_CHARS, JsonScanner

VALUES = [
    "{}",
    "[]",
    '""',
    '{"a": 1}',
    '{"a":{"b":[1,2,{"c":null}]},"d":"}"}',
    '["\\u00e9\\n\\"\\\\", "é", "\U0001f600"]',
    "[true, false, null, -0.5e+10, 0, 12]",
    ' \n\t{ "a" : [ ] , "b" : { } }',
    '{"": ""}',
]
FAULTS = [
    "}",
    "]",
    ",",
    "x",
    "{,}",
    "{1: 2}",
    '{"a" 1}',
    '{"a": }',
    '{"a": 1,}',
    "[1,]",
    "[1 2]",
    '{"a": 1]',
    "[1}",
    '["\n"]',
    '["\\x"]',
    '["\\u12g4"]',
    "[01]",
    "[1.]",
    "[.5]",
    "[+1]",
    "[1e]",
    "[tru]",
    "[nul ]",
    "[NaN]",
    "[-]",
]


def scan(text: str, cuts: list[int]) -> tuple[int, bool, bool]:
    """Return where scanning ended, and whether it was done or had failed, with the text cut at `cuts`."""
    scanner = JsonScanner()
    edges = [0, *cuts, len(text)]
    for start, stop in itertools.pairwise(edges):
        end = start + scanner.feed(text[start:stop])
        if scanner.done or scanner.failed:
            return end, scanner.done, scanner.failed
    return len(text), scanner.done, scanner.failed


@pytest.mark.parametrize("text", VALUES)
def test_a_value_ends_where_json_says_it_ends_in_every_cut(text: str) -> None:
    space = len(text) - len(text.lstrip())
    assert json.JSONDecoder().raw_decode(text, space)[1] == len(text)
    for more in ("", "}", " and so on", "]]", ',"x"'):
        whole = text + more
        for cut in range(len(whole) + 1):
            assert scan(whole, [cut]) == (len(text), True, False)
        assert scan(whole, list(range(1, len(whole)))) == (len(text), True, False)


@pytest.mark.parametrize("text", FAULTS)
def test_what_is_no_json_is_a_fault_in_every_cut(text: str) -> None:
    with pytest.raises(ValueError):  # `raw_decode` takes NaN, which JSON does not have
        json.loads(text, parse_constant=lambda word: float(f"no {word}"))
    whole = text + "  ]}"
    for cut in range(len(whole) + 1):
        assert scan(whole, [cut])[1:] == (False, True)


def test_every_prefix_of_a_value_may_still_become_one() -> None:
    for text in VALUES:
        for stop in range(len(text)):
            assert scan(text[:stop], [])[1:] == (False, False)


def test_random_values_and_random_damage_agree_with_json() -> None:
    dice = random.Random(5)

    def value(depth: int) -> Any:
        kind = dice.randrange(7 if depth < 4 else 5)
        if kind == 5:
            return [value(depth + 1) for _ in range(dice.randrange(3))]
        if kind == 6:
            return {dice.choice('ab"\\é'): value(depth + 1) for _ in range(dice.randrange(3))}
        return (None, True, dice.randrange(-99, 99), dice.random() * 1e9, 'x\n"\\\u2028é')[kind]

    agreed = 0
    for _ in range(1500):
        text = json.dumps([value(0)], ensure_ascii=dice.random() < 0.5)
        if dice.random() < 0.6:
            place = dice.randrange(1, len(text))
            text = text[:place] + dice.choice('{}[]",:\\x1- ') + text[place + dice.randrange(2) :]
        try:
            stop = json.JSONDecoder().raw_decode(text)[1]
        except ValueError:
            stop = None
        end, done, _ = scan(text, sorted(dice.choices(range(len(text) + 1), k=3)))
        assert done == (stop is not None), text
        if stop is not None:
            assert end == stop
            agreed += 1
    assert 400 < agreed < 1400, "the cases must be of both kinds"


def test_depth_and_the_length_of_numbers_are_bounded() -> None:
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH, [])[1]
    assert scan("[" * (MAX_DEPTH + 1), [])[2]
    assert scan("[" + "1" * MAX_SCALAR_CHARS + "]", [])[1]
    assert scan("[" + "1" * (MAX_SCALAR_CHARS + 1) + "]", [])[2]
    digits = JsonScanner()
    for _ in range(MAX_SCALAR_CHARS + 1):
        digits.feed("1")
    assert digits.failed


def test_a_long_string_in_small_pieces_takes_time_in_proportion() -> None:
    def cpu_s(chars: int) -> float:
        scanner = JsonScanner()
        began = time.process_time()
        scanner.feed('"')
        for _ in range(chars // 4):
            scanner.feed("abcd")
        return time.process_time() - began

    cpu_s(10_000)
    assert cpu_s(400_000) < 40 * cpu_s(40_000) + 0.1
