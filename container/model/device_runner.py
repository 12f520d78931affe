"""The runner of a device: a step is launched, and collected when the next one is under way.

Owns: what is sampled on the device, tickets, their order. Must not know: which device, the scheduler.
Invariant: tickets are collected in the order they were launched, and a step reads nothing that an earlier
one has not launched before it.

    launch N  ->  device: forward N, greedy choice, kept for N + 1, copied back
    launch N + 1 (rows flagged ROW_FED: their token is still on the device)   beside it
    collect N ->  waits for the copy alone

A step of greedy rows without anything else asked never waits. Any other is sampled on the host, from logits
copied back, before `launch` returns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from container.engine.request import SampledToken
from container.engine.step import ROW_FED, Capacity, RowResult, StepPlan, StepResult
from container.model.device import Marker
from container.model.device_model import DeviceModel
from container.model.runner import (
    NativeRunner,
    PlanRow,
    Scorer,
    SlotSampler,
    SlotTable,
    packed_row,
    step_result,
)
from container.model.shape import Sizes

MOST_AHEAD = 2  # steps launched and not collected: one running, one waiting behind it


@dataclass(slots=True, eq=False)
class Ticket:
    """A step under way; `result` is there at once when it was sampled on the host."""

    number: int
    result: StepResult | None = None
    rows: tuple[int, ...] = ()  # of the plan, that sample
    chosen: Tensor | None = None  # (2, rows) int32 in host memory: token, and 1 where it is a number
    copied: Marker | None = None

    @property
    def ready(self) -> bool:
        return self.result is not None


class DeviceRunner(NativeRunner):
    """Runs plans on a DeviceModel, one step ahead if asked to. Implements engine.step.AheadRunner."""

    def __init__(
        self, model: DeviceModel, sampler: SlotSampler, score: Scorer, sizes: Sizes, capacity: Capacity
    ) -> None:
        super().__init__(model, sampler, score, sizes, replace(capacity, runs_ahead=True))
        self._model = model
        self._under_way: deque[Ticket] = deque()
        self._results = [model.device.staging((2 * sizes.slots,), torch.int32) for _ in range(MOST_AHEAD)]
        self._copies = 0

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step and wait for it."""
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> Ticket:
        """Begin one step. Raises what `run` of a NativeRunner raises, before anything was launched."""
        assert len(self._under_way) < MOST_AHEAD, "too many steps under way"
        with self._model.mode():
            ticket = self._launch(plan)
        self._under_way.append(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        """Return what the step gave; blocks until the device is done with it."""
        assert self._under_way and self._under_way[0] is ticket, "tickets are collected in order"
        self._under_way.popleft()
        if ticket.result is not None:
            return ticket.result
        assert ticket.copied is not None and ticket.chosen is not None, "a ticket has a result or a copy"
        ticket.copied.wait()
        tokens, numbers = ticket.chosen.tolist()
        result = StepResult(ticket.number)
        for row, token, number in zip(ticket.rows, tokens, numbers, strict=True):
            sampled = SampledToken(token) if number else None
            result.rows.append(RowResult(row, sampled=sampled, failed=sampled is None))
        return result

    def reset(self) -> None:
        self._under_way.clear()
        super().reset()

    def _launch(self, plan: StepPlan) -> Ticket:
        rows = self._begin(plan)
        if not rows:
            return Ticket(plan.number, StepResult(plan.number))
        fed = {row.slot for row in rows if row.flags & ROW_FED}
        logits = self._model.launch([packed_row(row) for row in rows], fed)
        self._save(plan)
        if all(_greedy(row, self._slots) for row in rows):
            return self._choose(plan, rows, logits)
        result = step_result(plan, rows, logits, self._slots, self._sampler, self._score)
        kept: dict[int, int] = {}
        by_row = {row.row: row.slot for row in rows}
        for outcome in result.rows:
            if outcome.sampled is not None:
                kept[by_row[outcome.row]] = outcome.sampled.token
        if kept:
            tokens = torch.tensor(list(kept.values()), dtype=torch.int32, device=logits.device)
            self._model.keep(list(kept), tokens)
        return Ticket(plan.number, result)

    def _choose(self, plan: StepPlan, rows: list[PlanRow], logits: Tensor) -> Ticket:
        """Take the best token of each sampling row, keep it on the device and begin its copy."""
        sampling = [row for row in rows if row.samples]
        if not sampling:
            return Ticket(plan.number, StepResult(plan.number))
        best = logits.max(-1)
        tokens = best.indices.to(torch.int32)
        self._model.keep_all(tokens)
        both = torch.stack((tokens, best.values.isfinite().to(torch.int32)))
        chosen = self._results[self._copies % MOST_AHEAD][: both.numel()].view(both.shape)
        self._copies += 1
        copied = self._model.device.download(both, chosen)
        return Ticket(plan.number, None, tuple(row.row for row in sampling), chosen, copied)


def _greedy(row: PlanRow, slots: SlotTable) -> bool:
    """Return whether the row's token is the best of its logits, and nothing else is asked about it."""
    if row.scored or row.drafts or row.holds_stops:
        return False
    if not row.samples:
        return True
    sampling = slots[row.slot].assignment.sampling
    asked = sampling.penalised or sampling.logit_bias or sampling.grammar or sampling.top_logprobs is not None
    return sampling.greedy and not asked
