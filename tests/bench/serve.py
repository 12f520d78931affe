"""`scripts/bench serve`: our own workloads, in process and over HTTP.

Owns: which workload runs on which form of our engine, W5's loads, W6's points, W7's starts.
Must not know: peers.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import cost, workloads
from tests.bench.figures import figures, open_loop
from tests.bench.foreign import run_s, tree
from tests.bench.prepared import kv_mib, ready, sealed
from tests.bench.protocol import EngineLost
from tests.bench.report import against
from tests.bench.rounds import (
    LOAD_LIMIT_S,
    REPEATS,
    RUN_LIMIT_S,
    Contestant,
    Fleet,
    Job,
    Say,
    interleaved,
    undisturbed,
)
from tests.bench.workloads import Text

IN_PROCESS = ("W1", "W2", "W3", "W4")
OVER_HTTP = ("W3", "W5", "W7")
ALL = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
OPEN_REQUESTS = 60  # of one load of W5; percentiles beyond p95 are coarse with fewer
BURST_REQUESTS = 32  # sent at once to find the capacity that loads are multiples of
STEPS_LIMIT_S = 3600.0
SHARE_SEQUENCES = 64  # at which the engine's own part of a step is stated
IDLE_S = 10.0  # an endpoint that nobody asks is watched for so long
IDLE_AFTER_S = 10.0  # what a start leaves to be done in the background is no idling


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    model: Path
    quantize: tuple[str, ...]
    workloads: tuple[str, ...]
    rounds: int
    quick: bool
    logs: Path

    @property
    def repeats(self) -> int:
        """How often a disturbed run is done again; a quick one means nothing anyway."""
        return 0 if self.quick else REPEATS


def ours(model: Path, quantize: str, *, http: bool = False) -> Contestant:
    """Return our engine with one quantization, in process or behind its endpoint."""
    name = f"strongroom {quantize}" + (" http" if http else "")
    module = "ours_http" if http else "ours"
    options = {"quantize": quantize, "kv_mib": kv_mib(model)}
    notes = "memory for keys and values as the largest workload needs it"
    if (model / "parts").is_dir():
        notes += "; made ready beforehand"
    return Contestant(name, module, Path(sys.executable), model, options, pauses=not http, notes=notes)


def jobs(names: Sequence[str], text: Text, *, quick: bool) -> list[Job]:
    """Return the closed workloads among `names`; W4 is two, at once and staggered."""
    wanted = [each for name in names for each in ((name, "W4s") if name == "W4" else (name,))]
    return [
        Job(name, partial(workloads.requests, name, text, quick=quick), partial(figures, name))
        for name in wanted
        if name in workloads.FULL
    ]


def run(plan: Plan, say: Say) -> dict[str, Any]:
    """Measure and return the parts of the document: records, told, open_loop, steps, starts, failures."""
    text = workloads.read_text(plan.model)
    made: dict[str, Any] = {
        "records": [],
        "open_loop": {},
        "steps": {},
        "starts": {},
        "idle": {},
        "failures": {},
    }
    models = {quantize: ready(plan.model, quantize, say) for quantize in plan.quantize}
    inside = [ours(model, quantize) for quantize, model in models.items()]
    outside = [ours(model, quantize, http=True) for quantize, model in models.items()]
    with ExitStack() as stack, Fleet(plan.logs, text, say) as fleet:
        started = list(outside)
        if "W7" in plan.workloads and not plan.quick:
            started += [stack.enter_context(sealed(one, say)) for one in outside]
        closed = jobs([name for name in plan.workloads if name in IN_PROCESS], text, quick=plan.quick)
        only_inside = [job for job in closed if job.name != "W3"]
        both = [job for job in closed if job.name == "W3"]
        made["records"] += interleaved(fleet, inside, only_inside, plan.rounds, say, plan.repeats)
        made["records"] += interleaved(fleet, [*inside, *outside], both, plan.rounds, say, plan.repeats)
        parts: list[tuple[str, str, list[Contestant], Callable[[Contestant], Any]]] = [
            ("W5", "open_loop", outside, lambda one: _open_loop(fleet, one, text, plan, say)),
            ("W6", "steps", inside, lambda one: _steps(fleet, one, plan, say)),
            ("W7", "starts", started, lambda one: _starts(fleet, one, plan, say)),
            ("W7", "idle", outside, lambda one: _idle(fleet, one, plan, say)),
        ]
        for workload, key, contestants, measure in parts:
            for one in contestants if workload in plan.workloads else ():
                try:
                    made[key][one.name] = measure(one)
                except EngineLost as error:
                    made["failures"][f"{one.name} {workload}"] = str(error)
                    fleet.unload(one.name)
        # what HTTP costs: the same workload outside and inside, in turn
        made["ratios"] = {
            f"{a.name} / {b.name}": against(made["records"], a.name, b.name)
            for a, b in zip(outside, inside, strict=True)
            if both
        }
        return {**made, "told": fleet.told}


def _open_loop(fleet: Fleet, one: Contestant, text: Text, plan: Plan, say: Say) -> dict[str, Any]:
    """Return capacity (requests a second, from a burst) and the figures at each load."""
    burst, count = (6, 8) if plan.quick else (BURST_REQUESTS, OPEN_REQUESTS)
    loads = (0.5, 2.0) if plan.quick else workloads.LOADS
    asked = workloads.conversations(text, burst, math.inf, seed=1)
    asked = [replace(r, output_tokens=min(r.output_tokens, 16)) for r in asked] if plan.quick else asked
    got = fleet.ready(one).run(asked, RUN_LIMIT_S)
    answered = [timed for timed in got if not timed.error]
    if not answered:
        raise EngineLost(f"no request of the burst was answered: {got[0].error}")
    capacity_per_s = len(answered) / max(timed.events[-1][0] for timed in answered)
    points = []
    for number, load in enumerate(loads):
        say(f"W5 at {load} times {capacity_per_s:.2f} requests/s, {one.name}")
        asked = workloads.conversations(text, count, load * capacity_per_s, seed=100 + number)
        if plan.quick:
            asked = [replace(r, output_tokens=min(r.output_tokens, 16)) for r in asked]

        def work(asked: list[workloads.Request] = asked) -> dict[str, Any]:
            return open_loop(asked, fleet.ready(one).run(asked, RUN_LIMIT_S))

        # one attempt: minutes long, and marked rather than repeated
        points.append({"load": load, **undisturbed(work, say, repeats=0)})
    return {"capacity_per_s": capacity_per_s, "points": points}


def _steps(fleet: Fleet, one: Contestant, plan: Plan, say: Say) -> dict[str, Any]:
    """Return W6's points and the fitted terms."""
    say(f"W6: step times, {one.name}")
    fleet.ready(one)
    points = [list(point) for point in cost.grid(_window(plan.model), quick=plan.quick)]

    def work() -> dict[str, Any]:
        return fleet.ready(one).ask({"do": "steps", "points": points}, STEPS_LIMIT_S)

    told = undisturbed(work, say, repeats=0)
    sequences = 4 if plan.quick else SHARE_SEQUENCES
    share = fleet.ready(one).ask({"do": "share", "sequences": sequences}, STEPS_LIMIT_S)["share"]
    fleet.unload(one.name)  # its engine made way for a runner of another shape
    return {
        "points": told["points"],
        "terms": cost.explain(told["points"]),
        "share": share,
        "foreign_share": told["foreign_share"],
        "noisy": told["noisy"],
    }


