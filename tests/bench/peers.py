"""`scripts/bench peers`: ours beside other engines, in turn, in one run.

Owns: the list of peers. Must not know: how one is set up or driven (its file in `drivers` does).
Invariant: a peer that cannot be had here is named with the reason, and the rest goes on.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import workloads
from tests.bench.environments import SetupFailed
from tests.bench.memory_read import read_gb_s
from tests.bench.prepared import ready, sealed
from tests.bench.report import against, good
from tests.bench.rounds import Contestant, Fleet, Say, interleaved, starts
from tests.bench.serve import Plan, jobs, ours


@dataclass(frozen=True)
class Peer:
    """A driver's module and what its `set_up` is given beside the model."""

    module: str
    arguments: tuple[str, ...] = ()


PEERS = {
    "llama.cpp-q8_0": Peer("llama_cpp", ("q8_0",)),
    "openvino-int8": Peer("openvino", ("int8",)),
    "openvino-int4": Peer("openvino", ("int4",)),
    "vllm": Peer("vllm"),
    "transformers": Peer("transformers", ("static",)),
    "transformers-continuous": Peer("transformers", ("continuous",)),
}
USUAL = ("llama.cpp-q8_0", "openvino-int8", "vllm", "transformers", "transformers-continuous")


def prepare(names: Sequence[str], model: Path, say: Say) -> tuple[list[Contestant], dict[str, str]]:
    """Return the peers that can be had on this machine, and name -> reason of those that cannot."""
    had, refused = [], {}
    for name in names:
        peer = PEERS[name]
        module = importlib.import_module(f"tests.bench.drivers.{peer.module}")
        say(f"setting up {name} (minutes the first time)")
        try:
            ready = module.set_up(model, *peer.arguments)
        except (SetupFailed, OSError) as error:
            refused[name] = str(error)
            say(f"{name} is left out: {error}")
            continue
        had.append(
            Contestant(
                name,
                peer.module,
                ready.python,
                ready.model,
                ready.options,
                ready.environment,
                need_mib=module.NEED_MIB,
                notes=ready.notes,
            )
        )
    return had, refused


def run(plan: Plan, names: Sequence[str], say: Say) -> dict[str, Any]:
    """Measure and return the parts of the document: records, told, ratios, failures."""
    theirs, failures = prepare(names, plan.model, say)
    models = {quantize: ready(plan.model, quantize, say) for quantize in plan.quantize}
    own = [ours(model, quantize) for quantize, model in models.items()]
    text = workloads.read_text(plan.model)
    wanted = jobs(plan.workloads, text, quick=plan.quick)
    with Fleet(plan.logs, text, say) as fleet:
        records = []
        for record in interleaved(fleet, [*own, *theirs], wanted, plan.rounds, say, plan.repeats):
            if record["workload"] == "W1" and record["engine"] in {one.name for one in own}:
                # right beside the run that it bounds; no engine computes now
                record["memory_read_gb_s"] = round(read_gb_s(len(os.sched_getaffinity(0))), 2)
            records.append(record)
        told = fleet.told
    served = [ours(model, quantize, http=True) for quantize, model in models.items()]
    if "W7" in plan.workloads:
        with ExitStack() as stack:
            served += [stack.enter_context(sealed(one, say)) for one in served]
            records += starts([*own, *served, *theirs], plan.logs, plan.rounds, say, plan.repeats)
    for record in records:
        if "error" in record:
            failures.setdefault(record["engine"], record["error"])
    pairs = {
        f"{a.name} / {b.name}": ratios
        for a in (*own, *served)
        for b in theirs
        if (ratios := against(records, a.name, b.name))
    }
    return {
        "records": records,
        "told": told,
        "ratios": pairs,
        "bounds": {one.name: bound for one in own if (bound := memory_bound(records, told, one.name))},
        "failures": failures,
    }


def memory_bound(
    records: Sequence[dict[str, Any]], told: Mapping[str, Any], engine: str
) -> dict[str, Any] | None:
    """Return what memory allows `engine` in W1 and which share of it is reached; None where it is not known.

    Each token reads the weights of a step once; the keys and values of 192 positions are left out.
    """
    step_bytes = told.get(engine, {}).get("about", {}).get("step_bytes")
    rounds = [record for record in good(records, engine, "W1") if "memory_read_gb_s" in record]
    if not step_bytes or not rounds:
        return None
    bounds = [record["memory_read_gb_s"] * 1e9 / step_bytes for record in rounds]
    reached = [r["figures"]["decode_tok_s"] / bound for r, bound in zip(rounds, bounds, strict=True)]
    return {
        "step_mib": round(step_bytes / 2**20, 1),
        "read_gb_s": median(record["memory_read_gb_s"] for record in rounds),
        "bound_tok_s": round(median(bounds), 1),
        "reached": round(median(reached), 4),
        "least": round(min(reached), 4),
        "most": round(max(reached), 4),
    }
