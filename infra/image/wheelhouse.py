"""The wheels an image is made of: fetched once, each verified against the lock before anything is installed.

Owns: the folder of wheels, the reading of hash locks.
Must not know: Docker, what is installed where.
Invariant: a file whose hash no lock names is not in the folder when `fill` returns. Fetching is the only step
of a build that needs a network; with a folder that is full already it needs none.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REQUIREMENT: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(?=[\s;\\]|$)")
HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
# What builds the project's own wheel, and what that needs; pinned by the lock of the checkout's environment.
BUILD_TOOLS: Final = ("hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")


class WheelRefused(Exception):
    """A wheel is missing or is not the one that was locked; `hint` is the operator's next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Locked:
    """One line of a lock."""

    name: str
    version: str
    hashes: frozenset[str]

    @property
    def text(self) -> str:
        """The line as pip reads it."""
        return " ".join(
            [f"{self.name}=={self.version}", *(f"--hash=sha256:{x}" for x in sorted(self.hashes))]
        )


def read_lock(text: str) -> list[Locked]:
    """Return what a hash lock pins; raises WheelRefused for a line that pins nothing."""
    found: list[Locked] = []
    for block in re.split(r"(?<!\\)\n", text):
        line = block.strip()
        if not line or line.startswith("#"):
            continue
        match = REQUIREMENT.match(line.splitlines()[0])
        hashes = frozenset(HASH.findall(line))
        if match is None or not hashes:
            raise WheelRefused(f"`{line.splitlines()[0][:80]}` pins no version and hash", "run scripts/lock")
        found.append(Locked(match[1].lower().replace("_", "-"), match[2], hashes))
    return found


def build_tools(lock: Iterable[Locked]) -> list[Locked]:
    """Return the part of `lock` that builds our wheel; raises WheelRefused when one is not locked."""
    tools = [one for one in lock if one.name in BUILD_TOOLS]
    if len(tools) != len(BUILD_TOOLS):
        missing = set(BUILD_TOOLS) - {one.name for one in tools}
        raise WheelRefused(f"the lock lacks {', '.join(sorted(missing))}", "run scripts/lock")
    return tools


def fill(folder: Path, locked: Iterable[Locked]) -> None:
    """Fetch what is missing into `folder`, drop what no lock names, verify the rest; raises WheelRefused."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(locked)
    if not complete(folder, wanted):
        list_file = folder.with_suffix(".lock")
        list_file.write_text("".join(one.text + "\n" for one in wanted))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
        command += ["--only-binary", ":all:", "--requirement", str(list_file), "--dest", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        list_file.unlink()
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:]
            raise WheelRefused(f"the wheels cannot be fetched: {' '.join(last)}", "is there an index?")
    known = {one for each in wanted for one in each.hashes}
    for path in sorted(folder.iterdir()):
        if digest(path) not in known:
            path.unlink()
    if not complete(folder, wanted):
        raise WheelRefused("a wheel that was fetched is not the locked one", "run scripts/lock")


def complete(folder: Path, locked: Iterable[Locked]) -> bool:
    """Return whether `folder` holds a file for every line of the lock."""
    there = {digest(path) for path in folder.iterdir()}
    return all(one.hashes & there for one in locked)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
