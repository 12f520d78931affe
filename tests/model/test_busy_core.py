"""A core that another process keeps busy costs what it takes, not twice that."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from container.model.rows import PackedRow
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from container.model.start import build_runner

ROWS, PROMPT, STEPS, ROUNDS = 32, 40, 15, 5


@contextmanager
def hog(core: int) -> Iterator[None]:
    """Keep `core` busy meanwhile."""
    program = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def on_cores(count: int) -> Iterator[list[int]]:
    """Let this thread, and those it starts, run on so many cores; yields them."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < count:
        pytest.skip(f"{count} cores are needed")
    cores = sorted(allowed)[:count]
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.real_model
def test_two_threads_beside_a_process_that_takes_one_core(demo_checkpoint: Path) -> None:
    config = RunnerConfig(
        sequence_tokens=512,
        running_limit=ROWS,
        step_tokens=1024,
        kv_mib=256,
        threads=2,
        quantize="int8-block",
    )
    with on_cores(2) as cores:
        runner, facts = build_runner(config, DirectorySource(demo_checkpoint), lambda phase: None)
        assert facts.operators == "fused"
        model: Any = cast(Any, runner).packed

        def step_s() -> float:
            for slot in range(ROWS):
                model.kv.release(slot)
                model.logits([PackedRow(slot, 0, list(range(100, 100 + PROMPT)), (PROMPT - 1,))])
            began = time.perf_counter()
            for at in range(PROMPT, PROMPT + STEPS):
                model.logits([PackedRow(slot, at, [5], (0,)) for slot in range(ROWS)])
            return (time.perf_counter() - began) / STEPS

        step_s()
        alone, beside = [step_s()], []
        for turn in range(ROUNDS):
            with hog(cores[turn % 2]):
                beside.append(step_s())
            alone.append(step_s())
        assert os.sched_getaffinity(0) == set(cores), "the caller was left on one core"
        runner.close()
    ratios = [slow / statistics.mean(pair) for slow, pair in zip(beside, pairwise(alone), strict=True)]
    # 1.1 to 1.25; 1.9 to 2.0 when threads only wait for the one that lost its core.
    assert statistics.median(ratios) < 1.6, ratios
