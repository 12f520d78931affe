"""What the comparison of starts counts, with starts that only move a clock."""

from __future__ import annotations

from tests.sagemaker_entry import sealed_speed
from tests.sagemaker_entry.sealed_speed import Start


class Starts:
    """Stands for endpoints: each start takes what it is told to, by a clock of its own."""

    def __init__(self, plain_s: float, sealed_s: float, first_s: float = 0.0) -> None:
        self.took_s = {"plain": plain_s, "sealed": sealed_s}
        self.first_s = first_s
        self.begun: list[str] = []
        self.clock_s = 100.0

    def start(self, kind: str) -> Start:
        took_s = self.took_s[kind] + (0.0 if kind in self.begun else self.first_s)
        self.begun.append(kind)
        self.clock_s += took_s
        return Start(took_s, 2 * took_s)

    def measured(self, rounds: int, limit_s: float) -> list[dict[str, Start]]:
        return sealed_speed.measure(self.start, rounds, limit_s, lambda: self.clock_s)


def test_the_first_round_is_not_counted_and_the_others_alternate() -> None:
    starts = Starts(4.0, 5.0, first_s=30.0)
    counted = starts.measured(2, 1000.0)
    assert starts.begun == ["plain", "sealed"] * 3
    assert sealed_speed.summary(counted) == {
        "rounds": 2,
        "plain_s": [4.0, 4.0],
        "sealed_s": [5.0, 5.0],
        "ratio": 1.25,
        "plain_cpu_s": [8.0, 8.0],
        "sealed_cpu_s": [10.0, 10.0],
        "cpu_ratio": 1.25,
    }


def test_no_round_begins_that_would_end_after_the_limit() -> None:
    starts = Starts(4.0, 6.0)  # 10 s a round, the first included
    assert len(starts.measured(9, 49.0)) == 3
    assert starts.clock_s == 140.0


def test_one_round_counts_however_long_a_round_takes() -> None:
    assert len(Starts(400.0, 500.0, first_s=1000.0).measured(9, 1.0)) == 1
