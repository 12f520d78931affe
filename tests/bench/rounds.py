"""Engines in turn, round after round, each run with the CPU share of others beside it.

Owns: which engine is loaded, which one may compute, repeats of disturbed runs.
Must not know: what an engine is.
Invariant: only one engine computes at any time, the others are stopped, idle or unloaded; no record is
dropped: a run that stayed disturbed is kept and marked, one that failed is kept with its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.figures import Figures, Inexact, Timed
from tests.bench.foreign import available_mib, foreign_share, me, memory_mib, sample
from tests.bench.protocol import ROOT, Child, EngineLost
from tests.bench.workloads import Request, Text, warm_up

FOREIGN_LIMIT = 0.03  # of all CPU time; beyond it a run says more about the machine than about the engine
REPEATS = 3  # times a disturbed run is done again before the least disturbed one is kept
RUN_LIMIT_S = 1800.0
LOAD_LIMIT_S = 900.0
SETTLE_S = 0.2  # after others were stopped
SPARE_MIB = 2048.0  # left free when deciding what can stay loaded

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """An engine as it is started; `need_mib` is what it takes at most, for deciding what stays loaded."""

    name: str
    module: str
    python: Path
    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    need_mib: float = 2500.0
    root: Path = ROOT
    notes: str = ""
    pauses: bool = True  # False: it watches its own processes and would take a pause for a hang; it idles

    def child(self, logs: Path) -> Child:
        """Start the driver's process, nothing loaded."""
        # -P: the folder it runs in does not come before PYTHONPATH, where `compare` puts a built package
        command = [str(self.python), "-P", "-m", f"tests.bench.drivers.{self.module}"]
        return Child(command, logs / f"{self.name.replace(' ', '-')}.log", self.environment, self.root)


class Fleet:
    """The loaded engines: at most one runs, the rest are stopped; `told` is what each said on loading."""

    def __init__(self, logs: Path, text: Text, say: Say) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._text, self._say = logs, text, say
        self._loaded: dict[str, tuple[Contestant, Child]] = {}
        self.told: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._loaded):
            self.unload(name)

    def ready(self, one: Contestant) -> Child:
        """Return the child of `one`, loaded, warm and alone in running; raises EngineLost."""
        for name, (other, child) in self._loaded.items():
            if name != one.name and other.pauses:
                child.pause()
        if one.name not in self._loaded:
            self._make_room(one.need_mib)
            self._load(one)
        child = self._loaded[one.name][1]
        child.resume()
        time.sleep(SETTLE_S)
        return child

    def unload(self, name: str) -> None:
        """End an engine; nothing when it is not loaded."""
        _, child = self._loaded.pop(name, (None, None))
        if child is not None:
            child.close()

    def _make_room(self, need_mib: float) -> None:
        while self._loaded and available_mib() < need_mib + SPARE_MIB:
            largest = max(self._loaded, key=lambda name: self._loaded[name][0].need_mib)
            self._say(f"unloading {largest}: memory is short")
            self.unload(largest)

    def _load(self, one: Contestant) -> None:
        self._say(f"loading {one.name}")
        child = one.child(self._logs)
        try:
            reply = child.load(one.model, one.options, LOAD_LIMIT_S)
            loaded = memory_mib(child.roots)
            child.run(warm_up(self._text), RUN_LIMIT_S)
        except EngineLost:
            child.close()
            raise
        self._loaded[one.name] = (one, child)
        kept = self.told.setdefault(one.name, {"start_s": [], "about": reply["about"], "notes": one.notes})
        kept["start_s"].append(round(reply["start_s"], 3))
        kept["loaded_mib"] = loaded
        kept["phases"] = reply["phases"]


@dataclass(frozen=True)
class Job:
    """One workload: its requests in a round, and how the answers become figures."""

    name: str
    requests: Callable[[int], list[Request]]
    figures: Callable[[Sequence[Request], Sequence[Timed]], Figures]


