"""Checking an image: save it, run it four times, judge, report.

Owns: the order, the report. Must not know: what any check looks at.
Invariant: a check that was not run is reported as not run; only 48 of 48 passed is a pass of everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from infra.image import build, seccomp, wheelhouse
from infra.image.checks import configuration, files, packages, runtime
from infra.image.checks.table import Result
from infra.image.container import HARDENED, ROOT_RIGHTS, Container, Facts, observe
from infra.image.docker import DockerFailed, docker, inspect
from infra.image.subject import Image

CHECKS: Final = 48
REQUEST: Final = json.dumps(
    {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
)
# Run by another command, or not yet: said in the report, never counted as passed.
ELSEWHERE: Final = {
    19: "same digest on rebuild: run with `--again`",
}


def main(arguments: Sequence[str]) -> int:
    """Check the image; the last line of stdout is one JSON document. Returns 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="scripts/check-image", allow_abbrev=False)
    parser.add_argument("--tag", default=f"{build.NAME}:{build.version()}-cpu")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a model directory; without one nothing is run")
    parser.add_argument("--again", action="store_true", help="build once more, from nothing, and compare")
    chosen = parser.parse_args(arguments)
    try:
        results = saved_checks(chosen.tag, chosen.variant)
        if chosen.again:
            results.append(again(chosen.tag, chosen.variant))
        if chosen.model is not None:
            results += runtime.TABLE.run(run_all(chosen.tag, chosen.model.resolve()))
    except (DockerFailed, wheelhouse.WheelRefused, build.BaseRefused) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 3
    report = summary(results)
    print(json.dumps(report, separators=(",", ":")))
    return 0 if report["failed"] == [] else 1


def saved_checks(tag: str, variant: str) -> list[Result]:
    """Return the outcome of every check that needs no running container."""
    lock = wheelhouse.read_lock((build.ROOT / "container" / f"requirements-{variant}.lock").read_text())
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "image.tar")
        docker("save", "--output", str(saved), tag)
        with Image(saved) as image:
            results = [*configuration.TABLE.run(image), *files.TABLE.run(image)]
            return results + packages.TABLE.run(packages.Installed(image, tuple(lock)))


def again(tag: str, variant: str) -> Result:
    """Build from nothing under another name and compare the ids: check 19."""
    cache = build.ROOT / ".cache" / "image"
    second = build.build(build.Told(variant, "", f"{tag}-again", cache, clean=True))
    first = inspect(tag)["Id"]
    docker("rmi", f"{tag}-again")
    same = first == second["image_id"]
    found = () if same else (f"{first} was built, then {second['image_id']}",)
    return Result(19, "the same digest when it is built again", found)


def run_all(tag: str, model: Path) -> runtime.Ran:
    """Run the image four times, one after the other, and return what was seen."""
    stranger = str(random.randint(20_000, 2**31 - 2))
    hardened = started("as its own user", Container(tag, model))
    strict = [*HARDENED, "--security-opt", f"seccomp={seccomp.PROFILE}"]
    other = started("as any user", Container(tag, model, user=f"{stranger}:{stranger}", flags=strict))
    root = started("as root", Container(tag, model, user="0", flags=[*HARDENED, *ROOT_RIGHTS]))
    nowhere = ["--hostname", "nowhere.invalid", "--volume", f"{os.devnull}:/etc/hosts:ro"]
    nowhere += ["--volume", f"{os.devnull}:/etc/resolv.conf:ro"]
    strange = Container(tag, model, flags=[*HARDENED, *nowhere], environment={"TZ": "Nowhere/None"})
    told = dict(other.host) | {"expected_user": stranger}
    return runtime.Ran(hardened, dataclasses.replace(other, host=told), root, started("lost", strange))


def started(how: str, container: Container) -> Facts:
    """Run one container to its end and return what was observed."""
    with container:
        facts = observe(container, REQUEST)
    said = "never healthy" if facts.started_s is None else f"healthy after {facts.started_s:.1f} s"
    print(f"check: {how}: {said} {breakdown(facts.log)}", file=sys.stderr, flush=True)
    if facts.started_s is None:
        print(facts.log[-2000:], file=sys.stderr)
    return facts


def breakdown(log: str) -> dict[str, float]:
    """Return the seconds from the first line of a container's log to the first of every kind of event."""
    times: dict[str, float] = {}
    for line in log.splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            times.setdefault(str(event["event"]), float(event["time"]))
    began_s = min(times.values(), default=0.0)
    return {name: round(time_s - began_s, 2) for name, time_s in times.items()}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Print a line per check to stderr and return the report."""
    by_number = {result.number: result for result in results}
    for number in range(1, CHECKS + 1):
        result = by_number.get(number)
        if result is None:
            print(f"  -  {number:2} not run: {ELSEWHERE.get(number, 'give `--model`')}", file=sys.stderr)
            continue
        print(f" {'ok  ' if result.passed else 'FAIL'} {number:2} {result.title}", file=sys.stderr)
        for finding in (result.findings or ())[:8]:
            print(f"          {finding}", file=sys.stderr)
    failed = [number for number, result in sorted(by_number.items()) if not result.passed]
    return {
        "ok": not failed and len(by_number) == CHECKS,
        "passed": sum(result.passed for result in results),
        "failed": failed,
        "not_run": [number for number in range(1, CHECKS + 1) if number not in by_number],
        "of": CHECKS,
        "findings": {str(n): len(by_number[n].findings or ()) for n in failed},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
