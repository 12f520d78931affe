"""Strict JSON: what is accepted equals the standard parser's result, everything hostile has its own code."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagemaker_entry import strict_json
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.strict_json import (
    MAX_DEPTH,
    MAX_MARKS,
    MAX_NUMBER_CHARS,
    MAX_OBJECT_KEYS,
    MAX_STRINGS,
    MAX_VALUES,
    loads,
)


def code_of(body: bytes) -> Code:
    with pytest.raises(ApiError) as caught:
        loads(body)
    error = caught.value
    assert error.status == 400
    assert error.__cause__ is None and error.__context__ is None  # would carry the body
    return error.code


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"{}", {}),
        (b' \t\r\n{"a": [1, 2.5, true, false, null, "x"]} \n', {"a": [1, 2.5, True, False, None, "x"]}),
        (b'"\\u0000"', "\x00"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        ("\U0001f600".join('""').encode(), "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
        (b'"a\\"]}[{:,b"', 'a"]}[{:,b'),
        (b'{"\\"":1}', {'"': 1}),
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"0.0e5", 0.0),
        (b"[]", []),
        (b"1", 1),
        (b"null", None),
        (b'{"a":{"a":1}}', {"a": {"a": 1}}),
    ],
)
def test_valid_documents_give_the_standard_value(body: bytes, value: object) -> None:
    assert loads(body) == value == json.loads(body)


def test_negative_zero_is_zero() -> None:
    for body in (b"-0.0", b"-0", b"-0e7"):
        assert str(loads(body)) in {"0", "0.0"}


@pytest.mark.parametrize(
    ("row", "body", "code"),
    [
        ("A31", b"[" * 100_000, Code.TOO_DEEP),
        ("A31", b'{"a":' * 2_000 + b"1" + b"}" * 2_000, Code.TOO_DEEP),
        ("A31", b'{"a":' * 2_000, Code.TOO_DEEP),
        ("A31", b'[{"a":' * 1_000_000, Code.TOO_DEEP),
        ("A31", b"]" * 100_000, Code.INVALID_JSON),
        ("A31", b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), Code.TOO_DEEP),
        ("A32", b'{"t":NaN}', Code.INVALID_NUMBER),
        ("A32", b'{"t":Infinity}', Code.INVALID_NUMBER),
        ("A32", b'{"t":-Infinity}', Code.INVALID_NUMBER),
        ("A32", b'{"t":1e999}', Code.INVALID_NUMBER),
        ("A32", b'{"t":-1e400}', Code.INVALID_NUMBER),
        ("A32", b"1e-999", Code.INVALID_NUMBER),
        ("A33", b"1" * 5_000, Code.INVALID_NUMBER),
        ("A33", b"-" + b"9" * 1_000_000, Code.INVALID_NUMBER),
        ("A33", b"18446744073709551616", Code.INVALID_NUMBER),
        ("A33", b"-9223372036854775809", Code.INVALID_NUMBER),
        ("A33", b"0." + b"1" * MAX_NUMBER_CHARS, Code.INVALID_NUMBER),
        ("A34", b'{"model":"a","model":"b"}', Code.DUPLICATE_KEY),
        ("A34", b'{"a":{"messages":[],"messages":[]}}', Code.DUPLICATE_KEY),
        ("A34", b'{"a":1,"\\u0061":2}', Code.DUPLICATE_KEY),
        ("A35", b'"\\ud800"', Code.LONE_SURROGATE),
        ("A35", b'"\\udc00\\ud800"', Code.LONE_SURROGATE),
        ("A35", b'{"\\uDFFF":1}', Code.LONE_SURROGATE),
        ("A35", b'["x","\\uD83Dx"]', Code.LONE_SURROGATE),
        ("A35", b"\xef\xbb\xbf{}", Code.INVALID_JSON),
        ("A35", "{}".encode("utf-16"), Code.INVALID_UTF8),
        ("A35", "{}".encode("utf-16-le"), Code.INVALID_JSON),
        ("A36", b'"\xff\xfe"', Code.INVALID_UTF8),
        ("A36", b'"\xc0\x80"', Code.INVALID_UTF8),
        ("A36", b'"\xe2\x82"', Code.INVALID_UTF8),
        ("A36", b'"\xed\xa0\xbd\xed\xb8\x80"', Code.INVALID_UTF8),
        ("A41", b"", Code.INVALID_JSON),
        ("A41", b"{}{}", Code.INVALID_JSON),
        ("A41", b"{}\n{}", Code.INVALID_JSON),
        ("A41", b"{} x", Code.INVALID_JSON),
        ("A41", b"{'a':1}", Code.INVALID_JSON),
        ("A41", b'{"a":1,}', Code.INVALID_JSON),
        ("A41", b'{"a":1 /* no */}', Code.INVALID_JSON),
        ("A41", b'{"a"}', Code.INVALID_JSON),
        ("A41", b"01", Code.INVALID_JSON),
        ("A41", b"+1", Code.INVALID_JSON),
        ("A41", b'"\n"', Code.INVALID_JSON),
        ("A41", b'"\\x41"', Code.INVALID_JSON),
        ("A41", b'"unended', Code.INVALID_JSON),
        ("A41", b'"\\', Code.INVALID_JSON),
        ("A41", "{\u00a0}".encode(), Code.INVALID_JSON),
    ],
)
def test_hostile_documents_have_their_own_code(row: str, body: bytes, code: Code) -> None:
    assert code_of(body) is code


def test_depth_and_keys_at_their_limits_are_accepted() -> None:
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    keys = {f"k{i}": {"k": i} for i in range(MAX_OBJECT_KEYS)}
    assert loads(json.dumps(keys).encode()) == keys


def test_one_key_above_the_limit_is_refused_in_any_object() -> None:
    keys = {f"k{i}": i for i in range(MAX_OBJECT_KEYS + 1)}
    assert code_of(json.dumps(keys).encode()) is Code.TOO_MANY_KEYS
    assert code_of(json.dumps([{"a": [keys]}]).encode()) is Code.TOO_MANY_KEYS


def test_many_small_objects_are_not_one_large_one() -> None:
    body = [{"role": "user", "content": "x"} for _ in range(5_000)]
    assert loads(json.dumps(body).encode()) == body


def test_values_strings_and_containers_are_counted_before_anything_is_built() -> None:
    assert code_of(b"[" + b"1," * MAX_VALUES + b"1,1]") is Code.TOO_MANY_VALUES
    assert code_of(b"[" + b'"",' * MAX_STRINGS + b'""]') is Code.TOO_MANY_VALUES
    assert code_of(b"[" + b"[]," * (MAX_MARKS // 2) + b"[]]") is Code.TOO_MANY_VALUES


def test_the_limits_themselves_are_accepted() -> None:
    assert len(loads(b"[" + b"1," * (MAX_VALUES - 1) + b"1]")) == MAX_VALUES
    assert len(loads(b"[" + b'"",' * (MAX_STRINGS - 1) + b'""]')) == MAX_STRINGS


def test_structure_inside_strings_counts_for_nothing() -> None:
    text = '[{"' * 10_000 + ":,}]\\" * 10_000
    assert loads(json.dumps([text]).encode()) == [text]


@pytest.mark.parametrize(
    "body",
    [
        b'{"k":"' + b"x" * 2_000_000 + b'"}',
        b'{"k":"' + b'\\"' * 1_000_000 + b'"}',
        b'"' * 2_000_000,
        b"\\" * 2_000_000,
        b'"' + b"\\" * 2_000_001,
        b"[" + b'"a",' * 500_000,
        b"{" + b'"a":' * 500_000,
        b"{" + b",".join(b'"same_prefix_%d":1' % i for i in range(200_000)) + b"}",
        b":" * 2_000_000,
        b"[]" * 1_000_000,
        b'{"a":"\\ud800' + b"\\ud83d\\ude00" * 160_000 + b'"}',
        b"-" * 2_000_000,
        b"1" * 2_000_000,
        b"0." + b"0" * 2_000_000 + b"1",
        b" " * 2_000_000,
    ],
    ids=lambda body: repr(body[:8]),
)
def test_two_megabytes_of_anything_take_a_bounded_time(body: bytes) -> None:
    started_s = time.process_time()
    try:
        loads(body)
    except ApiError:
        refused = True
    else:
        refused = False
    assert refused or body.startswith(b'{"k"')
    assert time.process_time() - started_s < 1.0  # about 0.1 s; quadratic work would take minutes


def test_colliding_keys_are_stopped_by_the_key_cap() -> None:
    body = b"{" + b",".join(b'"same_prefix_%d":1' % i for i in range(200_000)) + b"}"
    assert code_of(body) is Code.TOO_MANY_KEYS


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON_VALUES, st.booleans())
def test_every_encodable_value_comes_back_unchanged(value: object, escaped: bool) -> None:
    assert loads(json.dumps(value, ensure_ascii=escaped).encode()) == value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_api_errors(body: bytes) -> None:
    try:
        value = loads(body)
    except ApiError as error:
        assert error.status == 400
    else:
        assert value == json.loads(body)


def test_random_structure_never_reaches_the_recursion_limit() -> None:
    rng = random.Random(31)
    alphabet = [b"[", b"{", b'{"a":', b"]", b"}", b'"', b"\\", b",", b":", b"1", b"\\u", b"\xc3"]
    for _ in range(2_000):
        body = b"".join(rng.choices(alphabet, weights=[9, 3, 9, 2, 2, 1, 1, 1, 1, 1, 1, 1], k=400))
        with pytest.raises(ApiError):
            loads(body)


def test_the_scan_is_what_prevents_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_check_structure", lambda body: None)
    with pytest.raises(RecursionError):
        loads(b"[" * 100_000)
