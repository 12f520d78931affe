"""The docker command: one place that runs it.

Owns: which program is run, how a failure reads.
Must not know: images or containers of ours.
Invariant: a command that fails raises; nothing is retried, nothing is pulled.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

PROGRAM: Final = "/usr/bin/docker"
WAIT_S: Final = 900.0


class DockerFailed(Exception):
    """A docker command failed, or there is no daemon; `hint` is the operator's next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def docker(*arguments: str, stdin: Path | None = None, wait_s: float = WAIT_S) -> str:
    """Run one docker command and return what it printed; raises DockerFailed."""
    done = run(*arguments, stdin=stdin, wait_s=wait_s)
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-8:]
        raise DockerFailed(f"`docker {arguments[0]}` failed: {' | '.join(last)}", "read the lines above")
    return done.stdout


def run(
    *arguments: str, stdin: Path | None = None, wait_s: float = WAIT_S
) -> subprocess.CompletedProcess[str]:
    """Run one docker command and return it, failed or not; raises DockerFailed where it cannot run at all."""
    command = [os.environ.get("DOCKER", PROGRAM), *arguments]
    try:
        with Path(os.devnull if stdin is None else stdin).open("rb") as source:
            return subprocess.run(  # noqa: S603  a fixed program, arguments of ours
                command, stdin=source, capture_output=True, text=True, timeout=wait_s, check=False
            )
    except FileNotFoundError:
        raise DockerFailed(
            f"`{command[0]}` is not there", "install docker, or set DOCKER to its path"
        ) from None
    except subprocess.TimeoutExpired:
        raise DockerFailed(
            f"`docker {arguments[0]}` took over {wait_s:.0f} s", "is the daemon well?"
        ) from None


def available() -> bool:
    """Return whether a daemon answers."""
    try:
        return run("info", "--format", "{{.ServerVersion}}", wait_s=30).returncode == 0
    except DockerFailed:
        return False


def inspect(name: str, kind: str = "image") -> dict[str, Any]:
    """Return what docker knows of an image or container; raises DockerFailed."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", "--type", kind, name))
    return found[0]


def options(pairs: Sequence[tuple[str, str]], flag: str) -> list[str]:
    """Return `flag name=value` for every pair."""
    return [part for name, value in pairs for part in (flag, f"{name}={value}")]
