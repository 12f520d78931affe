"""Rank 0's runner when several ranks hold one model: tell the followers, then do the same oneself.

Owns: the order of telling and doing, what happens after a failure.
Must not know: how the model is cut, what a step computes.
Invariant: the followers get every order that the own runner gets, before it, in the same order. After any
failure the ranks may differ in what they hold, so nothing is run any more and `reset` refuses: the process
ends, and all ranks start anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from container.engine.step import Capacity, Runner, StepPlan, StepResult
from container.ranks.plans import Order, encode


class Publisher(Protocol):
    """The writing end of the ring."""

    def send(self, message: bytes) -> None: ...


class RanksBroken(RuntimeError):
    """A step failed on some rank; the ranks must start anew."""


class RankedRunner:
    """Implements container.engine.step.Runner over a runner of rank 0's own and the followers' ring."""

    def __init__(self, own: Runner, ring: Publisher) -> None:
        self._own = own
        self._ring = ring
        self._broken = False

    def capacity(self) -> Capacity:
        return replace(self._own.capacity(), runs_ahead=False)  # followers take whole steps

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step on all ranks; raises RanksBroken after a failure, and what the own runner raises."""
        self._tell(Order.RUN, plan)
        result = self._own.run(plan)
        self._broken = False
        return result

    def reset(self) -> None:
        """Forget every slot and published block, on all ranks; raises RanksBroken after a failure."""
        self._tell(Order.RESET)
        self._own.reset()
        self._broken = False

    def close(self) -> None:
        """Wipe KV on all ranks; the followers leave. After a failure the own rank's alone, the others die."""
        if not self._broken:
            self._tell(Order.CLOSE)
        self._own.close()

    def _tell(self, order: Order, plan: StepPlan | None = None) -> None:
        if self._broken:
            raise RanksBroken("the ranks no longer hold the same")
        self._broken = True  # until all of it went well
        self._ring.send(encode(order, plan))
