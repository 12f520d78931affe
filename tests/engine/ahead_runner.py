"""The fake runner as a device: steps are launched, answers come later, tokens are fed where they were drawn.

What a plan says of a fed token is not read, and what a step gave is not to be had before it is collected: an
engine that needs a token too early, or feeds one that was not drawn, shows as a wrong token or a `PlanError`.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from container.engine.step import ROW_FED, ROW_PROMPT_LOGPROBS, Capacity, StepPlan, StepResult
from tests.engine.fake_grammars import FakeGrammars
from tests.engine.fake_runner import FakeRunner, PlanError, require

MOST_UNDER_WAY = 2


@dataclass(eq=False)
class FakeTicket:
    plan: StepPlan
    result: StepResult
    ready: bool


class AheadFakeRunner(FakeRunner):
    """Implements engine.step.AheadRunner.

    `late_fault` is asked when a step is collected and may raise; `waits` says which steps besides those that
    must are over when `launch` returns.
    """

    def __init__(self, capacity: Capacity, grammars: FakeGrammars | None = None) -> None:
        self.late_fault: Callable[[StepPlan], None] = lambda plan: None
        self.waits: Callable[[StepPlan], bool] = lambda plan: False
        self.under_way: deque[FakeTicket] = deque()
        self.deepest = 0  # steps under way at once
        super().__init__(replace(capacity, runs_ahead=True), grammars)

    def reset(self) -> None:
        super().reset()
        self.under_way.clear()
        self.drawn: dict[int, int] = {}  # by slot, the token its last sampling row drew

    def run(self, plan: StepPlan) -> StepResult:
        raise PlanError("a runner that runs ahead is launched")

    def launch(self, plan: StepPlan) -> FakeTicket:
        require(len(self.under_way) < MOST_UNDER_WAY, "too many steps are under way")
        result = super().run(self._fed(plan))
        for row in result.rows:
            self.drawn[plan.slots[row.row]] = row.sampled.token if row.sampled else 0
        must = any(plan.drafts) or any(flags & ROW_PROMPT_LOGPROBS for flags in plan.flags)
        must = must or any(self.slots[slot].assignment.sampling.grammar for slot in plan.slots)
        ticket = FakeTicket(plan, result, must or self.waits(plan))
        self.under_way.append(ticket)
        self.deepest = max(self.deepest, len(self.under_way))
        return ticket

    def collect(self, ticket: FakeTicket) -> StepResult:
        require(self.under_way.popleft() is ticket, "steps are collected in another order")
        self.late_fault(ticket.plan)
        return ticket.result

    def _fed(self, plan: StepPlan) -> StepPlan:
        tokens, at = array("i", plan.tokens), 0
        for slot, count, flags in zip(plan.slots, plan.counts, plan.flags, strict=True):
            if flags & ROW_FED:
                require(count == 1 and slot in self.drawn, "a token is fed that was never drawn")
                tokens[at] = self.drawn[slot]
            at += count
        return replace(plan, tokens=tokens)
