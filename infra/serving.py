"""Starting the product in the foreground.

Owns: the environment it starts with. Must not know: its settings beyond the names used here, its code.
Invariant: the server replaces this process, so signals and exit codes are its own; no AWS_* variable of the
host reaches it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.report import CommandError, ExitCode

HOST = "127.0.0.1"  # a person's machine; inside the image the product chooses for itself


def environment(
    base: Mapping[str, str],
    model: Path | None,
    port: int | None,
    assignments: list[str],
    listen: str | None = None,
) -> dict[str, str]:
    """Return the server's environment: `base` without AWS_*, then the options, then NAME=VALUE assignments.

    Raises CommandError for a missing model directory, a malformed assignment, or two places to listen.
    """
    chosen = {name: value for name, value in base.items() if not name.startswith("AWS_")}
    if listen is not None:
        if port is not None:
            raise CommandError(ExitCode.USAGE, "bad_argument", "give one of `--port` and `--listen`")
        chosen["STRONGROOM_LISTEN"] = listen
        for name in ("STRONGROOM_HOST", "STRONGROOM_PORT", "SAGEMAKER_BIND_TO_PORT"):
            chosen.pop(name, None)
    if model is not None:
        if not model.is_dir():
            raise CommandError(
                ExitCode.USAGE, "model_missing", f"there is no directory {model}", "pass --model DIRECTORY"
            )
        chosen["STRONGROOM_MODEL"] = str(model.resolve())
        chosen.pop("HF_MODEL_ID", None)
    if port is not None:
        chosen["STRONGROOM_PORT"] = str(port)
        chosen.pop("SAGEMAKER_BIND_TO_PORT", None)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise CommandError(ExitCode.USAGE, "env_malformed", "`--env` takes NAME=VALUE")
        chosen[name] = value
    if not chosen.get("STRONGROOM_LISTEN"):
        chosen.setdefault("STRONGROOM_HOST", HOST)
    return chosen


def become(chosen: dict[str, str], *, quiet_stdout: bool) -> None:
    """Replace this process with the server; with `quiet_stdout` its output goes to stderr."""
    sys.stdout.flush()
    if quiet_stdout:
        os.dup2(2, 1)
    command = [sys.executable, "-m", "sagemaker_entry", "serve"]
    os.execve(sys.executable, command, chosen)  # noqa: S606  no shell, and the interpreter that runs us
