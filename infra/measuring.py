"""Running the quality measurement.

Owns: the child process and what it answers. Must not know: models, metrics, how the report is written.
Invariant: the child gets no AWS_* variable; its progress reaches the terminal's stderr, its answer only us.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from infra.report import CommandError, ExitCode, Result

EXIT_USAGE: Final = 2  # the child's exit status for what the caller can mend; it has said what
MIB: Final = 1024 * 1024


def quality(
    model: Path, out: Path, variants: str | None, text: Path | None, tokens: int, threads: int | None
) -> Result:
    """Return the report's files and rows; raises CommandError."""
    given = {
        "--model": model,
        "--out": out,
        "--variants": variants,
        "--text": text,
        "--tokens": tokens,
        "--threads": threads,
    }
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, "-m", "container.model.quality", *options]
    base = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(  # noqa: S603  the interpreter that runs us, and no shell
        command, env=base, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == EXIT_USAGE:
        raise CommandError(ExitCode.USAGE, "quality_refused", "nothing was measured, for the reason above")
    if done.returncode:
        raise CommandError(
            ExitCode.CHECK_FAILED, "quality_failed", f"measuring ended with status {done.returncode}"
        )
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def show(result: Result) -> None:
    """Print a row per variant and where the report lies."""
    print(f"{'variant':12} {'MiB':>7} {'KL mean':>9} {'KL p99':>8} {'top-1':>6} {'decode':>7}")
    for row in result["rows"]:
        quality = row["quality"]
        if quality is None:
            print(f"{row['variant']:12} not measured: {row['refused']}")
            continue
        print(
            f"{row['variant']:12} {row['weight_bytes'] / MIB:7.0f} {quality['kl_mean']:9.5f} "
            f"{quality['kl_p99']:8.4f} {quality['top1_agreement']:6.3f} {row['decode_speedup']['1']:6.2f}x"
        )
    for path in result["files"]:
        print(path)
