"""The vendor's work on a model before it is packed: measured and divided by child processes.

Owns: the child processes and what they answer. Must not know: models, metrics, how anything is written.
Invariant: the child gets no AWS_* variable; its progress reaches the terminal's stderr, its answer only us.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from infra.report import CommandError, ExitCode, Result

CONVERTED: Final = "model"  # folder of a converted checkpoint within its stage
PARTS: Final = "parts"
WEIGHTS_DIGEST: Final = "weights.sha256"  # beside the parts
REPORT: Final = "quality.json"
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
    return _run("quality", "container.model.quality", given)


def shard(model: Path, tensor_parallel: int, quantize: str) -> Result:
    """Return the folder of the parts and their sizes; raises CommandError."""
    given = {"--model": model, "--tensor-parallel": tensor_parallel, "--quantize": quantize}
    return _run("shard", "container.model.parts", given)


def convert(gguf: Path, at: Path, lock: int) -> None:
    """Make the checkpoint of a GGUF file in `at`; raises CommandError. `lock` goes to the child."""
    _run("convert", "container.model.convert", {"--gguf": gguf, "--out": at / CONVERTED}, lock)


def divide(model: Path, at: Path, tensor_parallel: int, quantize: str, lock: int) -> None:
    """Make parts in `at`, as `shard` makes them beside the model; raises CommandError."""
    given = {"--model": model, "--out": at, "--tensor-parallel": tensor_parallel, "--quantize": quantize}
    _run("shard", "container.model.parts", given, lock)


def belong(model: Path, folders: Sequence[Path], lock: int) -> str:
    """Return the digest of the weights of which all parts in `folders` were made; raises CommandError."""
    given = ["--model", *("--parts" for _ in folders)]
    values = zip(given, (model, *folders), strict=True)
    return str(_run("belonging", "container.model.belonging", values, lock)["weights_sha256"])


def measure(model: Path, at: Path, variants: Sequence[str], tokens: int, lock: int) -> None:
    """Write the quality report into `at`; raises CommandError."""
    given = {"--model": model, "--out": at, "--variants": ",".join(variants), "--tokens": tokens}
    _run("quality", "container.model.quality", given, lock)


def read_report(folder: Path) -> Result:
    """Return the quality report in `folder`."""
    report: Result = json.loads((folder / REPORT).read_bytes())
    return report


def _run(
    verb: str,
    module: str,
    given: Mapping[str, object] | Iterable[tuple[str, object]],
    lock: int | None = None,
) -> Result:
    """Return the last line of the child's output; raises CommandError.

    A child that outlives us keeps the descriptor `lock`, and with it the lock.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    options = [f"{name}={value}" for name, value in pairs if value is not None]
    command = [sys.executable, "-m", module, *options]
    base = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(  # noqa: S603  the interpreter that runs us, and no shell
        command,
        env=base,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        pass_fds=() if lock is None else (lock,),
    )
    if done.returncode == EXIT_USAGE:
        raise CommandError(ExitCode.USAGE, f"{verb}_refused", "nothing was made, for the reason above")
    if done.returncode:
        failed = f"the work ended with status {done.returncode}"
        raise CommandError(ExitCode.CHECK_FAILED, f"{verb}_failed", failed)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def show_parts(result: Result) -> None:
    """Print where the parts lie and how large each is."""
    sizes = ", ".join(f"{size / MIB:.1f}" for size in result["part_bytes"])
    print(f"{result['folder']}: {len(result['part_bytes'])} parts of {sizes} MiB, {result['quantization']}")


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
