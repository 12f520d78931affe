"""The loop of engines that are stepped by whoever owns them: arrivals between steps, times after each.

Owns: the loop. Must not know: engines. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from tests.bench.figures import Timed
from tests.bench.workloads import Request


class Stepped(Protocol):
    """An engine as the loop sees it; requests are named by their number in the run."""

    def submit(self, number: int, request: Request) -> None: ...

    def step(self) -> Iterable[tuple[int, int, str]]:
        """Run one step; yield (number, tokens that came, error) of requests that got something."""

    def busy(self) -> bool:
        """Return whether a step has anything to do."""


def run(engine: Stepped, requests: Sequence[Request]) -> list[Timed]:
    """Submit each request at its time, step until nothing is left, and return what came when."""
    events: list[list[tuple[float, int]]] = [[] for _ in requests]
    errors = [""] * len(requests)
    order = sorted(range(len(requests)), key=lambda number: requests[number].at_s)
    began_s = time.perf_counter()
    while order or engine.busy():
        now_s = time.perf_counter() - began_s
        while order and requests[order[0]].at_s <= now_s:
            number = order.pop(0)
            engine.submit(number, requests[number])
        if not engine.busy():
            time.sleep(max(0.0, requests[order[0]].at_s - now_s) if order else 0.0)
            continue
        news = list(engine.step())
        now_s = time.perf_counter() - began_s
        for number, tokens, error in news:
            if tokens:
                events[number].append((now_s, tokens))
            errors[number] = errors[number] or error
    return [Timed(tuple(each), error) for each, error in zip(events, errors, strict=True)]
