"""Stop strings over a stream of text pieces.

Owns: the automaton of Aho and Corasick (1975) over the stop strings of one request.
Must not know: tokens, detokenizing, what is done at a match.
Invariant: no character is held that cannot be part of a match, none is let go that can; time is linear in the
    text, whatever the stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """The stop string found at [start, stop) of all text pushed."""

    start: int
    stop: int
    text: str


class StopMatcher:
    """Finds the match that completes earliest; of those completing together, the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty; raises ValueError otherwise."""
        if not all(stops):
            raise ValueError("empty stop string")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]  # the longest stop that ends in this state
        self._back = [0]  # the state of the longest proper suffix
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._length = 0  # characters pushed

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._next[state].get(char)
            if following is None:
                following = len(self._next)
                self._next[state][char] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
                self._back.append(0)
            state = following
        self._found[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._next[state].items():
                self._back[following] = self._step(self._back[state], char)
                queue.append(following)
            if self._found[state] is None:
                self._found[state] = self._found[self._back[state]]

    def _step(self, state: int, char: str) -> int:
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._back[state]

    def push(self, text: str, *, ignore: bool = False) -> Match | None:
        """Read `text`; return the first match, after which nothing more is read.

        With `ignore` a match that completes here does not count, and is not held back for its own sake.
        """
        for char in text:
            self._state = self._step(self._state, char)
            self._length += 1
            found = self._found[self._state]
            if found is not None and not ignore:
                return Match(self._length - len(found), self._length, found)
        while ignore and self._found[self._state] is not None and not self._next[self._state]:
            self._state = self._back[self._state]  # complete and not the start of anything longer
        return None

    @property
    def held(self) -> int:
        """Characters at the end of the text that start some stop string, and so may yet be taken back."""
        return self._depth[self._state]
