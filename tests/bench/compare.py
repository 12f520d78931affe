"""`scripts/bench compare A B`: two commits of this repository, in turn, with the same harness.

Owns: the checkouts, their builds, their environments. Must not know: workloads.
Invariant: both sides run the harness of this checkout; only the rooms differ. Nothing stays checked out.

    <temporary>/a/          worktree of A, its tests/bench replaced by ours
    <temporary>/a-built/    the package as A builds it, native code included, before it on the path
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench import workloads
from tests.bench.environments import SetupFailed
from tests.bench.protocol import ROOT
from tests.bench.report import against
from tests.bench.rounds import Contestant, Fleet, Say, interleaved
from tests.bench.serve import Plan, jobs, ours

LOCK = "tests/requirements-cpu.lock"


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Yield a worktree of `commit` under `folder`; raises SetupFailed. It is removed in the end."""
    where = folder / hashlib.sha256(commit.encode()).hexdigest()[:8]
    _git("worktree", "add", "--detach", "--quiet", str(where), commit)
    try:
        shutil.rmtree(where / "tests" / "bench", ignore_errors=True)
        shutil.copytree(ROOT / "tests" / "bench", where / "tests" / "bench")
        yield where
    finally:
        _git("worktree", "remove", "--force", str(where))


def _git(*words: str) -> str:
    run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SetupFailed(f"`git {words[0]}` failed: {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout.strip()


def python_of(where: Path, say: Say) -> Path:
    """Return the Python for a checkout: this one when the locks agree, else an environment of its own."""
    if (where / LOCK).read_bytes() == (ROOT / LOCK).read_bytes():
        return Path(sys.executable)
    say("its lock differs: making an environment of its own (a minute or two)")
    run = subprocess.run([str(where / "scripts" / "environment")], stdout=sys.stderr, check=False)
    if run.returncode:
        raise SetupFailed("`scripts/environment` of the commit failed")
    return where / ".venv" / "bin" / "python"


def build(where: Path, python: Path) -> Path:
    """Return a folder that holds the package as this commit builds it; raises SetupFailed."""
    wheels, built = where.with_name(f"{where.name}-wheel"), where.with_name(f"{where.name}-built")
    pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
    for words in (
        ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(where)],
        ["install", "--no-deps", "--no-index", "--find-links", str(wheels), "-t", str(built), "strongroom"],
    ):
        run = subprocess.run([*pip, *words], cwd=where, stdout=sys.stderr, check=False)
        if run.returncode:
            raise SetupFailed(f"`pip {words[0]}` of the commit failed")
    return built


def contestants(plan: Plan, label: str, where: Path, say: Say) -> list[Contestant]:
    """Return our engine as the checkout at `where` has it, once per quantization."""
    python = python_of(where, say)
    path = os.pathsep.join((str(build(where, python)), str(where)))
    return [
        replace(
            ours(plan.model, each),
            name=f"{label} {each}",
            python=python,
            root=where,
            environment={"PYTHONPATH": path},
        )
        for each in plan.quantize
    ]


def run(plan: Plan, commits: tuple[str, str], say: Say) -> dict[str, Any]:
    """Measure both and return the parts of the document: commits, records, told, ratios (first to second)."""
    resolved = [_git("rev-parse", "--short=12", f"{commit}^{{commit}}") for commit in commits]
    text = workloads.read_text(plan.model)
    wanted = jobs(plan.workloads, text, quick=plan.quick)
    with (
        tempfile.TemporaryDirectory() as name,
        checkout(resolved[0], Path(name, "a")) as first,
        checkout(resolved[1], Path(name, "b")) as second,
        Fleet(plan.logs, text, say) as fleet,
    ):
        sides: list[Contestant] = []
        for label, where in (("A", first), ("B", second)):
            say(f"building {label}")
            sides += contestants(plan, label, where, say)
        records = list(interleaved(fleet, sides, wanted, plan.rounds, say, plan.repeats))
    pairs = {
        f"A / B {quantize}": against(records, f"A {quantize}", f"B {quantize}") for quantize in plan.quantize
    }
    return {
        "commits": dict(zip(("A", "B"), resolved, strict=True)),
        "records": records,
        "told": fleet.told,
        "ratios": pairs,
        "failures": {r["engine"]: r["error"] for r in records if "error" in r},
    }
