"""Real ranks over a runner without a model, which does meet the other ranks in every step.

python -m tests.ranks.ranked_process MODE --config-fd N ...     rank 0
python -m tests.ranks.ranked_process MODE --rank N ...          a follower, started by rank 0

A row's token is SUM(rank + 1) x (sum of the tokens its slot has seen) modulo the vocabulary, so a follower
that missed an order spoils every answer. Tokens of a prompt from 90 on steer, see STEER; MODE is `good`,
`torch` or `gloo` (the sum is a Group's), `unlockable` (the followers' locks do not hold), or WORD:RANK, which
goes wrong while rank RANK loads.
"""

from __future__ import annotations

import sys
import time

from container.engine.request import SampledToken
from container.engine.step import ROW_SAMPLES, Capacity, RowResult, StepPlan, StepResult
from container.ranks import follower
from container.ranks import main as main_module
from container.ranks.assembly import Loaded, Report, StartFailed
from container.ranks.config import EngineConfig
from container.ranks.exchange import What
from container.ranks.heartbeat import LoadPhase, StartFault
from container.ranks.lockdown import LockdownFailed
from container.ranks.main import main
from container.ranks.place import Place

VOCABULARY = 89  # of the answers; a prompt may also say 90 to 99
CAPACITY = Capacity(
    blocks=256, block_tokens=16, slots=8, step_tokens=128, sequence_tokens=4096, vocabulary=260
)
STEP_S = 0.004
RAISE, HANG = 90, 94  # + rank: that rank raises, or never comes back
SUM = What(1)


def expected(prompt: list[int], count: int, ranks: int) -> list[int]:
    """Return the first `count` tokens of the answer to `prompt`."""
    seen, made = sum(prompt), []
    for _ in range(count):
        made.append(seen * (ranks * (ranks + 1) // 2) % VOCABULARY)
        seen += made[-1]
    return made


class SummingRunner:
    """Keeps one number per slot: what it has seen."""

    def __init__(self, place: Place, collectives: str | None) -> None:
        self._place = place
        self._seen: dict[int, int] = {}
        self._group = None if collectives is None else place.group(collectives)

    def capacity(self) -> Capacity:
        return CAPACITY

    def run(self, plan: StepPlan) -> StepResult:
        self._steer(plan)
        for slot in plan.releases:
            del self._seen[slot]
        for assignment in plan.assigns:
            self._seen[assignment.slot] = 0
        first = 0
        for row in range(plan.rows):
            tokens = plan.tokens[first : first + plan.counts[row]]
            first += plan.counts[row]
            self._seen[plan.slots[row]] += sum(tokens)
        sums = self._add([self._seen[slot] * (self._place.rank + 1) for slot in plan.slots])
        time.sleep(STEP_S)
        rows = [row for row in range(plan.rows) if plan.flags[row] & ROW_SAMPLES]
        tokens_out = [SampledToken(sums[row] % VOCABULARY) for row in rows]
        return StepResult(
            plan.number, [RowResult(row, token) for row, token in zip(rows, tokens_out, strict=True)]
        )

    def _steer(self, plan: StepPlan) -> None:
        rank = self._place.rank
        if RAISE + rank in plan.tokens:
            raise RuntimeError("canary-c0ffee in the device")
        if HANG + rank in plan.tokens:
            time.sleep(3600)

    def _add(self, own: list[int]) -> list[int]:
        if self._group is not None:
            import torch

            return [int(value) for value in self._group.all_reduce(torch.tensor(own, dtype=torch.float32))]
        assert self._place.exchange is not None
        data = b"".join(value.to_bytes(8, "little") for value in own)
        shared = self._place.exchange.share(SUM, data)
        return [
            sum(int.from_bytes(one[at : at + 8], "little") for one in shared) for at in range(0, len(data), 8)
        ]

    def reset(self) -> None:
        self._seen.clear()

    def close(self) -> None:
        self._seen.clear()


def load(config: EngineConfig, report: Report, place: Place) -> Loaded:
    word, _, rank = MODE.partition(":")
    report(LoadPhase.WEIGHTS)
    if rank and int(rank) == place.rank:
        if word == "refused":
            raise StartFailed(StartFault.MODEL_REFUSED, "its heads cannot be cut into so many parts")
        if word == "raises":
            raise KeyError("canary-c0ffee")
        if word == "dies":
            sys.exit(9)
        for _ in range(10 if word == "slow" else 0):
            time.sleep(0.15)
            report(LoadPhase.WEIGHTS)
    return Loaded(SummingRunner(place, {"torch": "shared", "gloo": "gloo"}.get(MODE)), "native", None)


def refuse_to_lock(**_: bool) -> None:
    raise LockdownFailed("not refused: connect")


if __name__ == "__main__":
    MODE = sys.argv[1]
    if "--rank" in sys.argv:
        if MODE == "unlockable":
            main_module.hold = refuse_to_lock
        sys.exit(follower.main(sys.argv[2:], load))
    sys.exit(main(sys.argv[2:], load, (sys.executable, "-m", "tests.ranks.ranked_process", MODE)))
