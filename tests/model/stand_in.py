"""A greedy sampler and a scorer, so that runner tests stand on logits alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from container.engine.request import SampledToken
from container.engine.step import SlotAssignment
from container.model.rows import Logits


class GreedySampler:
    """Draws the best token; notes what it was told."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.assigned: dict[int, SlotAssignment] = {}
        self.positions: list[int] = []
        self.held: list[bool] = []
        self.logits: dict[int, Tensor] = {}  # slot -> the row its last token was drawn from

    def assign(self, assignment: SlotAssignment) -> None:
        self.assigned[assignment.slot] = assignment

    holds_grammars = False

    def prepare(self, slots: Sequence[int]) -> None:
        assert all(slot in self.assigned for slot in slots)

    def verdict(self, slot: int) -> None:
        return None

    def release(self, slot: int) -> None:
        self.assigned.pop(slot, None)

    def reset(self) -> None:
        self.assigned.clear()

    def sample(
        self, logits: Logits, slots: Sequence[int], positions: Sequence[int], hold_stops: Sequence[bool]
    ) -> list[SampledToken | None]:
        logits = torch.as_tensor(logits)
        assert logits.shape == (len(slots), self.vocabulary)
        assert logits.dtype == torch.float32
        assert all(slot in self.assigned for slot in slots)
        self.positions += positions
        self.held += hold_stops
        self.logits.update(zip(slots, logits.clone(), strict=True))
        return [None if row.isnan().any() else SampledToken(int(row.argmax())) for row in logits]


def score(logits: Logits, tokens: Sequence[int], top: int) -> list[SampledToken]:
    logprobs = torch.log_softmax(torch.as_tensor(logits), dim=-1)
    scored = []
    for row, token in zip(logprobs, tokens, strict=True):
        best = row.topk(top)
        pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        scored.append(SampledToken(token, float(row[token]), pairs))
    return scored
