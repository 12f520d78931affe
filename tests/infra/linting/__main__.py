"""`python -m tests.infra.linting`: every linter over every rendered template; sets their environments up
first.

Owns: the order, what counts as a failure. Must not know: what a template contains.
Invariant: no linter reaches the network once its environment stands; the last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.environments import Place

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RENDERED = ROOT / "infra" / "rendered"
# Inference components are not in every region's registry (eu-west-3 lacks them): `deploy plan` says so there.
REGIONS = ("us-east-1", "us-west-2", "eu-west-1")
LINT_S = 900.0


def place(name: str) -> Path:
    """Return the Python of the environment that `name`.lock describes."""
    root = Path(os.environ.get("STRONGROOM_LINT_CACHE") or ROOT / ".cache" / "linting")
    lock = HERE / f"{name}.lock"
    return Place(name, root).environment(("--require-hashes", "--no-deps", "-r", str(lock)))


def run(*command: str | Path) -> tuple[int, str]:
    """Return exit status and output of a linter; it has no need of the network."""
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=LINT_S
    )
    return done.returncode, done.stdout


def cdk(python: Path) -> dict[str, Any]:
    """Return what synthesis, cdk-nag and cfn-guard say."""
    _, output = run(python, "-m", "tests.infra.linting.cdk_checks")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def cfn_lint(python: Path) -> dict[str, Any]:
    """Return cfn-lint's findings; none is silenced."""
    files = sorted(RENDERED.glob("*.template.yaml"))
    status, output = run(python.parent / "cfn-lint", "-f", "json", "-r", *REGIONS, "-t", *files)
    found = [
        f"{Path(one['Filename']).name}: {one['Rule']['Id']} {one['Message']}" for one in json.loads(output)
    ]
    return {"ok": status == 0 and not found, "files": len(files), "findings": found}


def checkov(python: Path) -> dict[str, Any]:
    """Return checkov's findings; the skipped carry their reason in the template."""
    options = ("--framework", "cloudformation", "--skip-download", "--compact", "-o", "json")
    _, output = run(python, python.parent / "checkov", *options, "-d", RENDERED)
    report = json.loads(output)
    failed = [f"{one['check_id']} {one['resource']}" for one in report["results"]["failed_checks"]]
    summary = {name: report["summary"][name] for name in ("passed", "failed", "skipped", "parsing_errors")}
    return {"ok": not failed and not summary["parsing_errors"], **summary, "findings": failed}


def main() -> int:
    """Run all; 1 when one found something."""
    result: dict[str, Any] = {}
    for name, lock, lint in (
        ("cdk", "cdk", cdk),
        ("cfn-lint", "cdk", cfn_lint),
        ("checkov", "checkov", checkov),
    ):
        python = place(lock)
        start_s = time.monotonic()
        result[name] = lint(python)
        result[name]["took_s"] = round(time.monotonic() - start_s, 1)
        print(f"{name}: {'ok' if result[name]['ok'] else 'FAILED'}", file=sys.stderr)
    ok = all(one["ok"] for one in result.values())
    print(json.dumps({"ok": ok, **result}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
