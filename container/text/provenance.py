"""A string that remembers which of its characters the vendor's template wrote.

Owns: `Traced`, and how trust moves through the string operations templates use.
Must not know: Jinja, tokens, messages.
Invariant: trust is only ever copied from characters that had it. An operation not written here returns a
    plain str, which has none: forgetting one loses a control token (noticed at load), never forges one.

    "<|im_start|>" + "user" + "\n" + content        text
     ^^^^^^^^^^^^    ^^^^     ^^                      spans: [0, 17), and nothing of content
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

Span = tuple[int, int]  # [start, stop) in characters


class Traced(str):
    """A str with the ranges of its trusted characters; equal to, and hashed as, the plain string."""

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: object = "", spans: tuple[Span, ...] = ()) -> Traced:
        """Nothing is trusted unless said so: library code may call `type(s)(other)`."""
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    def __str__(self) -> str:
        return self  # templates put str() round every output; the default would forget

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return concat((self, other))

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return concat((other, self))

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._cut(start, max(start, stop))
        return str.__getitem__(self, key)

    def _cut(self, start: int, stop: int) -> Traced:
        kept = ((max(a, start) - start, min(b, stop) - start) for a, b in self.spans)
        return Traced(str.__getitem__(self, slice(start, stop)), tuple(s for s in kept if s[0] < s[1]))

    def lstrip(self, chars: str | None = None, /) -> Traced:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Traced:
        return self._cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None, /) -> Traced:
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str, /) -> Traced:
        return self._cut(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> Traced:
        return self._cut(0, len(self) - len(suffix) if suffix and self.endswith(suffix) else len(self))

    def join(self, parts: Iterable[str], /) -> Traced:
        return concat(_separated(self, parts))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return concat(_separated(new, self._pieces(old, int(count))))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        if not sep:
            return str.split(self, sep, maxsplit)
        return list(self._pieces(sep, int(maxsplit)))

    def _pieces(self, sep: str, limit: int) -> Iterator[Traced]:
        start = 0
        while limit != 0 and (found := self.find(sep, start)) >= 0:
            yield self._cut(start, found)
            start = found + len(sep)
            limit -= 1
        yield self._cut(start, len(self))

    def _recased(self, text: str) -> str:
        # Case mapping only ever lengthens, so an equal length means that every character stayed in its place.
        return Traced(text, self.spans) if len(text) == len(self) else text

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))


def trusted(text: str) -> Traced:
    """Return `text` with every character trusted."""
    return Traced(text, ((0, len(text)),) if text else ())


def concat(parts: Iterable[str]) -> Traced:
    """Return the parts as one string; trusted ranges that touch become one."""
    texts: list[str] = []
    spans: list[Span] = []
    end = 0
    for part in parts:
        if isinstance(part, Traced):
            for start, stop in part.spans:
                if spans and spans[-1][1] == end + start:
                    spans[-1] = (spans[-1][0], end + stop)
                else:
                    spans.append((end + start, end + stop))
        texts.append(part)
        end += len(part)
    return Traced("".join(texts), tuple(spans))


def _separated(separator: str, parts: Iterable[str]) -> Iterator[str]:
    for index, part in enumerate(parts):
        if index and separator:
            yield separator
        yield part
