"""When guessing ahead may be tried, and how far.

Owns: the rules by which a decoding row gets drafts; see `guesses` for what a sequence has learnt itself.
Must not know: blocks, budgets (who asks says how much room there is), time. Standard library only.
Invariant: no draft goes beyond what its sequence may hold, and all positions of a row sample under one rule.

Verifying reads the same weights once for several tokens, so it pays while a step is bound by reading them:
with few sequences. With many it takes from the others (1.8 times slower at a high load: vLLM blog, 2024-10).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from typing import Final

from container.engine.costs import StepCosts
from container.engine.guesses import FIRST_RATE, Guesses
from container.engine.sequence import Sequence
from container.engine.step import Capacity

WEIGHT_OF_ONE: Final = 0.05  # of the latest guess in the rate of all sequences
MOST_RUNNING: Final = 16  # sequences beside which a guess may be cheaper than the step it saves


class Speculation:
    """Asked once a step, and once for each row that decodes."""

    def __init__(self, capacity: Capacity) -> None:
        self._most = capacity.draft_tokens
        self._rate = FIRST_RATE  # of all sequences: what a new one is expected to do
        self.costs = StepCosts()

    def worthwhile(self, running: Collection[Sequence]) -> bool:
        """Return whether rows may have drafts now: few run, and none of them waits for its prompt."""
        return (
            self._most > 0
            and len(running) <= MOST_RUNNING
            and all(sequence.remaining == 1 for sequence in running)
        )

    def propose(self, sequence: Sequence, room: int) -> array[int]:
        """Return at most `room` drafts for a sequence that decodes, often none."""
        asked, made = sequence.request, sequence.generated
        most = min(self._most, room, asked.max_tokens - made - 1)
        if made < asked.min_tokens:  # the row holds stop ids back, so all of its positions must
            most = min(most, asked.min_tokens - made - 1)
        if most < 1 or made == 0 or sequence.expects or sequence.wants_prompt_logprobs:
            return array("i")
        if sequence.guesses is None:
            sequence.guesses = Guesses(sequence.limit_tokens, self._rate)
        return sequence.guesses.propose(sequence.history, most)

    def pays(self, rows: int, proposals: Mapping[Sequence, array[int]]) -> bool:
        """Return whether a step of `rows` is better off with `proposals`, by what such steps took so far.

        A probe is made whatever it costs: it tells whether guesses hold by now, and there are few.
        """
        guesses = [(s.guesses, len(drafts)) for s, drafts in proposals.items() if s.guesses is not None]
        expected = sum(each.rate * drafts for each, drafts in guesses)
        probing = any(each.probing for each, _ in guesses)
        return probing or self.costs.worth(rows, sum(drafts for _, drafts in guesses), expected)

    def settle(self, sequence: Sequence, drafts: int, accepted: int) -> None:
        """Learn how many of a row's drafts were sampled."""
        assert sequence.guesses is not None and accepted <= drafts, "who has drafts has guessed"
        sequence.guesses.settle(sequence.history, drafts, accepted)
        self._rate += WEIGHT_OF_ONE * (accepted / min(drafts, accepted + 1) - self._rate)
