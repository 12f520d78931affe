"""Loads for a device's runner, planned here without the engine: steady decoding, and many requests at once.

Owns: plans, lengths, times of steps. Must not know: devices, models.
Invariant: a step is planned from what is known when it is launched; tokens still on the device are fed there.
"""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from container.engine.request import SamplingParams
from container.engine.step import ROW_FED, ROW_SAMPLES, SlotAssignment, StepPlan

if TYPE_CHECKING:
    from container.model.device_runner import DeviceRunner, Ticket

GREEDY = SamplingParams(temperature=0.0)
MEDIAN_IN, MEDIAN_OUT = 160, 180


def sharegpt_lengths(count: int, longest: int, sigma: float) -> list[tuple[int, int]]:
    """Return seeded (prompt, output) lengths, log-normal about ShareGPT's medians, at most `longest` each."""
    draw = random.Random(17)

    def length(median: int) -> int:
        return max(1, min(longest, round(median * draw.lognormvariate(0.0, sigma))))

    return [(length(MEDIAN_IN), length(MEDIAN_OUT)) for _ in range(count)]


class Planner:
    """Writes plans; slots come and go."""

    def __init__(self, runner: DeviceRunner, vocabulary: int) -> None:
        self.runner = runner
        self.plan = StepPlan(0)
        self._draw = random.Random(5)
        self._vocabulary = vocabulary

    def begin(self, slot: int, prompt_tokens: int) -> list[int]:
        """Assign `slot` a sequence of random tokens; return them."""
        tokens = [self._draw.randrange(3, self._vocabulary) for _ in range(prompt_tokens)]
        self.plan.assigns.append(SlotAssignment(slot, GREEDY, (), prompt_tokens, 0, array("i", tokens)))
        return tokens

    def row(self, slot: int, start: int, tokens: Sequence[int], flags: int) -> None:
        """Plan `tokens` of the sequence in `slot`."""
        plan = self.plan
        plan.slots.append(slot)
        plan.starts.append(start)
        plan.counts.append(len(tokens))
        plan.flags.append(flags)
        plan.tokens.extend(tokens)

    def launch(self) -> Ticket:
        """Launch what was planned and begin the next plan."""
        ticket = self.runner.launch(self.plan)
        self.plan = StepPlan(self.plan.number + 1)
        return ticket


def decode(
    runner: DeviceRunner, batch: int, context: int, steps: int, vocabulary: int, *, ahead: bool = True
) -> dict[str, list[float]]:
    """Fill `batch` slots to `context` positions and decode; return seconds per step and of the host."""
    runner.reset()
    planner, room = Planner(runner, vocabulary), runner.capacity().step_tokens
    for slot in range(batch):
        tokens = planner.begin(slot, context)
        for first in range(0, context, room):
            part = tokens[first : first + room]
            planner.row(slot, first, part, ROW_SAMPLES if first + len(part) == context else 0)
            runner.collect(planner.launch())
    under_way: deque[Ticket] = deque()
    step_s, host_s = [], []
    ended = time.perf_counter()
    for number in range(steps):
        begun = time.perf_counter()
        for slot in range(batch):
            planner.row(slot, context + number, (0,), ROW_SAMPLES | ROW_FED)
        under_way.append(planner.launch())
        host_s.append(time.perf_counter() - begun)
        if len(under_way) > 1 or not ahead:
            runner.collect(under_way.popleft())
            now = time.perf_counter()
            step_s.append(now - ended)
            ended = now
    while under_way:
        runner.collect(under_way.popleft())
    runner.reset()
    return {"step_s": step_s[1:] or step_s, "host_s": host_s}


@dataclass(slots=True)
class Running:
    """A request in a slot."""

    slot: int
    tokens: list[int]
    outputs: int
    computed: int = 0
    produced: int = 0


def offline(
    runner: DeviceRunner, lengths: Sequence[tuple[int, int]], vocabulary: int, left_s: Callable[[], float]
) -> dict[str, Any]:
    """Serve all `lengths` (prompt, output) as slots allow, a step ahead; return rates, until time is up."""
    planner, capacity = Planner(runner, vocabulary), runner.capacity()
    waiting, free = deque(lengths), list(range(capacity.slots))
    running: list[Running] = []
    under_way: deque[Ticket] = deque()
    produced = prompts = steps = 0
    begun = time.perf_counter()
    while (waiting or running) and left_s() > 2:
        room = capacity.step_tokens
        for one in list(running):
            if one.produced == one.outputs:  # its last token is under way; its slot is free for this step on
                planner.plan.releases.append(one.slot)
                running.remove(one)
                free.append(one.slot)
        while waiting and free:
            slot = free.pop()
            size, outputs = waiting.popleft()
            running.append(Running(slot, planner.begin(slot, size), outputs))
        for one in running:
            if one.computed >= len(one.tokens):
                planner.row(one.slot, one.computed, (0,), ROW_SAMPLES | ROW_FED)
                one.computed, one.produced = one.computed + 1, one.produced + 1
                room -= 1
        for one in running:
            left = len(one.tokens) - one.computed
            if left > 0 and room > 0:
                count = min(left, room)
                last = count == left
                part = one.tokens[one.computed : one.computed + count]
                planner.row(one.slot, one.computed, part, ROW_SAMPLES if last else 0)
                one.computed, room, prompts = one.computed + count, room - count, prompts + count
                one.produced += last
        produced += sum(bool(flags & ROW_SAMPLES) for flags in planner.plan.flags)
        under_way.append(planner.launch())
        steps += 1
        if len(under_way) > 1:
            runner.collect(under_way.popleft())
    while under_way:
        runner.collect(under_way.popleft())
    seconds = time.perf_counter() - begun
    return {
        "requests": len(lengths),
        "finished": len(lengths) - len(waiting) - len(running),
        "steps": steps,
        "output_tokens": produced,
        "prompt_tokens": prompts,
        "seconds": seconds,
        "output_tok_s": produced / seconds,
    }
