"""One JSON value read as it arrives: where it ends, whether it can still be valid.

Owns: the grammar of JSON (RFC 8259) as a machine over pieces of text.
Must not know: tools, what a value means.
Invariant: time is linear in the text however it is cut; what is accepted whole, `json.loads` accepts.
"""

from __future__ import annotations

import enum
import re
from typing import Final

MAX_DEPTH: Final = 64  # deeper than any schema the grammar compiler takes
MAX_SCALAR_CHARS: Final = 400  # a float of float64's whole range written out has 310 digits

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_CHARS: Final = re.compile(r"[-+0-9.a-zE]*")
_SCALAR: Final = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX: Final = re.compile(r"[0-9a-fA-F]")


class _At(enum.Enum):
    VALUE = enum.auto()
    FIRST_ITEM = enum.auto()  # after `[`
    FIRST_KEY = enum.auto()  # after `{`
    KEY = enum.auto()  # after `,` in an object
    COLON = enum.auto()
    AFTER = enum.auto()  # after a value inside an array or object
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    SCALAR = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class JsonScanner:
    """Reads one value from its first character on; white space before it is skipped too."""

    def __init__(self) -> None:
        self._at = _At.VALUE
        self._open: list[str] = []  # the closing brackets that are due
        self._key = False  # the string being read is a key
        self._hex_left = 0
        self._scalar = ""

    @property
    def done(self) -> bool:
        return self._at is _At.DONE

    @property
    def failed(self) -> bool:
        return self._at is _At.FAILED

    def feed(self, text: str, start: int = 0) -> int:
        """Read `text` from `start`; return where reading ended: its length, or after the value, or the fault.

        A number at the top ends with the character after it, so it needs one more.
        """
        place = start
        while place < len(text) and self._at not in (_At.DONE, _At.FAILED):
            place = self._step(text, place)
        return place

    def _step(self, text: str, place: int) -> int:
        if self._at is _At.STRING:
            return self._string(text, place)
        if self._at is _At.SCALAR:
            return self._scalar_text(text, place)
        if self._at is _At.ESCAPE:
            return self._escape(text, place)
        if self._at is _At.HEX:
            return self._hex(text, place)
        space = _SPACE.match(text, place)
        place = place if space is None else space.end()
        return place if place == len(text) else self._structure(text[place], place)

    def _structure(self, char: str, place: int) -> int:
        at = self._at
        if at is _At.COLON:
            return self._go(_At.VALUE, place) if char == ":" else self._fail(place)
        if at in (_At.KEY, _At.FIRST_KEY) and char == '"':
            self._key = True
            return self._go(_At.STRING, place)
        if at in (_At.FIRST_KEY, _At.FIRST_ITEM, _At.AFTER) and char == self._open[-1]:
            self._open.pop()
            return self._value_ended(place + 1)
        if at is _At.AFTER and char == ",":
            return self._go(_At.KEY if self._open[-1] == "}" else _At.VALUE, place)
        if at in (_At.VALUE, _At.FIRST_ITEM):
            return self._value(char, place)
        return self._fail(place)

    def _value(self, char: str, place: int) -> int:
        if char in "{[":
            if len(self._open) == MAX_DEPTH:
                return self._fail(place)
            self._open.append("}" if char == "{" else "]")
            return self._go(_At.FIRST_KEY if char == "{" else _At.FIRST_ITEM, place)
        if char == '"':
            self._key = False
            return self._go(_At.STRING, place)
        if char in "-0123456789tfn":
            self._at = _At.SCALAR
            self._scalar = ""
            return place
        return self._fail(place)

    def _string(self, text: str, place: int) -> int:
        run = _PLAIN.match(text, place)
        place = place if run is None else run.end()
        if place == len(text):
            return place
        if text[place] == "\\":
            return self._go(_At.ESCAPE, place)
        if text[place] != '"':
            return self._fail(place)
        if self._key:
            return self._go(_At.COLON, place)
        return self._value_ended(place + 1)

    def _escape(self, text: str, place: int) -> int:
        if text[place] == "u":
            self._hex_left = 4
            return self._go(_At.HEX, place)
        return self._go(_At.STRING, place) if text[place] in '"\\/bfnrt' else self._fail(place)

    def _hex(self, text: str, place: int) -> int:
        if not _HEX.match(text, place):
            return self._fail(place)
        self._hex_left -= 1
        return self._go(_At.HEX if self._hex_left else _At.STRING, place)

    def _scalar_text(self, text: str, place: int) -> int:
        run = _SCALAR_CHARS.match(text, place)
        end = place if run is None else run.end()
        self._scalar += text[place:end]
        if len(self._scalar) > MAX_SCALAR_CHARS:
            return self._fail(place)
        if end == len(text):
            return end
        return self._value_ended(end) if _SCALAR.fullmatch(self._scalar) else self._fail(end)

    def _value_ended(self, place: int) -> int:
        self._at = _At.AFTER if self._open else _At.DONE
        return place

    def _go(self, at: _At, place: int) -> int:
        """Take the character at `place` and go on to `at`."""
        self._at = at
        return place + 1

    def _fail(self, place: int) -> int:
        self._at = _At.FAILED
        return place
