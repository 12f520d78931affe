"""Ranks as threads of the test's process: a group over a barrier, and runners built on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from container.engine.step import Capacity, Runner, StepPlan, StepResult
from container.model.facts import ModelFacts
from container.model.group import GroupBroken
from container.model.shape import RunnerConfig
from container.model.start import build_runner
from container.model.steps import LayerSteps

WAIT_S = 120.0
Result = TypeVar("Result")


@dataclass
class Table:
    """What the ranks lay out for each other between two barriers."""

    size: int
    barrier: threading.Barrier = field(init=False)
    places: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)


class ThreadGroup:
    """Rank `rank` of the ranks that share `table`; counts what it was asked for."""

    def __init__(self, table: Table, rank: int) -> None:
        self.rank = rank
        self.size = table.size
        self.reduced = 0
        self._table = table

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.reduced += 1
        parts = self._exchange(tensor.detach().clone())
        assert len({part.shape for part in parts}) == 1, "ranks sum tensors of different shapes"
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(tensor.dtype)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        parts = self._exchange(tensor.detach().clone())
        return torch.cat(parts, dim=-1) if self.rank == 0 else None

    def minimum(self, value: int) -> int:
        return min(self._exchange(value))

    def agree(self, digest: bytes) -> None:
        assert len(digest) == 32
        if len(set(self._exchange(digest))) > 1:
            raise GroupBroken("the ranks differ")

    def _exchange(self, mine: Any) -> list[Any]:
        table = self._table
        try:
            table.places[self.rank] = mine
            table.barrier.wait(WAIT_S)
            everyone = [table.places[rank] for rank in range(self.size)]
            table.barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise GroupBroken("another rank is gone") from None
        return everyone


def together(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """Run `work` on every rank at once and return the results by rank; raises what the first rank raised."""
    table = Table(size)
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(table, rank))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            failures[rank] = error
            table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = [error for _, error in sorted(failures.items()) if not isinstance(error, GroupBroken)]
    if first or failures:
        raise (first or list(failures.values()))[0]
    return [results[rank] for rank in range(size)]


class RankedRunner:
    """Rank 0's runner, which has every plan run by the followers too. Implements engine.step.Runner."""

    def __init__(self, runners: list[Runner]) -> None:
        self.runners = runners

    def capacity(self) -> Capacity:
        assert len({runner.capacity() for runner in self.runners}) == 1, "ranks promise different things"
        return self.runners[0].capacity()

    def run(self, plan: StepPlan) -> StepResult:
        results: list[StepResult | None] = [None] * len(self.runners)
        failures: list[BaseException] = []

        def step(rank: int) -> None:
            try:
                results[rank] = self.runners[rank].run(plan)
            except BaseException as error:  # noqa: BLE001 - as above
                failures.append(error)

        threads = [threading.Thread(target=step, args=(rank,)) for rank in range(len(self.runners))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert all(result is not None and not result.rows for result in results[1:]), "a follower answered"
        assert results[0] is not None
        return results[0]

    def reset(self) -> None:
        for runner in self.runners:
            runner.reset()

    def close(self) -> None:
        for runner in self.runners:
            runner.close()


def ranked(
    config: RunnerConfig, source: Any, size: int, steps: LayerSteps | None = None
) -> tuple[RankedRunner, list[ModelFacts]]:
    """Return the runner of a model that `size` ranks hold together, and what each rank says about it."""
    built = together(size, lambda group: build_runner(config, source, lambda phrase: None, group, steps))
    return RankedRunner([runner for runner, _ in built]), [facts for _, facts in built]
