"""How much one sequence guesses ahead, by how its guesses fared.

Owns: a sequence's n-gram index, its moving acceptance rate, the number of tokens it guesses next.
Must not know: other sequences, the step, budgets. Standard library only.
Invariant: a sequence whose guesses fail guesses at most once in PROBE_TOKENS tokens, later ever less often.
"""

from __future__ import annotations

from array import array
from typing import Final

from container.engine.ngram import NgramIndex

FIRST_RATE: Final = 0.5  # two guesses that fail at once are enough to stop
WORTHWHILE_RATE: Final = 0.3  # below it a guess costs more than it brings
WEIGHT: Final = 0.3  # of the latest guess in the moving rate: one that holds lifts any rate to worthwhile
FIRST_TOKENS: Final = 2  # drafts of the first guess, doubled as they hold
PROBE_TOKENS: Final = 32  # generated between two guesses while they fail; doubled each time ...
LONGEST_PROBE_TOKENS: Final = 256  # ... up to this


class Guesses:
    """One sequence's guesses. `tokens` is the longest it will get."""

    def __init__(self, tokens: int) -> None:
        self._index = NgramIndex(tokens)
        self.rate = FIRST_RATE  # share of drafts accepted, the latest counting most
        self._count = FIRST_TOKENS
        self._pause = PROBE_TOKENS
        self._next = 0  # history from which on it guesses again

    def propose(self, history: array[int], most: int) -> array[int]:
        """Return up to `most` tokens that may follow `history`; none while its guesses fail."""
        self._index.extend(history)
        if len(history) < self._next:
            return array("i")
        return self._index.propose(history, min(most, self._count))

    def settle(self, history: array[int], drafts: int, accepted: int) -> None:
        """Learn that `accepted` of `drafts` tokens guessed after `history` were sampled."""
        self.rate += WEIGHT * (accepted / drafts - self.rate)
        self._count = 2 * drafts if accepted == drafts else max(1, accepted)
        if self.rate >= WORTHWHILE_RATE:
            self._pause = PROBE_TOKENS
        else:
            self._next = len(history) + self._pause
            self._pause = min(2 * self._pause, LONGEST_PROBE_TOKENS)
