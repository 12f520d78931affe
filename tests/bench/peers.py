"""`scripts/bench peers`: ours beside other engines, in turn, in one run.

Owns: the list of peers. Must not know: how one is set up or driven (its file in `drivers` does).
Invariant: a peer that cannot be had here is named with the reason, and the rest goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import workloads
from tests.bench.environments import SetupFailed
from tests.bench.report import against
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
    own = [ours(plan.model, quantize) for quantize in plan.quantize]
    text = workloads.read_text(plan.model)
    wanted = jobs(plan.workloads, text, quick=plan.quick)
    with Fleet(plan.logs, text, say) as fleet:
        records = list(interleaved(fleet, [*own, *theirs], wanted, plan.rounds, say, plan.repeats))
        told = fleet.told
    served = [ours(plan.model, quantize, http=True) for quantize in plan.quantize]
    if "W7" in plan.workloads:
        records += starts([*served, *theirs], plan.logs, plan.rounds, say, plan.repeats)
    for record in records:
        if "error" in record:
            failures.setdefault(record["engine"], record["error"])
    pairs = {
        f"{a.name} / {b.name}": ratios
        for a in (*own, *served)
        for b in theirs
        if (ratios := against(records, a.name, b.name))
    }
    return {"records": records, "told": told, "ratios": pairs, "failures": failures}
