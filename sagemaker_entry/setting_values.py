"""One value of the environment: its text held to the rules of a setting, and what is said when one is broken.

Owns: the error of a wrong environment, choices, patterns, ranges. Must not know: which settings there are.
Invariant: a value comes out as its field's type and within its rules, or SettingsError is raised.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


class SettingsError(Exception):
    """The environment is wrong; the start stops. `hint` is the operator's next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def translated(source: str, text: str, name: str, foreign: Mapping[str, str]) -> str:
    """Return what another server's value means here; raises SettingsError for one that has no meaning."""
    if text not in foreign:
        raise SettingsError(
            f"`{source}={text}` is not supported", f"use one of {', '.join(foreign)}, or set `{name}`"
        )
    return foreign[text]


def parsed(source: str, text: str, field: dataclasses.Field[Any]) -> Any:
    """Return `text`, the value of the variable `source`, by the rules of `field`; raises SettingsError."""
    rules = field.metadata
    kind = str(field.type)
    if "choices" in rules and text not in rules["choices"]:
        raise SettingsError(f"`{source}={text}` is not a choice", "use one of " + ", ".join(rules["choices"]))
    if "pattern" in rules and not re.fullmatch(rules["pattern"], text):
        raise SettingsError(f"`{source}={text}` is malformed", f"it must be {rules['rule']}")
    if kind.startswith("str"):
        return text
    whole = kind.startswith("int")
    bounds = f"it must be {'a whole number' if whole else 'a number'} from {rules['low']} to {rules['high']}"
    if not re.fullmatch(r"[0-9]{1,12}" if whole else r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        raise SettingsError(f"`{source}={text}` is malformed", bounds)
    value = int(text) if whole else float(text)
    if not rules["low"] <= value <= rules["high"]:
        raise SettingsError(f"`{source}={text}` is out of range", bounds)
    return value
