"""How much later an endpoint is healthy when its model is sealed: whole starts, plain and sealed in turn.

    python -m tests.sagemaker_entry.sealed_speed [--rounds N] [--cache DIRECTORY]

The last line of stdout is one JSON document; ratios are of the same round. Processor time is of the whole
life of the endpoint: it tells more than the clock on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from pathlib import Path

from scripts.demo import CACHE
from scripts.demo_model import ensure_checkpoint
from scripts.demo_package import ensure_ready, sealed
from scripts.endpoint import Endpoint
from scripts.progress import progress, say


def cpu_s() -> float:
    """Return the processor time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(times: dict[str, list[float]]) -> float:
    """Return the median over rounds of sealed to plain."""
    return round(
        statistics.median(
            after / before for before, after in zip(times["plain"], times["sealed"], strict=True)
        ),
        3,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="sealed_speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    with progress("preparing") as told:
        model = ensure_ready(ensure_checkpoint(options.cache, told), told)
        with sealed(model, "demo", told) as package:
            kinds = {"plain": (model, {}), "sealed": (package.path, package.environment)}
            took: dict[str, list[float]] = {kind: [] for kind in kinds}
            spent: dict[str, list[float]] = {kind: [] for kind in kinds}
            for round_ in range(options.rounds + 1):
                for kind, (path, environment) in kinds.items():
                    before_s = cpu_s()
                    with Endpoint(path, environment=dict(environment)) as endpoint:
                        started_s = endpoint.start_s
                    if round_:  # the first round fills the page cache
                        took[kind].append(started_s)
                        spent[kind].append(cpu_s() - before_s)
                say(f"round {round_}: {took} {spent}")
    shown = {
        "plain_s": [round(each, 3) for each in took["plain"]],
        "sealed_s": [round(each, 3) for each in took["sealed"]],
        "ratio": ratio(took),
        "plain_cpu_s": [round(each, 2) for each in spent["plain"]],
        "sealed_cpu_s": [round(each, 2) for each in spent["sealed"]],
        "cpu_ratio": ratio(spent),
        "sealed_bytes": package.sealed_bytes,
        "seal_s": round(package.sealed_s, 2),
        "verify_s": round(package.verified_s, 2),
    }
    print(json.dumps(shown, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
