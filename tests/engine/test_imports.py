"""The room needs nothing but the standard library."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import container.engine

ROOM = Path(container.engine.__file__).parent
ROOT = ROOM.parent.parent
MODULES = sorted(f"container.engine.{module.name}" for module in pkgutil.iter_modules([str(ROOM)]))

PROGRAM = """
import importlib, sys
for name in ("torch", "numpy", "msgspec", "transformers"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
allowed = set(sys.stdlib_module_names) | {"container", "__main__", "__mp_main__"}
foreign = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None} - allowed
loaded_by_site = set(%r)
print(sorted(foreign - loaded_by_site))
"""


def loaded_at_start() -> list[str]:
    """Return the top-level modules that a bare interpreter has before any program runs."""
    program = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()


def test_every_module_imports_where_nothing_but_the_standard_library_can_be():
    assert "container.engine.engine" in MODULES
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM % loaded_at_start(), *MODULES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_module_names_another_room():
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert name.startswith("container.engine.") or top in sys.stdlib_module_names, (
                    path.name,
                    name,
                )


def test_no_module_is_longer_than_the_house_allows():
    for path in ROOM.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
