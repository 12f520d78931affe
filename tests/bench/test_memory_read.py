"""The bound of decoding: what was read is counted, and only what a run and its bound both told is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.bench import memory_read
from tests.bench.memory_read import read_gb_s
from tests.bench.peers import memory_bound
from tests.bench.report import extras

OURS = "strongroom int8-block"


def w1(number: int, decode_tok_s: float, **more: Any) -> dict[str, Any]:
    return {
        "engine": OURS,
        "workload": "W1",
        "round": number,
        "figures": {"decode_tok_s": decode_tok_s},
        **more,
    }


def told(step_bytes: int | None) -> dict[str, Any]:
    return {OURS: {"about": {} if step_bytes is None else {"step_bytes": step_bytes}}}


def test_memory_that_is_read_twice_as_fast_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    def sum_in(seconds: float) -> Any:
        def work(words: Any) -> int:
            nonlocal now_s
            now_s += seconds
            return int(words.size)

        return work

    monkeypatch.setattr(memory_read.time, "perf_counter", clock)
    for seconds, expected in ((0.5, 2e-3), (0.25, 4e-3)):
        monkeypatch.setattr(memory_read, "_sum", sum_in(seconds))
        assert read_gb_s(1, thread_bytes=1_000_000, passes=2) == pytest.approx(expected)


def test_every_thread_reads_memory_of_its_own() -> None:
    assert read_gb_s(2, thread_bytes=2**20, passes=1) > 0
    assert memory_read._sum(np.full(3, 2, np.uint64)) == 6


def test_what_was_not_read_whole_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_read, "_sum", lambda words: int(words.size) - 1)
    with pytest.raises(AssertionError, match="not all"):
        read_gb_s(1, thread_bytes=2**16, passes=1)


def test_the_bound_is_what_memory_gives_over_what_a_token_reads() -> None:
    records = [
        w1(1, 50.0, memory_read_gb_s=20.0),
        w1(2, 90.0, memory_read_gb_s=30.0),
        w1(3, 40.0, memory_read_gb_s=10.0),
    ]
    bound = memory_bound(records, told(200_000_000), OURS)
    assert bound is not None
    # bounds 100, 150, 50 tok/s; reached 0.5, 0.6, 0.8
    assert bound == {
        "step_mib": 190.7,
        "read_gb_s": 20.0,
        "bound_tok_s": 100.0,
        "reached": 0.6,
        "least": 0.5,
        "most": 0.8,
    }
    assert extras({"bounds": {OURS: bound}}) == [
        f"W1, {OURS}: 0.60 (0.50-0.80) of the 100 tok/s that reading 191 MiB a token allows at 20.0 GB/s"
    ]


@pytest.mark.parametrize(
    ("records", "step_bytes"),
    [([w1(1, 50.0)], 1), ([], 1), ([w1(1, 50.0, memory_read_gb_s=20.0)], None)],
    ids=["memory not read", "no run", "bytes not told"],
)
def test_without_either_there_is_no_bound(records: list[dict[str, Any]], step_bytes: int | None) -> None:
    assert memory_bound(records, told(step_bytes), OURS) is None
