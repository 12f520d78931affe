"""How much one sequence guesses ahead, by how its guesses fared.

Owns: a sequence's n-gram index, its moving acceptance rate, the number of tokens it guesses next.
Must not know: other sequences, the step, budgets. Standard library only.
Invariant: a sequence whose guesses fail guesses at most once in PROBE_TOKENS tokens, later ever less often.

The numbers were chosen on recorded answers of the demo model, greedy copies of text and draws at temperature
1, replayed against three tables of step times: copies became 1.9 to 2.6 times as fast, draws 0.996 to 1.003.
"""

from __future__ import annotations

import math
from array import array
from typing import Final

from container.engine.ngram import SIZES, NgramIndex

FIRST_RATE: Final = 0.5  # of a sequence that nothing is known about
WORTHWHILE_RATE: Final = 0.3  # below it a guess costs more than it brings
SURE_RATE: Final = 0.6  # from it on an ending of two tokens is enough to guess from
UNSURE_NGRAM: Final = 3  # tokens; in prose pairs recur all the time and are rarely followed by the same
WEIGHT: Final = 0.15  # of the latest draft in the moving rate
FIRST_TOKENS: Final = 2  # drafts of the first guess, doubled as they hold
PROBE_TOKENS: Final = 32  # generated between two guesses while they fail; doubled each time ...
LONGEST_PROBE_TOKENS: Final = 256  # ... up to this


class Guesses:
    """One sequence's guesses. `tokens` is the longest it will get, `rate` how others' guesses fare."""

    def __init__(self, tokens: int, rate: float = FIRST_RATE) -> None:
        self._index = NgramIndex(tokens)
        self.rate = rate  # share of judged drafts that held, the latest counting most
        self.probing = False  # the latest proposal was made to see whether the rate still holds
        self._count = FIRST_TOKENS
        self._pause = PROBE_TOKENS
        self._next: int | None = None  # history from which on it guesses again

    def propose(self, history: array[int], most: int) -> array[int]:
        """Return up to `most` tokens that may follow `history`; none while its guesses fail."""
        self._index.extend(history)
        self.probing = self.rate < WORTHWHILE_RATE
        if self.probing and self._next is None:
            self._pause_from(len(history))
        if self.probing and len(history) < (self._next or 0):
            return array("i")
        least = SIZES[-1] if self.rate >= SURE_RATE else UNSURE_NGRAM
        return self._index.propose(history, min(most, self._count), least)

    def settle(self, history: array[int], drafts: int, accepted: int) -> None:
        """Learn that `accepted` of `drafts` tokens guessed after `history` were sampled.

        What lies beyond the first that failed was not judged.
        """
        judged = min(drafts, accepted + 1)
        self.rate += (1 - (1 - WEIGHT) ** judged) * (accepted / judged - self.rate)
        if accepted == drafts:
            self._count = 2 * drafts
            if self.probing:
                self.rate = max(self.rate, FIRST_RATE)  # what was known is out of date
        else:
            self._count = _held(self.rate)
        if self.rate >= WORTHWHILE_RATE:
            self._pause = PROBE_TOKENS
        else:
            self._pause_from(len(history))

    def _pause_from(self, tokens: int) -> None:
        self._next = tokens + self._pause
        self._pause = min(2 * self._pause, LONGEST_PROBE_TOKENS)


def _held(rate: float) -> int:
    """Return how many drafts in a row hold with a chance of WORTHWHILE_RATE when each does with `rate`."""
    if not 0.0 < rate < 1.0:
        return 1
    return max(1, int(math.log(WORTHWHILE_RATE) / math.log(rate)))
