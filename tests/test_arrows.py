"""The arrows between rooms: who may import whom, and which room may know which library.

A new arrow is a design change: it is made here first, in words, or not at all.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "container.engine",
    "container.model",
    "container.kernels",
    "container.ranks",
    "container.text",
    "container.tuning",
    "sagemaker_entry",
    "model_package",
    "infra",
)
MAY_IMPORT: dict[str, frozenset[str]] = {
    "container.engine": frozenset(),
    "container.text": frozenset(),
    "container.kernels": frozenset(),
    "model_package": frozenset(),
    "container.model": frozenset({"container.engine", "container.kernels"}),
    "container.ranks": frozenset({"container.engine", "container.model"}),
    "container.tuning": frozenset({"container.engine", "container.model"}),
    "sagemaker_entry": frozenset(
        {"container.text", "container.engine", "container.ranks", "container.tuning", "model_package"}
    ),
    "infra": frozenset({"model_package"}),
}
# Libraries that only some rooms may know.
KEPT_TO: dict[str, frozenset[str]] = {
    "torch": frozenset({"container.model", "container.kernels", "container.ranks", "container.tuning"}),
    "transformers": frozenset({"container.model", "container.tuning"}),
    "safetensors": frozenset({"container.model", "container.tuning", "model_package"}),
    "llguidance": frozenset({"container.model", "sagemaker_entry", "container.text"}),
    "flask": frozenset({"sagemaker_entry"}),
    "werkzeug": frozenset({"sagemaker_entry"}),
    "gunicorn": frozenset({"sagemaker_entry"}),
    "gevent": frozenset({"sagemaker_entry"}),
    "boto3": frozenset({"infra"}),
    "botocore": frozenset({"infra"}),
    "sagemaker": frozenset({"infra"}),
    "cryptography": frozenset({"model_package"}),
    "pickle": frozenset(),  # no room: a pickle is code
}
OUTSIDE_VIEWS = ("contract", "attacks", "chaos", "evals", "redteam", "bench")
# The bench times the engine without HTTP, too, to tell what HTTP costs: these files and no others reach in.
REACH_IN: dict[str, frozenset[str]] = {
    "bench/gpu_bounds.py": frozenset({"container.model"}),
    "bench/gpu_load.py": frozenset({"container.engine", "container.model"}),
    "bench/gpu_sections.py": frozenset({"container.kernels", "container.model"}),
    "bench/gpu_shapes.py": frozenset({"container.model"}),
    "bench/drivers/ours.py": frozenset({"container.engine", "container.model"}),
    "bench/drivers/ours_steps.py": frozenset({"container.engine"}),
    "bench/test_ours_steps.py": frozenset({"container.engine"}),
}


def imports(path: Path) -> set[str]:
    """Return the absolute module names that `path` imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(module: str) -> str | None:
    return next((r for r in ROOMS if module == r or module.startswith(r + ".")), None)


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room.replace(".", "/")).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_along_its_arrows(room: str) -> None:
    for path in files_of(room):
        reached = {room_of(name) for name in imports(path)} - {None, room}
        assert reached <= MAY_IMPORT[room], f"{path.relative_to(ROOT)} reaches {reached - MAY_IMPORT[room]}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_library_stays_in_the_rooms_that_may_know_it(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            top = name.partition(".")[0]
            assert room in KEPT_TO.get(top, {room}), f"{path.relative_to(ROOT)} imports {top}"


def test_the_engine_needs_the_standard_library_only() -> None:
    for path in files_of("container.engine"):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top in sys.stdlib_module_names or top == "container", f"{path.name} imports {top}"


@pytest.mark.parametrize("view", OUTSIDE_VIEWS)
def test_the_outside_views_speak_http_only(view: str) -> None:
    for path in sorted((ROOT / "tests" / view).rglob("*.py")):
        allowed = REACH_IN.get(path.relative_to(ROOT / "tests").as_posix(), frozenset())
        reached = {room_of(name) for name in imports(path)} - {None} - allowed
        assert not reached, f"{path.relative_to(ROOT)} reaches {reached}"


def test_every_room_has_a_rule_and_every_package_is_a_room() -> None:
    assert set(MAY_IMPORT) == set(ROOMS)
    packages = {p.parent.relative_to(ROOT) for p in ROOT.glob("container/*/__init__.py")}
    assert {str(p).replace("/", ".") for p in packages} == {r for r in ROOMS if r.startswith("container.")}


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    from container import model\n    import torch.nn\n", encoding="utf-8")
    assert {"container.model", "torch.nn"} <= imports(sample)


@pytest.mark.parametrize("entry", sorted(p.name for p in ROOT.iterdir() if not p.name.startswith(".")))
def test_the_top_level_stays_as_the_design_fixed_it(entry: str) -> None:
    fixed = {"README.md", "LICENSE", "pyproject.toml", "container", "sagemaker_entry", "model_package"}
    assert entry in fixed | {"infra", "tests", "scripts"}
