"""Trust follows characters through string operations and appears from nowhere."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from container.text.provenance import Traced, concat, trusted

TEMPLATE = "abcdefgh<|>"
CLIENT = "ABCDEFGH {#}"
FOLDED = dict.fromkeys(TEMPLATE, "t") | dict.fromkeys(CLIENT, "c")


def origin(text: str) -> str:
    """Return one letter per character: `t` where trusted, `c` elsewhere."""
    marks = ["c"] * len(text)
    for start, stop in text.spans if isinstance(text, Traced) else ():
        assert 0 <= start < stop <= len(text)
        marks[start:stop] = "t" * (stop - start)
    return "".join(marks)


def test_a_traced_string_is_the_plain_string_to_everyone_else() -> None:
    text = trusted("abc")
    assert text == "abc"
    assert hash(text) == hash("abc")
    assert {"abc": 1}[text] == 1
    assert "b" in text
    assert text in "xabcx"
    assert str(text) is text


def test_nothing_is_trusted_unless_said_so() -> None:
    assert origin(Traced("abc")) == "ccc"
    assert origin(type(trusted("abc"))("abc")) == "ccc"
    assert trusted("").spans == ()


def test_joined_texts_keep_their_origins_on_both_sides() -> None:
    assert origin(trusted("ab") + "CD") == "ttcc"
    assert origin("AB" + trusted("cd")) == "cctt"
    assert origin(trusted("ab") + trusted("cd")) == "tttt"
    assert (trusted("ab") + trusted("cd")).spans == ((0, 4),)
    assert origin(trusted("|").join(["A", trusted("b"), "C"])) == "ctttc"
    assert origin(concat(["A", "", trusted("b"), Traced("C")])) == "ctc"


def test_adding_what_is_no_string_fails_as_it_does_for_strings() -> None:
    with pytest.raises(TypeError):
        trusted("a") + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + trusted("a")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operation", "text", "marks"),
    [
        (lambda s: s.strip(), "bC", "tc"),
        (lambda s: s.lstrip(), "bC ", "tct"),
        (lambda s: s.rstrip(), " bC", "ttc"),
        (lambda s: s.strip(" b"), "C", "c"),
        (lambda s: s[1:], "bC ", "tct"),
        (lambda s: s[-2:], "C ", "ct"),
        (lambda s: s[2:1], "", ""),
        (lambda s: s.removeprefix(" "), "bC ", "tct"),
        (lambda s: s.removesuffix(" "), " bC", "ttc"),
        (lambda s: s.removesuffix(""), " bC ", "ttct"),
        (lambda s: s.upper(), " BC ", "ttct"),
        (lambda s: s.lower(), " bc ", "ttct"),
        (lambda s: s.title(), " Bc ", "ttct"),
        (lambda s: s.capitalize(), " bc ", "ttct"),
        (lambda s: s.replace("C", "X"), " bX ", "ttct"),
        (lambda s: s.replace("C", trusted("xx")), " bxx ", "ttttt"),
        (lambda s: s.replace(" ", "", 1), "bC ", "tct"),
        (lambda s: s.split("C")[0], " b", "tt"),
        (lambda s: s.split("b", 1)[1], "C ", "ct"),
        (lambda s: s[0], " ", "c"),
        (lambda s: s[::-1], " Cb ", "cccc"),
        (lambda s: s * 2, " bC  bC ", "c" * 8),
        (lambda s: s.split()[0], "bC", "cc"),
        (lambda s: s.replace("", "-"), "- -b-C- -", "c" * 9),
        (lambda s: f"{s}", " bC ", "ttct"),
        (lambda s: f"{s}!", " bC !", "ccccc"),
        (lambda s: "".join([s]), " bC ", "cccc"),
        (lambda s: s.center(6, "C"), "C bC C", "c" * 6),
    ],
)  # fmt: skip
def test_an_operation_keeps_trust_or_loses_it(
    operation: Callable[[Traced], str], text: str, marks: str
) -> None:
    result = operation(concat([trusted(" b"), "C", trusted(" ")]))
    assert result == text
    if isinstance(result, str) and type(result) is str:
        assert set(marks) <= {"c"}
    else:
        assert origin(result) == marks


def test_a_character_that_grows_in_upper_case_loses_all_trust() -> None:
    """`ß` becomes two: later characters move, and their ranges would cover the client's."""
    assert origin(concat(["ß", trusted("a")]).upper()) == "ccc"


def test_random_chains_of_operations_never_trust_a_clients_character() -> None:
    """Template and client draw from separate alphabets, so that a character tells where it came from."""
    dice = random.Random(11)
    operations: list[Callable[[str, str], str]] = [
        lambda s, o: s + o,
        lambda s, o: o + s,
        lambda s, o: s.strip(),
        lambda s, o: s.lstrip(o[:2]),
        lambda s, o: s.rstrip(o[-2:]),
        lambda s, o: s[dice.randrange(5) :],
        lambda s, o: s[: -dice.randrange(1, 5)],
        lambda s, o: s.replace(o[:1], o, 2),
        lambda s, o: s.replace(s[:1] or "x", o),
        lambda s, o: dice.choice(s.split(o[:1] or " ")),
        lambda s, o: o.join([s, s]),
        lambda s, o: s.join([o, s, o]),
        lambda s, o: concat([s, o, s]),
        lambda s, o: s.removeprefix(s[:2]),
        lambda s, o: s.removesuffix(s[-2:]),
    ]
    kept = 0
    for _ in range(2_000):
        text: str = trusted("ab")
        for _ in range(dice.randrange(1, 12)):
            alphabet = dice.choice([TEMPLATE, CLIENT])
            other: str = "".join(dice.choices(alphabet, k=dice.randrange(4)))
            text = dice.choice(operations)(text[:200], trusted(other) if alphabet is TEMPLATE else other)
        marks = origin(text)
        assert all(FOLDED[char] == "t" for char, mark in zip(text, marks, strict=True) if mark == "t")
        kept += marks.count("t")
    assert kept > 5_000, "the chains must keep some trust to say anything"
