"""W6's plans keep the rules of the seam, on a runner that checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from container.engine.request import SampledToken
from container.engine.step import ROW_SAMPLES, Capacity, RowResult, StepPlan, StepResult
from tests.bench.drivers.ours_steps import DECODES, Watched, measure, share_of

CAPACITY = Capacity(
    blocks=64,
    block_tokens=16,
    slots=8,
    step_tokens=32,
    sequence_tokens=512,
    vocabulary=50,
    prefix_cache=False,
)


@dataclass
class Strict:
    """Holds what each slot has and fails on a plan that no scheduler would write."""

    computed: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)  # block -> its slot
    decoded: list[tuple[int, int]] = field(default_factory=list)  # rows, shortest context
    most_blocks: int = 0

    def capacity(self) -> Capacity:
        return CAPACITY

    def run(self, plan: StepPlan) -> StepResult:
        for slot in plan.releases:
            del self.computed[slot]
            self.blocks = {block: owner for block, owner in self.blocks.items() if owner != slot}
        for assignment in plan.assigns:
            assert assignment.slot not in self.computed and assignment.cached_tokens == 0
            self.computed[assignment.slot] = 0
        for slot, _, block in zip(plan.table[0::3], plan.table[1::3], plan.table[2::3], strict=True):
            assert 1 <= block <= CAPACITY.blocks and block not in self.blocks
            self.blocks[block] = slot
        assert len(plan.tokens) == sum(plan.counts) <= CAPACITY.step_tokens
        assert all(0 <= token < CAPACITY.vocabulary for token in plan.tokens)
        if plan.flags[0] & ROW_SAMPLES:
            self.decoded.append((plan.rows, min(plan.starts)))
        for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True):
            assert self.computed[slot] == start, "a sequence is computed in order"
            self.computed[slot] = start + count
            held = sum(owner == slot for owner in self.blocks.values())
            assert held * CAPACITY.block_tokens >= start + count
        self.most_blocks = max(self.most_blocks, len(self.blocks))
        rows = [RowResult(row, SampledToken(3)) for row in range(plan.rows) if plan.flags[row] & ROW_SAMPLES]
        return StepResult(plan.number, rows)

    def reset(self) -> None:
        self.computed.clear()

    def close(self) -> None:
        """Nothing is held."""


def test_every_point_that_fits_is_measured_and_the_pool_is_never_overdrawn() -> None:
    runner = Strict()
    # 4 sequences of 64 + 128 positions take 48 of 64 blocks; 8 would take 96, 2 of 300 + 128 take 54
    points = [(1, 64), (4, 64), (8, 64), (1, 300), (2, 300), (4, 300)]
    got = measure(runner, points)
    decodes = [
        (p["batch"], p["context"]) for p in got if p["tokens"] == p["batch"] and p["context"] in (64, 300)
    ]
    assert decodes == [(4, 64), (1, 64), (2, 300), (1, 300)]
    assert runner.most_blocks <= CAPACITY.blocks
    assert sorted(runner.computed) == [0, 1]
    assert [rows for rows, _ in runner.decoded] == [rows for rows in (4, 1, 2, 1) for _ in range(DECODES + 1)]
    assert all(context >= 300 for rows, context in runner.decoded[2 * (DECODES + 1) :])


def test_keys_read_are_counted_by_what_each_sequence_holds() -> None:
    got = measure(Strict(), [(2, 32)])
    # 32 before the first, untimed decode: the timed ones begin at 33 and in their middle read 37 each
    assert got[0]["pairs"] == 2 * (33 + (DECODES + 1) / 2)
    prefills = got[1:]
    assert sum(p["tokens"] for p in prefills) == 2 * 32
    assert sum(p["pairs"] for p in prefills) == 2 * 32 * 33 / 2


def test_the_engines_share_is_what_lies_between_full_steps() -> None:
    watched = Watched(Strict())

    def work() -> None:
        watched.ran += [(1, 0.0, 0.5), (2, 1.0, 1.9), (2, 2.0, 2.8), (2, 3.0, 3.9), (1, 4.0, 4.5)]

    share = share_of(watched, work, 2)
    assert share["steps"] == 2 and share["step_s"] == 1.0
    assert abs(share["engine_share"] - 0.15) < 1e-9
    assert all(earlier[1] < later[1] for earlier, later in pairwise(watched.ran))
