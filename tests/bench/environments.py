"""A folder and a Python environment per peer, made by commands whose output goes to a log.

Owns: `.cache/bench/<peer>` (STRONGROOM_BENCH_CACHE moves the root), its environment, what was done already.
Must not know: which peers there are. Standard library only.
Invariant: a step that failed leaves no mark, so that the next run does it again; all goes here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSTALL_S = 3600.0
TORCH = "2.13.0"  # the project's own version, so that peers which sit on torch differ in what they do with it


class SetupFailed(Exception):
    """A peer cannot be had on this machine; the text says which command failed."""


@dataclass(frozen=True)
class Ready:
    """What starts a peer's driver, and what it is told to load."""

    python: Path
    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: str = ""  # precision, build flags, where the weights came from


class Place:
    """The folder of one peer."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        chosen = root or Path(os.environ.get("STRONGROOM_BENCH_CACHE") or ROOT / ".cache" / "bench")
        self.folder = chosen.absolute() / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "setup.log"

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def run(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
        """Run a command in the folder; raises SetupFailed when it fails or takes over INSTALL_S."""
        words = [str(word) for word in command]
        with self.log.open("a", encoding="utf-8") as log:
            print("$", *words, file=log, flush=True)
            try:
                subprocess.run(
                    words,
                    cwd=self.folder,
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=True,
                    timeout=INSTALL_S,
                )
            except (subprocess.SubprocessError, OSError) as error:
                why = type(error).__name__
                raise SetupFailed(f"`{' '.join(words[:4])}` failed ({why}); see `{self.log}`") from None

    def environment(self, *installs: Sequence[str]) -> Path:
        """Return the Python of an environment after each of `installs` (arguments of pip), in order."""
        recipe = hashlib.sha256(repr((sys.version_info[:2], installs)).encode()).hexdigest()

        def make() -> None:
            if not self.python.exists():
                venv.create(self.folder / "venv", with_pip=True)
            for words in installs:
                self.pip("install", *words)

        self.once(f"environment-{recipe[:12]}", make)
        return self.python

    def pip(self, *words: str) -> None:
        self.run(self.python, "-m", "pip", words[0], "-q", "--disable-pip-version-check", *words[1:])

    def torch_environment(self, *packages: str) -> Path:
        """As `environment`, with torch first: the CPU build where an index has it, else the ordinary one."""

        def make() -> None:
            self.environment()
            try:
                self.pip("install", f"torch=={TORCH}+cpu")
            except SetupFailed:
                self.pip("install", f"torch=={TORCH}")

        self.once("torch", make)
        return self.environment(packages)

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` unless a run before this one finished it."""
        mark = self.folder / f".done-{name}"
        if not mark.exists():
            work()
            mark.touch()

    def version(self, package: str) -> str:
        """Return the installed version of `package` in the environment; raises SetupFailed."""
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        got = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=False)
        if got.returncode:
            raise SetupFailed(f"`{package}` is not in the environment of `{self.folder.name}`")
        return got.stdout.strip()


def compute_threads() -> int:
    """Return the cores this process may use: what every engine is given."""
    return len(os.sched_getaffinity(0))


def key_of(model: Path) -> str:
    """Return a short name for a checkpoint directory: its own, and a digest of where it lies."""
    return f"{model.name[:40]}-{hashlib.sha256(str(model.absolute()).encode()).hexdigest()[:8]}"
