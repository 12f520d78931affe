"""The JSON object of one call, read as it arrives: its name, and its arguments as they come.

Owns: which keys count, what makes an object no call.
Must not know: what stands round the object, which deltas come of it.
Invariant: `fragments` joined are the text of one JSON object; nothing else of the call is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Final

from container.text.tool_json import JsonScanner

MAX_NAME_CHARS: Final = 256  # with quotes and escapes; names are offered with at most 64
SPACE: Final = " \t\n\r"
_ARGUMENTS: Final = frozenset({"arguments", "parameters"})  # models mix them up


class CallObject:
    """Reads one `{"name": N, "arguments": A}`; other keys are read over."""

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self.fragments: list[str] = []  # of the arguments, not yet taken
        self.done = False
        self.failed = False
        self._names = names
        self._seen: set[str] = set()
        self._read: Callable[[str, int], int] = self._open
        self._scanner = JsonScanner()
        self._captured = ""
        self._key_text = ""
        self._alone = False

    def arguments_of(self, name: str) -> None:
        """Read the arguments alone: the name stood before them."""
        self.name = name
        self._key_text = "arguments"
        self._alone = True
        self._read = self._before_value

    def feed(self, text: str, place: int) -> int:
        """Read on from `place`; return where it ended, at a fault or after the closing brace."""
        while place < len(text) and not self.done and not self.failed:
            place = self._read(text, place)
        return place

    def _open(self, text: str, place: int) -> int:
        return self._expect(text, place, {"{": self._first_key})

    def _first_key(self, text: str, place: int) -> int:
        if text[place] == "}":
            return self._fail(place)  # no name, no arguments
        return self._key(text, place)

    def _key(self, text: str, place: int) -> int:
        if text[place] in SPACE:
            return place + 1
        if text[place] != '"':
            return self._fail(place)
        self._begin(self._in_key)
        return place

    def _in_key(self, text: str, place: int) -> int:
        place = self._capture(text, place)
        if self._scanner.done:
            self._key_text = json.loads(self._captured)
            twice = self._key_text in self._seen or (self._key_text in _ARGUMENTS and self._seen & _ARGUMENTS)
            self._seen.add(self._key_text)
            self._read = self._colon
            if twice:
                return self._fail(place)
        return place

    def _colon(self, text: str, place: int) -> int:
        return self._expect(text, place, {":": self._before_value})

    def _before_value(self, text: str, place: int) -> int:
        if text[place] in SPACE:
            return place + 1
        if self._key_text in _ARGUMENTS:
            if text[place] != "{":
                return self._fail(place)
            self._begin(self._in_arguments)
        else:
            self._begin(self._in_name if self._key_text == "name" else self._in_other)
        return place

    def _in_name(self, text: str, place: int) -> int:
        place = self._capture(text, place)
        if self._scanner.done:
            name = json.loads(self._captured)
            if not isinstance(name, str) or name not in self._names:
                return self._fail(place)
            self.name = name
            self._read = self._next
        return place

    def _in_arguments(self, text: str, place: int) -> int:
        end = self._scan(text, place)
        self.fragments.append(text[place:end])
        return end

    def _in_other(self, text: str, place: int) -> int:
        return self._scan(text, place)

    def _next(self, text: str, place: int) -> int:
        if text[place] == "}":
            self.failed = self.name is None or not self._seen & _ARGUMENTS
            self.done = not self.failed
            return place + (not self.failed)
        return self._expect(text, place, {",": self._key})

    def _begin(self, read: Callable[[str, int], int]) -> None:
        self._scanner = JsonScanner()
        self._captured = ""
        self._read = read

    def _scan(self, text: str, place: int) -> int:
        end = self._scanner.feed(text, place)
        self.failed = self._scanner.failed
        if self._scanner.done:
            self._read = self._next
            self.done = self._alone
        return end

    def _capture(self, text: str, place: int) -> int:
        """Scan what is short by its nature and keep it."""
        end = self._scanner.feed(text, place)
        self._captured += text[place:end]
        self.failed = self._scanner.failed or len(self._captured) > MAX_NAME_CHARS
        return end

    def _expect(self, text: str, place: int, ways: dict[str, Callable[[str, int], int]]) -> int:
        char = text[place]
        if char in ways:
            self._read = ways[char]
        elif char not in SPACE:
            return self._fail(place)
        return place + 1

    def _fail(self, place: int) -> int:
        self.failed = True
        return place
