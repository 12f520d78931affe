"""Body bytes to a Python value, with every limit checked before anything is built or recursed into.

Owns: what counts as acceptable JSON. Must not know: dialects, fields, HTTP.
Invariant: `loads` returns a finite value of bounded depth, or raises ApiError; time is linear in the body.

    body -> UTF-8 -> strings cut out -> brackets, colons and commas counted -> json with hooks -> surrogates

The standard parser alone takes NaN, 1e999, duplicate keys and lone surrogates, and raises RecursionError or
ValueError on deep nesting and long integers. It reads left to right and sees the same strings as the scan
until it fails, so the scan's limits hold for everything it builds.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any, Final, NoReturn

from sagemaker_entry.errors import ApiError, Code

MAX_DEPTH: Final = 64
MAX_OBJECT_KEYS: Final = 256
MAX_STRINGS: Final = 65_536  # 2,048 messages with all their fields are under 20,000
MAX_MARKS: Final = 262_144  # brackets and colons: 65,536 containers with two keys each
MAX_VALUES: Final = 524_288  # separators: a prompt of half a million token ids
MAX_NUMBER_CHARS: Final = 128  # the longest exact float64 repr has 24; decimals may carry more
MIN_INTEGER: Final = -(2**63)
MAX_INTEGER: Final = 2**64 - 1  # seeds are unsigned 64 bits

# Possessive throughout: no backtracking, and an unterminated string ends the scan instead of restarting it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b"[]{}:,")
_COLON = ord(":")
_CLOSERS = frozenset(b"]}")


def loads(body: bytes) -> Any:
    """Return the one JSON document in `body`.

    Raises ApiError with INVALID_UTF8, INVALID_JSON (byte order mark and trailing data included), TOO_DEEP,
    TOO_MANY_KEYS, TOO_MANY_VALUES, DUPLICATE_KEY, INVALID_NUMBER or LONE_SURROGATE. Negative zero becomes 0.
    """
    text = _decode(body)
    _check_structure(body)
    value = _parse(text)
    if _SURROGATE_ESCAPE.search(body) is not None and _holds_lone_surrogate(value):
        raise ApiError(Code.LONE_SURROGATE)
    return value


def _decode(body: bytes) -> str:
    text: str | None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is None:  # raised outside the handler: the original exception carries the body
        raise ApiError(Code.INVALID_UTF8)
    return text


def _check_structure(body: bytes) -> None:
    """Apply depth, key and size limits to what lies outside strings, first offence first."""
    outside, strings = _STRING.subn(b"", body, count=MAX_STRINGS + 1)
    structure = outside.translate(None, _NOT_STRUCTURE)
    marks = structure.translate(None, b",")
    _walk(marks[:MAX_MARKS])
    if strings > MAX_STRINGS:
        raise ApiError(Code.TOO_MANY_VALUES, limit=MAX_STRINGS)
    if len(marks) > MAX_MARKS:
        raise ApiError(Code.TOO_MANY_VALUES, limit=MAX_MARKS)
    if structure.count(b",") > MAX_VALUES:
        raise ApiError(Code.TOO_MANY_VALUES, limit=MAX_VALUES)


def _walk(marks: bytes) -> None:
    keys = [0]  # colons seen in each open container; the bottom entry is the document
    for byte in marks:
        if byte == _COLON:
            keys[-1] += 1
            if keys[-1] > MAX_OBJECT_KEYS:
                raise ApiError(Code.TOO_MANY_KEYS, limit=MAX_OBJECT_KEYS)
        elif byte in _CLOSERS:
            if len(keys) == 1:
                raise ApiError(Code.INVALID_JSON)
            keys.pop()
        elif len(keys) > MAX_DEPTH:
            raise ApiError(Code.TOO_DEEP, limit=MAX_DEPTH)
        else:
            keys.append(0)


def _parse(text: str) -> Any:
    with contextlib.suppress(ValueError):  # its exception would hold the document
        return json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    raise ApiError(Code.INVALID_JSON)


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        raise ApiError(Code.INVALID_NUMBER)
    value = int(digits)
    if not MIN_INTEGER <= value <= MAX_INTEGER:
        raise ApiError(Code.INVALID_NUMBER)
    return value


def _float(digits: str) -> float:
    if len(digits) > MAX_NUMBER_CHARS:
        raise ApiError(Code.INVALID_NUMBER)
    value = float(digits)
    if not math.isfinite(value):
        raise ApiError(Code.INVALID_NUMBER)
    if value == 0.0:
        if digits.lower().partition("e")[0].strip("-0."):
            raise ApiError(Code.INVALID_NUMBER)  # underflow: 1e-999 is not 0
        return 0.0
    return value


def _constant(_name: str) -> NoReturn:
    raise ApiError(Code.INVALID_NUMBER)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ApiError(Code.DUPLICATE_KEY)
    return value


def _holds_lone_surrogate(value: Any) -> bool:
    """True when a string or key of `value` cannot be encoded; the encoder walks it in native code."""
    try:
        json.dumps(value, ensure_ascii=False, check_circular=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
