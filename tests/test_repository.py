"""What no tracked file may hold: a machine's path, a registry's host name, a file too long to read."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Spelled in parts so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"/" + r"(work|farm|root|home)/",
            r"/opt/" + r"(wheels|pypi)",
            "pypi" + r"\.org",
            "python" + r"hosted\.org",
            "registry" + r"\.npmjs",
            r"(deb|security)" + r"\.debian\.org",
            "download" + r"\.pytorch\.org",
        )
    )
)


def tracked() -> list[Path]:
    # Files git knows or would add: a checkout without git history (an unpacked archive) has none to check.
    run = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in run.stdout.splitlines() if (ROOT / line).is_file()]


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def test_no_file_names_a_machine_path_or_a_registry_host() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found


@pytest.mark.parametrize("sample", ["see /" + "root/x", "https://pypi" + ".org/simple", "/" + "work/main"])
def test_the_pattern_sees_what_it_forbids(sample: str) -> None:
    assert FORBIDDEN.search(sample)


def test_no_python_file_passes_400_lines_and_no_function_70() -> None:
    long = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 70:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {size} lines")
    assert not long


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


@pytest.mark.parametrize("room", ["engine", "text", "sagemaker_entry"])
def test_rooms_without_a_gpu_have_at_least_as_much_test_as_code(room: str) -> None:
    def lines(folder: Path) -> int:
        return sum(p.read_text(encoding="utf-8").count("\n") for p in folder.rglob("*.py"))

    code = ROOT / room if room == "sagemaker_entry" else ROOT / "container" / room
    assert lines(ROOT / "tests" / room) >= lines(code)


def test_the_readme_shows_both_commands_within_25_lines() -> None:
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25])
    assert "scripts/demo" in head and "scripts/test" in head


def test_every_promise_in_the_readme_names_an_existing_test() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)`", readme)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
