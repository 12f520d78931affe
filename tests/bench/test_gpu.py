"""`scripts/bench gpu` by its smallest sizes on a CPU: every part runs, a broken one costs itself alone."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu, gpu_sections
from tests.bench.gpu_load import sharegpt_lengths

POINTS = {"steps_bf16", "steps_fp8", "steps_int4", "attention"}


@pytest.mark.parametrize("name", list(gpu.BUDGETS_S))
def test_every_part_runs_where_there_is_no_device(name: str) -> None:
    """The code that measures a device, by its smallest sizes; budgets are not what is tested."""
    scale = gpu_sections.Scale("cpu", True, 1e9, time.monotonic())
    with torch.inference_mode():
        figures = gpu_sections.SECTIONS[name](scale)
    numbers = [v for v in figures.values() if isinstance(v, int | float)]
    assert all(v >= 0 for v in numbers) and json.loads(json.dumps(figures)) == figures
    assert figures["points"] if name in POINTS else numbers
    if name == "kernels":
        assert figures["failed"] == 0 and figures["cases"] == 3
    if name == "load":
        assert figures["finished"] == figures["requests"] == 3
        assert figures["output_tokens"] == sum(out for _, out in sharegpt_lengths(3, 5, 0.8))


def test_a_part_is_a_process_of_its_own() -> None:
    figures, failure = gpu.section("kernels", "cpu", True, 290.0)
    assert figures is not None, failure
    assert figures["failed"] == 0


def test_budgets_are_those_of_the_parts_and_stay_within_8_minutes() -> None:
    assert set(gpu.BUDGETS_S) == set(gpu_sections.SECTIONS)
    assert sum(gpu.BUDGETS_S.values()) <= gpu.TOTAL_S == 480.0


def test_a_part_that_fails_or_hangs_costs_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def section(name: str, device: str, tiny: bool, budget_s: float) -> tuple[dict[str, Any] | None, str]:
        return (None, "RuntimeError: no kernel") if name == "gap" else ({"points": []}, "")

    monkeypatch.setattr(gpu, "section", section)
    monkeypatch.setattr(gpu, "verdicts", lambda sections: {})
    document = gpu.run("cpu", tiny=True, told=lambda name: None)
    assert document["failures"] == {"gap": "RuntimeError: no kernel"}
    assert set(document["sections"]) == set(gpu.BUDGETS_S) - {"gap"}


def test_what_time_does_not_reach_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def section(name: str, device: str, tiny: bool, budget_s: float) -> tuple[dict[str, Any] | None, str]:
        given.append(budget_s)
        return {"points": []}, ""

    monkeypatch.setattr(gpu, "section", section)
    monkeypatch.setattr(gpu, "verdicts", lambda sections: {})
    document = gpu.run("cpu", tiny=True, told=lambda name: None, total_s=0.0)
    assert not given and set(document["failures"]) == set(gpu.BUDGETS_S)
    gpu.run("cpu", tiny=True, told=lambda name: None, total_s=50.0)
    assert given and max(given) <= 50.0


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "sleep")
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **k: _run(["sleep", "60"], **{**k, "timeout": 0.2})
    )
    assert gpu.section("load", "cpu", True, 5.0) == (None, "not done within 5 s")


_run = subprocess.run


def test_a_reason_names_no_path() -> None:
    figures, reason = gpu.section("no-such-part", "cpu", True, 60.0)
    assert figures is None and "no-such-part" in reason and "/" not in reason.replace("', '", "")


def measured() -> dict[str, Any]:
    points = [{"batch": b, "step_ms": ms, "bound_ms": ms / 2} for b, ms in ((1, 4.0), (64, 6.0), (256, 9.0))]
    return {
        "steps_bf16": {"points": points},
        "attention": {"points": [{"batch": 64, "context": 4096, "of_copy": 0.81}]},
        "gap": {"gap_share": 0.05, "trace_ms": [1.0, 2.0]},
        "load": {"output_tok_s": 12_500.0},
        "kernels": {"failed": 1},
        "batching": {"ratio": 5.5},
    }


def test_every_target_is_judged_the_right_way_round() -> None:
    met = {name: one["met"] for name, one in gpu.verdicts(measured()).items()}
    assert met == {
        "steps_bf16_batch_1_ms": True,
        "steps_bf16_batch_64_ms": False,
        "steps_bf16_batch_256_ms": True,
        "attention_of_copy": True,
        "gap_share": False,
        "load_tok_s": True,
        "times_continuous_batching": True,
        "kernel_failures": False,
    }
    assert gpu.verdicts({}) == {}


def test_a_result_is_a_table_a_picture_and_json(tmp_path: Path) -> None:
    document = {"device": "d", "tiny": True, "date": "2026-01-01", "sections": measured(),
                "failures": {"large": "not done"}, "verdicts": gpu.verdicts(measured())}  # fmt: skip
    text = gpu.table(document)
    assert "steps_bf16_batch_64_ms" in text and "missed" in text and "large: not done" in text
    assert gpu.draw(tmp_path, document) == ["gpu.png"] and (tmp_path / "gpu.png").stat().st_size > 1000
    assert json.loads(json.dumps(document))["sections"]["gap"]["gap_share"] == 0.05
    assert gpu.draw(tmp_path, {**document, "sections": {}}) == []


def test_lengths_are_those_of_the_load_they_stand_for() -> None:
    lengths = sharegpt_lengths(1000, 1024, 0.8)
    assert lengths == sharegpt_lengths(1000, 1024, 0.8)
    middle_in, middle_out = (sorted(part)[500] for part in zip(*lengths, strict=True))
    assert 140 <= middle_in <= 180 and 160 <= middle_out <= 200
    assert all(1 <= size <= 1024 for pair in lengths for size in pair)
