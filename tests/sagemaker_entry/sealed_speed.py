"""How much later an endpoint is healthy when its model is sealed: whole starts, plain and sealed in turn.

    python -m tests.sagemaker_entry.sealed_speed [--rounds N] [--seconds S] [--cache DIRECTORY]

The last line of stdout is one JSON document; ratios are of the same round. Processor time is of the whole
life of the endpoint: it tells more than the clock on a machine that others use, too. The first round, which
fills the page cache, does not count. No round begins that would end after `--seconds`, judged by the longest
so far; one counts whatever it takes. Making the model ready, once per machine, and sealing come before that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.demo import CACHE
from scripts.demo_model import ensure_checkpoint
from scripts.demo_package import ensure_ready, sealed
from scripts.endpoint import Endpoint
from scripts.progress import progress, say

KINDS = ("plain", "sealed")


@dataclass(frozen=True, slots=True)
class Start:
    """What one start took."""

    clock_s: float
    cpu_s: float


def cpu_s() -> float:
    """Return the processor time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def started(path: Path, environment: Mapping[str, str]) -> Start:
    """Start an endpoint and end it as soon as it is healthy."""
    before_s = cpu_s()
    with Endpoint(path, environment=dict(environment)) as endpoint:
        healthy_s = endpoint.start_s
    return Start(healthy_s, cpu_s() - before_s)


def measure(
    start: Callable[[str], Start],
    rounds: int,
    limit_s: float,
    now_s: Callable[[], float] = time.monotonic,
) -> list[dict[str, Start]]:
    """Return the starts of each counted round by kind: at most `rounds`, as many as fit `limit_s` or one."""
    begun_s, longest_s = now_s(), 0.0
    counted: list[dict[str, Start]] = []
    for number in range(rounds + 1):
        round_s = now_s()
        if len(counted) > 0 and round_s + longest_s - begun_s > limit_s:
            break
        took = {kind: start(kind) for kind in KINDS}
        longest_s = max(longest_s, now_s() - round_s)
        say(f"round {number}: " + ", ".join(f"{kind} {each.clock_s:.2f} s" for kind, each in took.items()))
        if number > 0:
            counted.append(took)
    return counted


def summary(counted: list[dict[str, Start]]) -> dict[str, object]:
    """Return every counted start, and medians over rounds of sealed to plain."""
    told: dict[str, object] = {"rounds": len(counted)}
    for name, of in (("", lambda each: each.clock_s), ("cpu_", lambda each: each.cpu_s)):
        for kind in KINDS:
            told[f"{kind}_{name}s"] = [round(of(took[kind]), 3) for took in counted]
        ratios = [of(took["sealed"]) / of(took["plain"]) for took in counted]
        told[f"{name}ratio"] = round(statistics.median(ratios), 3)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(prog="sealed_speed", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("STRONGROOM_TEST_CACHE") or CACHE))
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("`--rounds` is at least 1")
    with progress("preparing") as told:
        model = ensure_ready(ensure_checkpoint(options.cache, told), told)
        with sealed(model, "demo", told) as package:
            of: dict[str, tuple[Path, Mapping[str, str]]] = {
                "plain": (model, {}),
                "sealed": (package.path, package.environment),
            }
            counted = measure(lambda kind: started(*of[kind]), options.rounds, options.seconds)
    shown = summary(counted) | {
        "sealed_bytes": package.sealed_bytes,
        "seal_s": round(package.sealed_s, 2),
        "verify_s": round(package.verified_s, 2),
    }
    print(json.dumps(shown, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
