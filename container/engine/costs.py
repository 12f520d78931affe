"""What a step costs by the number of its tokens, as measured, and whether drafts are worth theirs.

Owns: the moving averages and the comparison.
Must not know: clocks (it is told seconds), sequences, who guesses. Standard library only.
Invariant: what it says changes speed, never output; no answer is final, since a size that is refused is tried
again now and then.

A step of more tokens reads the same weights, but how much longer it takes depends on the kernels, the model
and the machine: on 2 AVX2 cores in fp32 two tokens took 1.5 times as long as one, nine 2.2 times.
"""

from __future__ import annotations

from typing import Final

SLOWER_WEIGHT: Final = 0.2  # of a step that took longer than known: often the machine's other load
FASTER_WEIGHT: Final = 0.5  # of one that did not: the first of a size prepares what the next ones find done
MOST_TOKENS: Final = 256  # sizes kept; a step that large is not bound by its weights
RETRY_EVERY: Final = 32  # refusals after which drafts are verified all the same, to measure anew


class StepCosts:
    """Seconds of steps in which every row decodes, by their tokens, drafts included."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._refusals = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Record that a step of `tokens` tokens took `seconds`."""
        if tokens <= MOST_TOKENS and seconds > 0.0:
            known = self._seconds.get(tokens, seconds)
            weight = FASTER_WEIGHT if seconds < known else SLOWER_WEIGHT
            self._seconds[tokens] = known + weight * (seconds - known)

    def worth(self, rows: int, drafts: int, expected: float) -> bool:
        """Return whether `drafts` more tokens, of which `expected` will hold, make a step of `rows` faster.

        That is in tokens a second. What was never measured is taken to be worth it.
        """
        plain, guessing = self._seconds.get(rows), self._seconds.get(rows + drafts)
        if plain is None or guessing is None or (rows + expected) * plain > rows * guessing:
            return True
        self._refusals += 1
        return self._refusals % RETRY_EVERY == 0
