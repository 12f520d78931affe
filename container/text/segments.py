"""Finding the control tokens that the template itself wrote.

Owns: matching added tokens, with the tokenizers library's rules: leftmost, longest, `single_word`, then the
    white space that `lstrip` and `rstrip` tokens swallow.
Must not know: how text between them becomes ids.
Invariant: a match lies wholly inside trusted ranges; white space it swallows may lie outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from container.text.provenance import Span
from container.text.vocabulary import ControlToken


class Cut(NamedTuple):
    """A control token at [start, stop) of the text, swallowed white space included."""

    start: int
    stop: int
    id: int


class ControlMatcher:
    """Finds control tokens in rendered text, in time linear in the text."""

    def __init__(self, controls: Sequence[ControlToken]) -> None:
        self._tokens = {token.content: token for token in controls}
        first = "".join(sorted({token.content[0] for token in controls}))
        self._first = re.compile(f"[{re.escape(first)}]") if first else None
        lengths: dict[str, set[int]] = {}
        for token in controls:
            lengths.setdefault(token.content[0], set()).add(len(token.content))
        self._lengths = {char: sorted(sizes, reverse=True) for char, sizes in lengths.items()}

    def cuts(self, text: str, trusted: Iterable[Span]) -> list[Cut]:
        """Return the control tokens of `text` inside `trusted` (ascending ranges), in order."""
        found: list[Cut] = []
        end = 0
        for token, start in self._matches(text, trusted):
            stop = start + len(token.content)
            if token.single_word and (_is_word(text, start - 1) or _is_word(text, stop)):
                continue
            if token.lstrip:
                start = max(end, len(text[end:start].rstrip()) + end)
            if token.rstrip:
                stop = _skip_space(text, stop)
            found.append(Cut(max(start, end), stop, token.id))
            end = stop
        return found

    def _matches(self, text: str, trusted: Iterable[Span]) -> Iterator[tuple[ControlToken, int]]:
        if self._first is None:
            return
        for start, stop in trusted:
            position = start
            while (candidate := self._first.search(text, position, stop)) is not None:
                position = candidate.start()
                token = self._longest(text, position, stop)
                if token is None:
                    position += 1
                else:
                    yield token, position
                    position += len(token.content)

    def _longest(self, text: str, start: int, stop: int) -> ControlToken | None:
        for length in self._lengths[text[start]]:
            if start + length <= stop and (token := self._tokens.get(text[start : start + length])):
                return token
        return None


def _is_word(text: str, index: int) -> bool:
    return 0 <= index < len(text) and (text[index].isalnum() or text[index] == "_")


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
