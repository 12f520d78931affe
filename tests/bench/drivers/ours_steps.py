"""W6: what one step costs at a batch and a context, measured at the seam between scheduler and runner.

Owns: plans that fill slots to a context and then decode. Must not know: the scheduler, HTTP.
Invariant: every sequence has tokens of its own and nothing is restored from a cache, so that no step is
cheaper than the same step for unrelated clients.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from container.engine.request import SamplingParams
from container.engine.step import ROW_SAMPLES, Capacity, Runner, SlotAssignment, StepPlan, StepResult
from tests.bench.cost import STEP_ROOM

DECODES = 7  # steps timed at each point, after one that is not
ROOM = STEP_ROOM
GREEDY = SamplingParams(temperature=0.0)


class Filled:
    """Slots 0..n-1 and how many positions of each are computed."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._capacity: Capacity = runner.capacity()
        self._number = 0
        self._free = list(range(self._capacity.blocks, 0, -1))  # a stack; blocks are 1..blocks
        self._tables: list[list[int]] = [[] for _ in range(self._capacity.slots)]
        self._released: list[int] = []  # slots the runner has not been told to free
        self.computed = [0] * self._capacity.slots
        self.prefills: list[dict[str, float]] = []

    def fits(self, slots: int, context: int) -> bool:
        """Return whether the pool holds `slots` sequences of `context` positions and what decoding adds."""
        blocks = -(-(context + ROOM) // self._capacity.block_tokens)
        return slots * blocks <= self._capacity.blocks and slots <= self._capacity.slots

    def keep(self, slots: int) -> None:
        """Forget all but the first `slots` sequences."""
        for slot in range(slots, len(self.computed)):
            if self.computed[slot]:
                self._released.append(slot)
                self._free += self._tables[slot]
                self._tables[slot], self.computed[slot] = [], 0

    def reach(self, slots: int, context: int) -> None:
        """Compute the first `slots` sequences up to `context` positions, in steps of one sequence each.

        Steps of several sizes in turn: the fit could not tell a step's fixed cost from a token's otherwise.
        """
        for slot in range(slots):
            while self.computed[slot] < context:
                start = self.computed[slot]
                size = self._capacity.step_tokens >> len(self.prefills) % 3
                count = min(context - start, max(1, size))
                seconds = self._step([(slot, count)], sample=False)
                pairs = count * start + count * (count + 1) / 2  # query times key positions
                self.prefills.append(
                    {"batch": 1, "tokens": count, "context": start, "pairs": pairs, "step_s": seconds}
                )

    def decode(self, slots: int) -> float:
        """Return the seconds of one step in which the first `slots` sequences make a token each."""
        return self._step([(slot, 1) for slot in range(slots)], sample=True)

    def _step(self, rows: list[tuple[int, int]], *, sample: bool) -> float:
        self._number += 1
        plan = StepPlan(self._number)
        plan.releases.extend(self._released)
        self._released = []
        for slot, count in rows:
            start = self.computed[slot]
            if start == 0:
                plan.assigns.append(
                    SlotAssignment(slot, GREEDY, (), count, 0, array("i", self._ids(slot, 0, count)))
                )
            plan.slots.append(slot)
            plan.starts.append(start)
            plan.counts.append(count)
            plan.flags.append(ROW_SAMPLES if sample else 0)
            plan.tokens.extend(self._ids(slot, start, count))
            self.computed[slot] = start + count
            table = self._tables[slot]
            while len(table) * self._capacity.block_tokens < start + count:
                plan.table.extend((slot, len(table), self._free[-1]))
                table.append(self._free.pop())
        began_s = time.perf_counter()
        self._runner.run(plan)
        return time.perf_counter() - began_s

    def _ids(self, slot: int, start: int, count: int) -> list[int]:
        # any ids do; a multiplier that shares no factor with common vocabulary sizes keeps them apart
        most = self._capacity.vocabulary - 3
        return [3 + (slot * 7919 + place * 104729) % most for place in range(start, start + count)]


class Watched:
    """A runner whose time is added up: what remains of a step is the engine's own."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.ran: list[tuple[int, float, float]] = []  # rows of a step, when it began, when it ended

    def capacity(self) -> Capacity:
        return self._runner.capacity()

    def run(self, plan: StepPlan) -> StepResult:
        began_s = time.perf_counter()
        result = self._runner.run(plan)
        self.ran.append((plan.rows, began_s, time.perf_counter()))
        return result

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


def share_of(watched: Watched, work: Callable[[], object], sequences: int) -> dict[str, float]:
    """Do `work` and return the share of time between the starts of full steps that the runner did not use.

    A full step is one in which all `sequences` have a row, followed by another such step; between the two
    lie the engine's commit, the deltas, the next plan. Median over such pairs.
    """
    watched.ran.clear()
    work()
    whole, idle = [], []
    for (rows, began_s, ended_s), (later, next_s, _) in pairwise(watched.ran):
        if rows == later == sequences:
            whole.append(next_s - began_s)
            idle.append((next_s - ended_s) / (next_s - began_s))
    if not whole:
        raise RuntimeError("the sequences never ran all at once")
    return {
        "sequences": sequences,
        "steps": len(whole),
        "step_s": median(whole),
        "engine_share": median(idle),
    }


def measure(runner: Any, points: list[tuple[int, int]]) -> list[dict[str, float]]:
    """Return batch, context, tokens, pairs and the median seconds of a step, decodes first, then prefills.

    `context` is what each sequence had before the step. Points are taken in order of context, largest batch
    first, so that each sequence only ever grows; those that no further point needs are let go of. Points that
    the runner's pool cannot hold are left out.
    """
    filled = Filled(runner)
    measured = []
    for context in sorted({c for _, c in points}):
        batches = sorted((b for b, c in points if c == context and filled.fits(b, c)), reverse=True)
        filled.keep(max(batches, default=0))
        for batch in batches:
            filled.reach(batch, context)
            filled.decode(batch)
            begun = sum(filled.computed[:batch])
            times = [filled.decode(batch) for _ in range(DECODES)]
            total = begun + batch * (DECODES + 1) / 2  # keys read, in the middle of the timed steps
            measured.append(
                {"batch": batch, "tokens": batch, "context": context, "pairs": total, "step_s": median(times)}
            )
    return measured + filled.prefills
