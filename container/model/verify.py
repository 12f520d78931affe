"""From the logits of a row's last positions to the tokens it yields: the drafts that hold, and one more.

Owns: the order of drawing at the positions of one row.
Must not know: how a token is drawn, who guessed, what follows from the tokens.
Invariant: each token is drawn as it would be without drafts: with its own position's draw, after all tokens
before it were counted and told to the grammar. No draft changes what is drawn.

    row      | t | d1 | d2 | d3 |        t is known, the rest are drafts
    drawn      d1   d2   x               the third draft fails: the row yields d1 d2 x
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from container.engine.request import SampledToken
from container.model.masks import Verdict
from container.model.rows import Logits


class Drawing(Protocol):
    """What is needed of a sampler."""

    def verdict(self, slot: int) -> Verdict | None: ...

    def sample(
        self, logits: Logits, slots: Sequence[int], positions: Sequence[int], hold_stops: Sequence[bool]
    ) -> list[SampledToken | None]: ...


def draw_along(
    sampler: Drawing, logits: Logits, slot: int, position: int, hold_stops: bool, drafts: array[int]
) -> list[SampledToken]:
    """Return the tokens drawn from `logits` (1 + drafts, vocabulary), the first of them at `position`.

    Drawing ends with the first token that is not the next draft or that completes the grammar, and before one
    that cannot be drawn: nothing at all if it is the first, else the next step will find that out.
    """
    drawn: list[SampledToken] = []
    for place in range(len(drafts) + 1):
        row = logits[place : place + 1]
        (token,) = sampler.sample(row, [slot], [position + place], [hold_stops])
        if token is None:
            break
        drawn.append(token)
        if sampler.verdict(slot) is Verdict.COMPLETE or place == len(drafts) or token.token != drafts[place]:
            break
    return drawn
