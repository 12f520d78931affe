"""How a verb ends: one JSON object or lines for people, and an exit code.

Owns: the output form and the exit codes. Must not know: what verbs do.
Invariant: with `--json`, stdout gets exactly one JSON object; hints and progress go to stderr.
"""

from __future__ import annotations

import enum
import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Result = dict[str, Any]


class ExitCode(enum.IntEnum):
    """What a caller of the command line can tell apart."""

    DONE = 0
    CHECK_FAILED = 1
    USAGE = 2
    ENVIRONMENT_MISSING = 3
    AWS_REFUSED = 4
    VERIFICATION_FAILED = 5
    INTERRUPTED = 130


class CommandError(Exception):
    """A verb's failure: its exit code, a word for programs, a message and the next move for people."""

    def __init__(self, code: ExitCode, kind: str, message: str, hint: str = "") -> None:
        super().__init__(kind)
        self.code = code
        self.kind = kind
        self.message = message
        self.hint = hint


def version() -> str:
    """Return the product's version, from the installation or from the checkout."""
    try:
        return importlib.metadata.version("strongroom")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def run(command: str, as_json: bool, verb: Callable[[], Result], show: Callable[[Result], None]) -> None:
    """Run `verb` and print its result, with `show` for people; a CommandError ends the process.

    A result whose `ok` is False (a failed check) is printed like any other and exits with CHECK_FAILED.
    """
    try:
        result = verb()
    except CommandError as error:
        fail(command, as_json, error)
    ok = bool(result.get("ok", True))
    if as_json:
        print_json(command, ok=ok, result=result)
    else:
        show(result)
    if not ok:
        raise SystemExit(ExitCode.CHECK_FAILED)


def fail(command: str, as_json: bool, error: CommandError) -> NoReturn:
    """Print `error` and exit with its code."""
    if as_json:
        shown = {"kind": error.kind, "message": error.message, "hint": error.hint}
        print_json(command, ok=False, error=shown)
    else:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
    raise SystemExit(error.code)


def print_json(command: str, *, ok: bool, **fields: Any) -> None:
    """Print the one JSON object of a verb, at once."""
    print(json.dumps({"ok": ok, "command": command, "version": version(), **fields}), flush=True)
