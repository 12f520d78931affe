"""Typed reading of one JSON object: every field is taken by name, what is left over is refused by name.

Owns: types, ranges, null handling, the wording of the rule. Must not know: dialects, HTTP.
Invariant: no value of the client appears in an error, and a name of the client only when it is a plain word.

    fields = Fields(body, "refuse")
    n = fields.integer("n", low=1, high=16)      # None when absent or null
    fields.finish()                              # anything not taken above is an unknown field
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal

from sagemaker_entry.errors import ApiError, Code

ADAPTER_FIELDS: Final = frozenset({"adapter", "adapters", "adapter_id", "lora_request"})  # of other servers
UnknownFields = Literal["refuse", "ignore"]

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
UNPRINTABLE: Final = "(unprintable)"


def invalid_value(param: str, rule: str) -> ApiError:
    """Return the error for a value of the right type that breaks `rule` ("must be ...")."""
    return ApiError(Code.INVALID_VALUE, param=param, rule=rule)


def invalid_type(param: str, expected: str) -> ApiError:
    return ApiError(Code.INVALID_TYPE, param=param, expected=expected)


def unsupported(param: str) -> ApiError:
    return ApiError(Code.UNSUPPORTED_FIELD, param=param)


def missing(param: str) -> ApiError:
    return ApiError(Code.MISSING_FIELD, param=param)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def printable(name: str) -> str:
    """Return `name` where it is a plain word that may be shown to the caller again."""
    return name if _PLAIN_NAME.fullmatch(name) else UNPRINTABLE


class Fields:
    """One JSON object being read. A null counts as absent everywhere; `path` prefixes names in errors."""

    def __init__(self, source: dict[str, Any], unknown: UnknownFields, path: str = "") -> None:
        self._source = source
        self._unknown = unknown
        self._path = path
        self._taken: set[str] = set()

    def name(self, field: str) -> str:
        """Return `field` as errors name it: with the path of the object it is in."""
        return f"{self._path}.{field}" if self._path else field

    def value(self, field: str) -> Any:
        """Take a field without a check; None when absent."""
        self._taken.add(field)
        return self._source.get(field)

    def integer(self, field: str, *, low: int | None = None, high: int | None = None) -> int | None:
        """Take an integer in [low, high]; a bool or 1.0 is none."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid_type(self.name(field), "an integer")
        self._check_range(field, value, low, high)
        return value

    def number(self, field: str, *, low: float | None = None, high: float | None = None) -> float | None:
        """Take an integer or float in [low, high] as a float; strict JSON has only finite ones."""
        value = self.value(field)
        if value is None:
            return None
        if not is_number(value):
            raise invalid_type(self.name(field), "a number")
        self._check_range(field, value, low, high)
        return float(value)

    def boolean(self, field: str) -> bool | None:
        value = self.value(field)
        if value is not None and not isinstance(value, bool):
            raise invalid_type(self.name(field), "true or false")
        return value

    def text(self, field: str, *, pattern: re.Pattern[str] | None = None, rule: str = "") -> str | None:
        """Take a string; with `pattern` the whole of it must match, else `rule` says what it must be."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid_type(self.name(field), "a string")
        if pattern is not None and not pattern.fullmatch(value):
            raise invalid_value(self.name(field), rule)
        return value

    def choice(self, field: str, allowed: Iterable[str]) -> str | None:
        """Take a string that is one of `allowed`."""
        value = self.text(field)
        if value is not None and value not in allowed:
            raise invalid_value(self.name(field), f"one of {', '.join(allowed)}")
        return value

    def items(self, field: str, *, high: int) -> list[Any] | None:
        """Take a list of at most `high` items, unchecked themselves."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid_type(self.name(field), "a list")
        if len(value) > high:
            raise invalid_value(self.name(field), f"a list of at most {high} items")
        return value

    def integers(self, field: str, *, count: int, low: int, high: int) -> tuple[int, ...] | None:
        items = self.items(field, high=count)
        return None if items is None else check_integers(self.name(field), items, low, high)

    def mapping(self, field: str) -> dict[str, Any] | None:
        value = self.value(field)
        if value is not None and not isinstance(value, dict):
            raise invalid_type(self.name(field), "an object")
        return value

    def nested(self, field: str) -> Fields | None:
        """Take an object as fields of their own, named by this one."""
        value = self.mapping(field)
        return None if value is None else self.inner(value, self.name(field))

    def inner(self, value: object, path: str) -> Fields:
        """Return `value`, an item of this object's, as fields under the same rule for unknown names."""
        if not isinstance(value, dict):
            raise invalid_type(path, "an object")
        return Fields(value, self._unknown, path)

    def ignore(self, names: Iterable[str]) -> None:
        """Accept fields that by their meaning ask nothing of this server."""
        self._taken.update(names)

    def refuse(self, names: Iterable[str]) -> None:
        """Refuse known fields that are not served, by name; null asks for nothing."""
        for field in names:
            if self.value(field) is not None:
                raise unsupported(self.name(field))

    def finish(self) -> None:
        """Refuse the first field nobody took, unless the operator lets them pass.

        One that names an adapter never passes: the answer would be another model's.
        """
        if self._unknown == "ignore":
            for field in sorted(ADAPTER_FIELDS - self._taken):
                if self._source.get(field):
                    raise unsupported(self.name(field))
            return
        for field in self._source:
            if field not in self._taken:
                raise ApiError(Code.UNKNOWN_FIELD, param=self.name(printable(field)))

    def _check_range(self, field: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            raise invalid_value(self.name(field), range_rule(low, high))


def range_rule(low: float | None, high: float | None) -> str:
    """Return the words for a closed range of which either end may be open."""
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


def check_strings(param: str, items: list[Any], chars: int) -> tuple[str, ...]:
    """Return `items` as non-empty strings of at most `chars` characters."""
    for item in items:
        if not isinstance(item, str):
            raise invalid_type(param, "a list of strings")
        if not 0 < len(item) <= chars:
            raise invalid_value(param, f"made of strings of 1 to {chars} characters")
    return tuple(items)


def check_integers(param: str, items: list[Any], low: int, high: int) -> tuple[int, ...]:
    """Return `items` as integers in [low, high]."""
    for item in items:
        if not is_integer(item):
            raise invalid_type(param, "a list of integers")
        if not low <= item <= high:
            raise invalid_value(param, f"made of integers {range_rule(low, high)}")
    return tuple(items)
