"""One answer on its way out: ids in, final pieces of text out.

Owns: which share of the text belongs to which token, what is held back, the cut at a stop string.
Must not know: the engine, dialects, why generation ended.
Invariant: one piece per token pushed, in order, none taken back; joined, their texts are the answer.

    text   ... t h e   e n d \\n U s e r :
                    |          ^held: starts a stop string
                    ^final: these tokens are out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from container.text.detok import Detokenizer
from container.text.stops import Match, StopMatcher


@dataclass(frozen=True, slots=True)
class Piece:
    """A token and its final share of the text; `text` is empty inside a character and for hidden tokens."""

    token: int = field(repr=False)
    text: str = field(repr=False)
    tag: object = field(repr=False)  # the caller's, untouched
    special: bool


@dataclass(slots=True)
class _Held:
    piece: Piece
    start: int  # where its text begins in the whole text, in characters
    open: bool  # ends inside a character: it belongs to the text that completes it

    @property
    def stop(self) -> int:
        return self.start + len(self.piece.text)


class StreamModel(Protocol):
    """What a stream needs of TextModel."""

    def is_special(self, token: int, /) -> bool: ...

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer: ...


class TextStream:
    """Detokenizes one sequence and watches for its stop strings."""

    def __init__(
        self,
        model: StreamModel,
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Matches that complete within the first `min_tokens` tokens do not count."""
        self._model = model
        self._detokenizer = model.detokenizer(prompt_ids, skip_special_tokens=skip_special_tokens)
        self._stops = StopMatcher(stops)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._tokens = 0
        self._length = 0  # of the whole text so far, in characters
        self._held: deque[_Held] = deque()
        self.stopped: str | None = None

    def push(self, token: int, tag: object = None) -> list[Piece]:
        """Return the pieces that became final; nothing once `stopped` is set."""
        if self.stopped is not None:
            return []
        self._tokens += 1
        special = self._model.is_special(token)
        hidden = special and self._skip_special_tokens
        text = "" if hidden else self._detokenizer.push(token)
        still_open = not hidden and self._detokenizer.pending
        self._held.append(_Held(Piece(token, text, tag, special), self._length, still_open))
        return self._read(text)

    def finish(self) -> list[Piece]:
        """Return all that is left, an unfinished character as U+FFFD; call once, after the last token."""
        if self.stopped is not None:
            return []
        rest = self._detokenizer.flush()
        if rest and self._held:
            last = self._held[-1]
            last.piece = replace(last.piece, text=last.piece.text + rest)
            last.open = False
        return self._read(rest) + self._release(self._length, closed=True)

    def _read(self, text: str) -> list[Piece]:
        self._length += len(text)
        match = self._stops.push(text, ignore=self._tokens <= self._min_tokens)
        if match is not None:
            return self._cut(match)
        return self._release(self._length - self._stops.held, closed=False)

    def _release(self, final: int, *, closed: bool) -> list[Piece]:
        """Return held pieces whose text ends at or before `final`.

        A token that ends inside a character goes out with that character, not before it.
        """
        pieces = []
        while self._held and self._held[0].stop <= final:
            if self._held[0].open and self._held[0].stop == final and not closed:
                break
            pieces.append(self._held.popleft().piece)
        return pieces

    def _cut(self, match: Match) -> list[Piece]:
        """Return what comes before the match (through it, with `include_stop`); the rest is gone."""
        self.stopped = match.text
        end = match.stop if self._include_stop else match.start
        pieces = []
        for held in self._held:
            beyond = held.start > end or (held.start == end and (held.open or bool(held.piece.text)))
            if beyond:
                break
            text = held.piece.text[: end - held.start]
            pieces.append(replace(held.piece, text=text))
        self._held.clear()
        return pieces
