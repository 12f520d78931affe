"""Who is next: one queue per tenant, deficit round robin over tenants, counted in tokens.

Owns: waiting and preempted sequences, each tenant's credit.
Must not know: blocks, slots, the runner. Standard library only.
Invariant: inside a tenant sequences stand in order of arrival, so preempted ones come first; a tenant without
waiting sequences has no credit.

Shreedhar and Varghese, "Efficient fair queuing using deficit round robin" (1995). A sequence is charged the
prompt and output it declared; what it did not use goes back to its tenant when it ends.
Bound: a sequence whose tenant has C tokens declared up to and including it is chosen within ceil(C / quantum)
rounds, and in a round each other tenant uses at most one quantum and twice the cost of its largest sequence.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from container.engine.sequence import Sequence

_arrival = attrgetter("serial")


def cost(sequence: Sequence) -> int:
    """Return the tokens its tenant is charged when `sequence` is taken."""
    return 0 if sequence.paid else sequence.limit_tokens


@dataclass(slots=True, eq=False)
class _Lane:
    """One tenant's queue."""

    tenant: str
    credit: int = 0  # tokens
    waiting: list[Sequence] = field(default_factory=list)  # by serial

    def visits(self, quantum: int) -> int:
        """Return how often it must be given a quantum until the first in the queue can be paid."""
        return max(0, -(-(cost(self.waiting[0]) - self.credit) // quantum))


class TenantQueues:
    """The waiting line. `quantum` is the tokens a tenant gets per round."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._ring: deque[_Lane] = deque()  # the tenant being served stands first
        self._lanes: dict[str, _Lane] = {}
        self._in_turn = False  # the first of the ring was given its quantum and may still spend it
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at the place its age gives it."""
        lane = self._lanes.get(sequence.tenant)
        if lane is None:
            lane = self._lanes[sequence.tenant] = _Lane(sequence.tenant)
            self._ring.append(lane)
        bisect.insort(lane.waiting, sequence, key=_arrival)
        self._size += 1

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence that is in the queue."""
        lane = self._lanes[sequence.tenant]
        lane.waiting.remove(sequence)
        self._shrunk(lane)

    def head(self) -> Sequence | None:
        """Return whose turn it is; the answer stays the same until it is taken or older work arrives.

        Nobody is passed over because the head does not fit yet: large requests would starve.
        """
        if not self._ring:
            return None
        if not self._in_turn or self._ring[0].visits(self._quantum):
            self._end_turn()
            # Several rounds at once: the first lane that can pay, and what all were given until then.
            visits = [max(1, lane.visits(self._quantum)) for lane in self._ring]
            chosen = visits.index(min(visits))
            for place, lane in enumerate(self._ring):
                lane.credit += self._quantum * (visits[chosen] - (place > chosen))
            self._ring.rotate(-chosen)
            self._in_turn = True
        return self._ring[0].waiting[0]

    def take(self, sequence: Sequence) -> None:
        """Remove the sequence that `head` returned and charge its tenant."""
        lane = self._ring[0]
        assert self._in_turn and lane.waiting[0] is sequence, "only the head may be taken"
        lane.credit -= cost(sequence)
        sequence.paid = True
        del lane.waiting[0]
        self._shrunk(lane)

    def refund(self, sequence: Sequence) -> None:
        """Give back what a sequence that ends was charged and did not use.

        Credit is capped at what the tenant's next sequence needs: tokens declared while nobody else waited
        are not a claim against those who come later.
        """
        lane = self._lanes.get(sequence.tenant)
        if lane is None or not sequence.paid:
            return
        refunded = lane.credit + sequence.limit_tokens - sequence.total
        cap = max(self._quantum, cost(lane.waiting[0]))
        lane.credit = max(lane.credit, min(refunded, cap))

    def _end_turn(self) -> None:
        if self._in_turn:
            self._ring.rotate(-1)
        self._in_turn = False

    def _shrunk(self, lane: _Lane) -> None:
        self._size -= 1
        if lane.waiting:
            return
        if lane is self._ring[0]:
            self._in_turn = False
        self._ring.remove(lane)
        del self._lanes[lane.tenant]
