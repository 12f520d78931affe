"""One step ahead of what is known: a step is launched while the one before it runs.

Owns: the step under way, which sequences expect a token of it. Must not know: what follows from a result.
Invariant: between two calls of the engine one step at most is under way, and every token that is expected is
one of its.

    call k      plan N + 1 (tokens of N are placeholders, fed on the device), launch it, collect N, apply N
    device      ... N runs ........................ N + 1 runs ........................
    call k + 1                                      plan N + 2, launch it, collect N + 1, ...

What ends with a token of N has a row too many in N + 1, computed for nobody: its result is dropped, and what
it held is written again only by steps launched later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from container.engine.planning import Step
from container.engine.sequence import State
from container.engine.step import ROW_SAMPLES, AheadRunner, Runner, StepResult, Ticket


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched and not collected."""

    runner: AheadRunner
    step: Step
    ticket: Ticket

    def collect(self) -> StepResult:
        """Return its result; blocks until it has ended."""
        return self.runner.collect(self.ticket)


class Ahead:
    """Launches on a runner that runs ahead; `under_way` is what was launched and not taken in."""

    def __init__(self, runner: Runner) -> None:
        self._runner = cast(AheadRunner, runner)  # it says so of itself: Capacity.runs_ahead
        self.under_way: Flight | None = None

    def launch(self, step: Step) -> Flight:
        """Begin a step; raises what the runner raises."""
        return Flight(self._runner, step, self._runner.launch(step.plan))

    def turn(self) -> Flight | None:
        """Return what is under way, which the caller takes in now."""
        flight, self.under_way = self.under_way, None
        return flight

    def leave(self, flight: Flight) -> None:
        """Leave a step under way; its sequences that still run expect the tokens it samples."""
        for (sequence, _), flags in zip(flight.step.rows, flight.step.plan.flags, strict=True):
            if flags & ROW_SAMPLES and sequence.state is State.RUNNING:
                sequence.expect()
        self.under_way = flight
