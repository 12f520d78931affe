"""Where in its own tokens a sequence has been before: a guess at how it goes on.

Owns: one sequence's index of n-grams and what is read from it.
Must not know: when guessing pays, who verifies it. Standard library only.
Invariant: whatever the index says was compared with the history; memory is fixed when it is made, and a token
or a guess costs the same however long the history is.

    history   ... a b c d e f ... a b c | d e f        the last 3-gram was here before: guess what followed
    tables    per n: hash of an n-gram -> where its latest occurrence ended (0: none)

A slot that two n-grams hash to keeps the later one, so that of a history longer than the tables the recent
part stays. An n-gram enters once the token after it is known.
"""

from __future__ import annotations

from array import array
from typing import Final

SIZES: Final = (
    4,
    3,
    2,
)  # tokens of an n-gram, the longest first: the more alike, the likelier to go on alike
LEAST_BITS: Final = 8
MOST_BITS: Final = 14  # three tables of 16,384 positions: 192 KiB at most
CATCH_UP_TOKENS: Final = 1024  # indexed by one call: about a millisecond
_MIX: Final = 0x9E3779B1  # 2**32 / golden ratio: multiplicative hashing (Knuth, TAOCP 6.4)
_WORD: Final = (1 << 32) - 1


class NgramIndex:
    """The n-grams of one history, which only ever grows. `tokens` is the longest it will get."""

    def __init__(self, tokens: int) -> None:
        bits = min(max(tokens.bit_length(), LEAST_BITS), MOST_BITS)
        self._shift = 32 - bits
        self._ends = tuple(array("i", bytes(4 << bits)) for _ in SIZES)
        self._known = SIZES[-1] - 1  # n-grams that end up to here are in the tables, or too old for them

    @property
    def table_bytes(self) -> int:
        """Memory of the tables."""
        return sum(len(table) * table.itemsize for table in self._ends)

    def extend(self, history: array[int]) -> None:
        """Take note of the next tokens of `history`, as many as one call may."""
        oldest = len(history) - len(self._ends[0])  # what lies before would be overwritten
        first = max(self._known + 1, oldest)
        last = min(first + CATCH_UP_TOKENS, len(history))
        for end in range(first, last):
            for (_, slot), table in zip(self._slots(history, end), self._ends[::-1], strict=False):
                table[slot] = end
        self._known = max(self._known, last - 1)

    def propose(self, history: array[int], count: int, least: int = SIZES[-1]) -> array[int]:
        """Return up to `count` tokens that may follow `history`: what followed its longest known ending.

        An ending shorter than `least` tokens does not count. A repetition shorter than `count` is taken to go
        on.
        """
        end = len(history)
        for size, slot in reversed(self._slots(history, end)):
            at = self._ends[SIZES.index(size)][slot]
            if at and size >= least and history[at - size : at] == history[end - size : end]:
                period = history[at : min(end, at + count)]
                return (period * -(-count // len(period)))[:count]
        return array("i")

    def _slots(self, history: array[int], end: int) -> list[tuple[int, int]]:
        """Return (n, slot) of the n-grams that end at `end`, the shortest first."""
        slots = []
        mixed = history[end - 1] if end else 0
        for size in range(2, min(SIZES[0], end) + 1):
            mixed = (mixed * _MIX + history[end - size] + 1) & _WORD
            slots.append((size, (mixed * _MIX & _WORD) >> self._shift))
        return slots