def _window(model: Path) -> int:
    """Return the longest sequence the checkpoint's configuration allows, 2048 when it does not say."""
    import json

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or 2048)


def _starts(fleet: Fleet, one: Contestant, plan: Plan, say: Say) -> list[dict[str, float]]:
    """Return the phases of `rounds` starts, each of a new process, in seconds after it began."""
    if plan.quick:  # the start that other workloads had anyway
        fleet.ready(one)
        return [fleet.told[one.name]["phases"]]
    made = []
    fleet.unload(one.name)
    for number in range(plan.rounds):
        say(f"W7: start {number + 1} of {plan.rounds}, {one.name}")

        def work() -> dict[str, Any]:
            child = one.child(plan.logs)
            try:
                return {"phases": child.load(one.model, one.options, LOAD_LIMIT_S)["phases"]}
            finally:
                child.close()

        made.append(undisturbed(work, say)["phases"])
    return made


def _idle(fleet: Fleet, one: Contestant, plan: Plan, say: Say) -> float:
    """Return the share of one CPU that a healthy endpoint uses while nobody asks anything."""
    child = fleet.ready(one)
    say(f"watching {one.name} do nothing")
    settle_s, wait_s = (0.0, 1.0) if plan.quick else (IDLE_AFTER_S, IDLE_S)
    time.sleep(settle_s)
    pids = set[int]().union(*(tree(root) for root in child.roots))
    before_s, began_s = run_s(pids), time.perf_counter()
    time.sleep(wait_s)
    return (run_s(pids) - before_s) / (time.perf_counter() - began_s)
