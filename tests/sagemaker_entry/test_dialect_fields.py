"""The field reader: types without coercion, closed ranges, nulls as absent, leftovers refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from sagemaker_entry.dialects.fields import (
    UNPRINTABLE,
    Fields,
    UnknownFields,
    check_integers,
    check_strings,
    range_rule,
)
from sagemaker_entry.errors import ApiError, Code

READERS: dict[str, Callable[[Fields], Any]] = {
    "integer": lambda fields: fields.integer("x"),
    "number": lambda fields: fields.number("x"),
    "boolean": lambda fields: fields.boolean("x"),
    "text": lambda fields: fields.text("x"),
    "choice": lambda fields: fields.choice("x", ("a", "b")),
    "items": lambda fields: fields.items("x", high=2),
    "integers": lambda fields: fields.integers("x", count=2, low=0, high=5),
    "mapping": lambda fields: fields.mapping("x"),
    "nested": lambda fields: fields.nested("x"),
}
VALUES: dict[str, Any] = {
    "true": True,
    "integer": 1,
    "float": 1.0,
    "string": "a",
    "list": [1],
    "object": {"y": 1},
}
ACCEPTED = {
    "integer": {"integer"},
    "number": {"integer", "float"},
    "boolean": {"true"},
    "text": {"string"},
    "choice": {"string"},
    "items": {"list"},
    "integers": {"list"},
    "mapping": {"object"},
    "nested": {"object"},
}


def caught(read: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as info:
        read()
    return info.value


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", VALUES)
def test_each_reader_takes_its_own_type_and_coerces_nothing(reader: str, kind: str) -> None:
    fields = Fields({"x": VALUES[kind]}, "refuse")
    if kind in ACCEPTED[reader]:
        assert READERS[reader](fields) is not None
        return
    error = caught(lambda: READERS[reader](fields))
    assert error.code is Code.INVALID_TYPE
    assert error.param == "x"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("source", [{}, {"x": None}])
def test_null_and_absent_are_the_same(reader: str, source: dict[str, Any]) -> None:
    fields = Fields(source, "refuse")
    assert READERS[reader](fields) is None
    fields.finish()


@pytest.mark.parametrize(("value", "inside"), [(-1, False), (0, True), (5, True), (6, False)])
def test_ranges_are_closed(value: int, inside: bool) -> None:
    for read in (
        lambda fields: fields.integer("x", low=0, high=5),
        lambda fields: fields.number("x", low=0, high=5),
    ):
        fields = Fields({"x": value}, "refuse")
        if inside:
            assert read(fields) == value
        else:
            error = caught(lambda read=read, fields=fields: read(fields))
            assert error.code is Code.INVALID_VALUE
            assert error.message == "`x` must be from 0 to 5"


def test_a_number_becomes_a_float() -> None:
    assert isinstance(Fields({"x": 3}, "refuse").number("x"), float)


def test_open_ranges_have_their_own_words() -> None:
    assert range_rule(1, None) == "at least 1"
    assert range_rule(None, 9) == "at most 9"
    assert caught(lambda: Fields({"x": 0}, "refuse").integer("x", low=1)).message == "`x` must be at least 1"


def test_a_pattern_must_match_the_whole_text() -> None:
    pattern = re.compile("[a-z]{1,3}")
    assert Fields({"x": "abc"}, "refuse").text("x", pattern=pattern, rule="short") == "abc"
    for value in ("", "abcd", "abc\n", "A"):
        error = caught(
            lambda value=value: Fields({"x": value}, "refuse").text("x", pattern=pattern, rule="short"),
        )
        assert error.message == "`x` must be short"


def test_a_choice_outside_the_list_names_the_list() -> None:
    error = caught(lambda: Fields({"x": "c"}, "refuse").choice("x", ("a", "b")))
    assert error.message == "`x` must be one of a, b"


def test_lists_are_bounded_before_their_items_are_looked_at() -> None:
    error = caught(lambda: Fields({"x": [None] * 3}, "refuse").items("x", high=2))
    assert error.message == "`x` must be a list of at most 2 items"


@pytest.mark.parametrize("items", [[True], [1.0], ["1"], [None], [[1]]])
def test_lists_of_integers_hold_integers(items: list[Any]) -> None:
    assert caught(lambda: check_integers("x", items, 0, 9)).code is Code.INVALID_TYPE


@pytest.mark.parametrize("items", [[-1], [10], [2**40]])
def test_lists_of_integers_are_held_to_their_range(items: list[Any]) -> None:
    assert caught(lambda: check_integers("x", items, 0, 9)).code is Code.INVALID_VALUE


@pytest.mark.parametrize(
    ("items", "code"),
    [([1], Code.INVALID_TYPE), ([""], Code.INVALID_VALUE), (["abcd"], Code.INVALID_VALUE)],
)
def test_lists_of_strings_hold_short_non_empty_strings(items: list[Any], code: Code) -> None:
    assert caught(lambda: check_strings("x", items, 3)).code is code
    assert check_strings("x", ["abc", "a"], 3) == ("abc", "a")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("max_token", "max_token"),
        ("__class__", "__class__"),
        ("a.b-c", "a.b-c"),
        ("x" * 64, "x" * 64),
        ("x" * 65, UNPRINTABLE),
        ("", UNPRINTABLE),
        ("a b", UNPRINTABLE),
        ("<script>", UNPRINTABLE),
        ("a\n", UNPRINTABLE),
        ("\u00e9", UNPRINTABLE),
        ("\x1b[31m", UNPRINTABLE),
    ],
)
def test_an_unknown_name_is_shown_only_when_it_is_a_plain_word(name: str, shown: str) -> None:
    error = caught(Fields({name: 1}, "refuse").finish)
    assert error.code is Code.UNKNOWN_FIELD
    assert error.param == shown
    assert error.message == f"`{shown}` is not a known field"


def test_unknown_names_pass_where_the_operator_lets_them() -> None:
    fields = Fields({"typo": 1, "x": {"typo": 2}}, "ignore")
    inner = fields.nested("x")
    assert inner is not None
    inner.finish()
    fields.finish()


@pytest.mark.parametrize("name", ["adapter", "adapters", "adapter_id", "lora_request"])
@pytest.mark.parametrize("unknown", ["refuse", "ignore"])
def test_a_name_of_an_adapter_never_passes(name: str, unknown: UnknownFields) -> None:
    error = caught(Fields({name: "mine"}, unknown).finish)
    assert error.param == name
    Fields({name: ""}, "ignore").finish()  # asks for none


def test_names_of_inner_objects_carry_their_path() -> None:
    inner = Fields({"x": {"y": "no"}}, "refuse").nested("x")
    assert inner is not None
    assert caught(lambda: inner.integer("y")).param == "x.y"
    item = Fields({}, "refuse").inner({"typo": 1}, "list[3]")
    assert caught(item.finish).param == "list[3].typo"
    assert caught(lambda: Fields({}, "refuse").inner("text", "list[3]")).param == "list[3]"


def test_refused_fields_are_named_and_ignored_ones_pass() -> None:
    fields = Fields({"audio": {}, "user": 1}, "refuse")
    assert caught(lambda: fields.refuse(("audio",))).code is Code.UNSUPPORTED_FIELD
    fields.ignore(("user",))
    fields.finish()
    empty = Fields({"audio": None}, "refuse")
    empty.refuse(("audio",))
    empty.finish()
