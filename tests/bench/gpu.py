"""`scripts/bench gpu`: everything that needs a device, in one call, within a budget of device time.

Owns: the order and budget of the parts, the result's form. Must not know: how anything is measured.
Invariant: a part that fails, hangs or runs out of time costs its own figures alone; the last line of stdout
is one compact JSON document whatever happened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import machine

ROOT = Path(__file__).parents[2]
TOTAL_S = 480.0
# Decision value first: what is left out when time runs short is at the end. Seconds, start included.
BUDGETS_S = {
    "kernels": 45.0,
    "attention": 50.0,
    "steps_bf16": 60.0,
    "gap": 45.0,
    "steps_fp8": 50.0,
    "load": 70.0,
    "peers": 50.0,
    "batching": 50.0,
    "large": 45.0,
    "steps_int4": 15.0,
}
GRACE_S = 2.0  # to print what was measured before the process is ended
# Of the 8B shape on one H200 (engine specification, 17): milliseconds at most, rates at least.
TARGETS = {
    ("steps_bf16", 1): 4.2,
    ("steps_bf16", 64): 5.5,
    ("steps_bf16", 256): 9.5,
    ("steps_fp8", 1): 2.4,
}


def run(device: str, *, tiny: bool, told: Callable[[str], None], total_s: float = TOTAL_S) -> dict[str, Any]:
    """Run every part within `total_s` and return the document."""
    begun = time.monotonic()
    document: dict[str, Any] = {**machine.provenance("gpu"), "device": device_name(device), "tiny": tiny}
    document |= {"sections": {}, "failures": {}, "seconds": {}}
    for name, budget_s in BUDGETS_S.items():
        left_s = min(budget_s, total_s - (time.monotonic() - begun))
        if left_s < GRACE_S * 2:
            document["failures"][name] = "left out: no device time left"
            continue
        told(name)
        started = time.monotonic()
        figures, failure = section(name, device, tiny, left_s)
        if figures is None:
            document["failures"][name] = failure
        else:
            document["sections"][name] = figures
        document["seconds"][name] = round(time.monotonic() - started, 1)
    document["verdicts"] = verdicts(document["sections"])
    return document


def section(name: str, device: str, tiny: bool, budget_s: float) -> tuple[dict[str, Any] | None, str]:
    """Run one part in a process of its own; return its figures, or None and why there are none."""
    command = [sys.executable, "-m", "tests.bench.gpu_sections", name, "--device", device]
    command += ["--budget-s", str(budget_s - GRACE_S), *(["--tiny"] if tiny else [])]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=budget_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"not done within {budget_s:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return None, machine.plain(lines[-1])[:400]
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures, ""


def device_name(device: str) -> str:
    """Return what was measured on."""
    if device == "cpu":
        return "cpu, kernels interpreted"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "cuda, not told which"


def verdicts(sections: dict[str, Any]) -> dict[str, Any]:
    """Return each target with what was measured against it, and whether it was met."""
    made: dict[str, Any] = {}

    def judged(name: str, value: float, target: float, *, least: bool) -> None:
        met = value >= target if least else value <= target
        made[name] = {"measured": round(value, 4), "target": target, "met": met}

    for (part, batch), most in TARGETS.items():
        for point in sections.get(part, {}).get("points", []):
            if point["batch"] == batch:
                judged(f"{part}_batch_{batch}_ms", point["step_ms"], most, least=False)
    for point in sections.get("attention", {}).get("points", []):
        if (point["batch"], point["context"]) == (64, 4096):
            judged("attention_of_copy", point["of_copy"], 0.8, least=True)
    if "gap" in sections:
        judged("gap_share", sections["gap"]["gap_share"], 0.03, least=False)
    if "load" in sections:
        judged("load_tok_s", sections["load"]["output_tok_s"], 12_500.0, least=True)
    if "batching" in sections:
        judged("times_continuous_batching", sections["batching"]["ratio"], 5.0, least=True)
    if "kernels" in sections:
        judged("kernel_failures", sections["kernels"]["failed"], 0.0, least=False)
    return made


def table(document: dict[str, Any]) -> str:
    """Return the verdicts, the steps with their bounds, and what failed, for a terminal."""
    lines = [f"{document['device']}{' (tiny)' if document['tiny'] else ''}"]
    for name, one in document["verdicts"].items():
        lines.append(
            f"{name:28} {one['measured']:>12} target {one['target']:>9} {'met' if one['met'] else 'missed'}"
        )
    for name, figures in document["sections"].items():
        for point in figures.get("points") or [figures]:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in point.items() if isinstance(v, int | float))
            lines.append(f"{name:12} {shown}")
    lines += [f"{name}: {reason}" for name, reason in document["failures"].items()]
    return "\n".join(lines)


def draw(folder: Path, document: dict[str, Any]) -> list[str]:
    """Draw step times beside their bounds and the trace of step times; return the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display anywhere this runs
    from matplotlib.figure import Figure

    parts = {
        n: f["points"] for n, f in document["sections"].items() if n.startswith("steps_") and f["points"]
    }
    trace = document["sections"].get("gap", {}).get("trace_ms")
    if not parts and not trace:
        return []
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(f"{document['device']}; {document['date']}", fontsize=8)
    left, right = figure.subplots(1, 2)
    for place, (name, points) in enumerate(parts.items()):
        batches = [point["batch"] for point in points]
        left.plot(batches, [p["step_ms"] for p in points], f"C{place}o-", label=name)
        left.plot(batches, [p["bound_ms"] for p in points], f"C{place}:", label=f"{name}, memory bound")
    left.set(xlabel="batch", ylabel="ms per step", xscale="log", yscale="log")
    left.legend(fontsize=6)
    right.plot(trace or [], drawstyle="steps-mid")
    right.set(xlabel="step", ylabel="ms", title="steady decoding")
    figure.savefig(folder / "gpu.png", dpi=110)
    return ["gpu.png"]