def undisturbed(work: Callable[[], dict[str, Any]], say: Say, repeats: int = REPEATS) -> dict[str, Any]:
    """Do `work` until others used at most FOREIGN_LIMIT of the CPU meanwhile, `repeats` + 1 times at most.

    Returns what `work` did in the least disturbed run, with `foreign_share`, `attempts`, `noisy`, `wall_s`.
    """
    best: dict[str, Any] = {}
    for attempt in range(1, repeats + 2):
        before, began_s = sample(me()), time.perf_counter()
        result = work()
        wall_s = time.perf_counter() - began_s
        share = foreign_share(before, sample(me()))
        if not best or share < best["foreign_share"]:
            best = {**result, "foreign_share": round(share, 4), "wall_s": round(wall_s, 3)}
        best["attempts"] = attempt
        if share <= FOREIGN_LIMIT:
            break
        say(f"others used {share:.1%} of the CPU meanwhile (limit {FOREIGN_LIMIT:.0%})")
    return {**best, "noisy": best["foreign_share"] > FOREIGN_LIMIT}


def turn(
    fleet: Fleet, one: Contestant, job: Job, number: int, say: Say, repeats: int = REPEATS
) -> dict[str, Any]:
    """Return the record of one run of `one`: figures, or `error`; the engine is unloaded after a failure."""
    record: dict[str, Any] = {"engine": one.name, "workload": job.name, "round": number}
    offset = 0

    def run() -> dict[str, Any]:
        nonlocal offset
        # each repeat reads on in the text, so that nothing of the run before is in a cache
        asked = job.requests(number * (REPEATS + 1) + offset)
        offset += 1
        child = fleet.ready(one)
        return {"figures": job.figures(asked, child.run(asked, RUN_LIMIT_S)), **memory_mib(child.roots)}

    try:
        fleet.ready(one)  # loading is no part of the measured time
        record |= undisturbed(run, say, repeats)
    except (EngineLost, Inexact) as error:
        record["error"] = str(error)
        fleet.unload(one.name)
    return record


def starts(
    contestants: Sequence[Contestant], logs: Path, rounds: int, say: Say, repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """Yield records of W7: seconds from the start of a driver's process to a model that can be asked.

    Nothing else may be loaded. Who fails is not started again.
    """
    lost: set[str] = set()
    for number in range(1, rounds + 1):
        for one in contestants:
            if one.name in lost:
                continue
            say(f"round {number} of {rounds}: W7, {one.name}")
            record: dict[str, Any] = {"engine": one.name, "workload": "W7", "round": number}

            def work(one: Contestant = one) -> dict[str, Any]:
                child = one.child(logs)
                try:
                    told = child.load(one.model, one.options, LOAD_LIMIT_S)
                    return {"figures": {"start_s": told["start_s"]}, **memory_mib(child.roots)}
                finally:
                    child.close()

            try:
                record |= undisturbed(work, say, repeats)
            except EngineLost as error:
                record["error"] = str(error)
                lost.add(one.name)
            yield record


def interleaved(
    fleet: Fleet,
    contestants: Sequence[Contestant],
    jobs: Sequence[Job],
    rounds: int,
    say: Say,
    repeats: int = REPEATS,
) -> Iterator[dict[str, Any]]:
    """Yield the records of `rounds` rounds, every engine's turn beside the others'; the first one rotates.

    With room for all engines at once they take turns at each workload; otherwise each does all workloads in
    its turn, since loading takes longer than running. Who fails to load twice is left out from then on.
    """
    together = sum(one.need_mib for one in contestants) + SPARE_MIB <= available_mib()
    lost: dict[str, int] = {}
    for number in range(1, rounds + 1):
        shift = (number - 1) % max(1, len(contestants))
        order = [*contestants[shift:], *contestants[:shift]]
        pairs = (
            [(one, job) for job in jobs for one in order]
            if together
            else [(one, job) for one in order for job in jobs]
        )
        for one, job in pairs:
            if lost.get(one.name, 0) > 1:
                continue
            say(f"round {number} of {rounds}: {job.name}, {one.name}")
            record = turn(fleet, one, job, number, say, repeats)
            if "error" in record:
                lost[one.name] = lost.get(one.name, 0) + 1
                say(f"{one.name}: {record['error']}")
            yield record
