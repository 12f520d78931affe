"""The real engine process over a runner without a model, good or broken in the way its first argument says.

python -m tests.ranks.model_process MODE --config-fd N --door-fd N --heartbeat-fd N
"""

from __future__ import annotations

import sys
import time

from container.engine.request import SampledToken
from container.engine.step import ROW_SAMPLES, Capacity, RowResult, StepPlan, StepResult
from container.ranks.assembly import Loaded, Report, StartFailed
from container.ranks.config import EngineConfig
from container.ranks.heartbeat import LoadPhase, StartFault
from container.ranks.main import main
from container.ranks.place import Place

CAPACITY = Capacity(
    blocks=256, block_tokens=16, slots=8, step_tokens=128, sequence_tokens=2048, vocabulary=100
)


class CountingRunner:
    """Samples the position's number for every row; `mode` says how it misbehaves."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def capacity(self) -> Capacity:
        return CAPACITY

    def run(self, plan: StepPlan) -> StepResult:
        if self._mode == "slow":
            time.sleep(0.02)
        if self._mode == "broken" or (self._mode == "breaks" and max(plan.counts) > 1):
            raise RuntimeError("canary-c0ffee in the device")
        if self._mode == "noisy":
            print("canary-c0ffee", file=sys.stderr)
            print("canary-c0ffee")
        rows = [row for row in range(plan.rows) if plan.flags[row] & ROW_SAMPLES]
        return StepResult(plan.number, [self._sample(plan, row) for row in rows])

    def _sample(self, plan: StepPlan, row: int) -> RowResult:
        if self._mode == "nan":
            return RowResult(row, failed=True)
        return RowResult(row, SampledToken((plan.starts[row] + plan.counts[row]) % CAPACITY.vocabulary))

    def reset(self) -> None:
        if self._mode == "breaks":
            raise RuntimeError("canary-c0ffee in the reset")

    def close(self) -> None:
        return


def load(config: EngineConfig, report: Report, place: Place) -> Loaded:
    report(LoadPhase.WEIGHTS)
    if MODE == "good":
        time.sleep(0.1)
    if MODE == "refused":
        raise StartFailed(StartFault.MODEL_REFUSED, "not for\nthis engine".replace("\n", " "))
    if MODE == "memory":
        raise MemoryError("canary-c0ffee")
    if MODE == "allocator":
        raise RuntimeError("canary-c0ffee: can't allocate memory")
    if MODE == "raises":
        raise KeyError("canary-c0ffee")
    return Loaded(CountingRunner(MODE), "native", None)


if __name__ == "__main__":
    MODE = sys.argv[1]
    sys.exit(main(sys.argv[2:], load))
