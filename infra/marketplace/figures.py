"""What was measured, read from results files; nothing is ever filled in by hand.

Owns: which figures a listing shows, and when a file is no measurement. Must not know: how it was measured.
Invariant: a figure keeps the machine, the command, the date and the digest of the file that it came from; a
disturbed run, a failed run and a workload without an explanation are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from infra.report import CommandError, ExitCode

RESULT_BYTES: Final = 8 * 1024 * 1024
UNKNOWN: Final = ""  # the file does not say that it was measured on an instance type
SHOWN: Final = ("output_tok_s", "first_token_p50_s", "first_token_p95_s", "latency_p50_s", "latency_p95_s")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures came from."""

    sha256: str
    command: str
    date: str
    machine: str
    instance_type: str = UNKNOWN


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine's figures for one workload; times in seconds, rates in tokens a second."""

    origin: Origin
    engine: str
    workload: str
    rounds: int
    figures: dict[str, float]


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one quantization costs: divergence from the unquantized model on a named text."""

    origin: Origin
    variant: str
    text: str
    positions: int
    perplexity: float
    kl_mean: float
    top1_agreement: float
    reference_perplexity: float


def read_speed(texts: list[str], workloads: Mapping[str, str]) -> tuple[Speed, ...]:
    """Return the figures in `[INSTANCE_TYPE=]FILE` texts; raises CommandError where a file holds none."""
    found: list[Speed] = []
    for text in texts:
        kind, _, name = text.rpartition("=")
        path = Path(name)
        loaded, digest = _loaded(path)
        if loaded.get("failures"):
            raise _refused(path, "some of its runs failed", "measure again")
        origin = _origin(loaded, digest, kind, path)
        found += [
            _speed(origin, engine, workload, summary, path)
            for engine, by_workload in sorted(_table(loaded, "summary", path).items())
            for workload, summary in sorted(by_workload.items())
            if workload in workloads
        ]
    missing = sorted(set(workloads) - {one.workload for one in found})
    if missing or not found:
        hint = "give a results file that holds it with --speed, or take it out of `workloads`"
        message = f"no figures were given for {', '.join(f'`{name}`' for name in missing) or 'anything'}"
        raise CommandError(ExitCode.USAGE, "not_measured", message, hint)
    return tuple(found)


def _speed(origin: Origin, engine: str, workload: str, summary: dict[str, Any], path: Path) -> Speed:
    if summary.get("noisy", 1):
        raise _refused(path, f"`{engine}` {workload} was disturbed by other work", "measure again")
    try:
        figures: dict[str, float] = {name: float(summary[name]) for name in SHOWN if name in summary}
        rounds = int(summary["rounds"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, f"`{engine}` {workload} has no figures") from error
    if "output_tok_s" not in figures or len(figures) == 1:
        raise _refused(path, f"`{engine}` {workload} lacks a rate or a latency")
    return Speed(origin, engine, workload, rounds, figures)


def read_quality(path: Path, variant: str) -> Quality:
    """Return what `variant` costs, from the JSON of `strongroom package quality`; raises CommandError."""
    loaded, digest = _loaded(path)
    rows = {row.get("variant"): row for row in loaded.get("rows", []) if isinstance(row, dict)}
    row, reference = rows.get(variant), rows.get("none")
    if row is None or reference is None or not row.get("quality"):
        raise _refused(path, f"it does not measure `{variant}`", f"one of {', '.join(map(str, rows))}")
    try:
        machine = loaded["machine"]
        about = f"{machine['cpu']} {machine['instructions']}, {machine['threads']} threads"
        origin = Origin(digest, str(loaded["command"]), str(loaded["date"]), about)
        held = row["quality"]
        return Quality(
            origin,
            variant,
            str(loaded["text"]),
            int(held["positions"]),
            float(held["perplexity"]),
            float(held["kl_mean"]),
            float(held["top1_agreement"]),
            float(reference["quality"]["perplexity"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, "a field is missing") from error


def _loaded(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = path.read_bytes()
        loaded = json.loads(data)
    except (OSError, ValueError) as error:
        raise _refused(path, "it cannot be read as JSON") from error
    if len(data) > RESULT_BYTES or not isinstance(loaded, dict):
        raise _refused(path, "it is no results file")
    return loaded, hashlib.sha256(data).hexdigest()


def _origin(loaded: dict[str, Any], digest: str, instance_type: str, path: Path) -> Origin:
    machine = _table(loaded, "machine", path)
    command, date = str(loaded.get("command", "")), str(loaded.get("date", ""))
    if not command or re.match(r"20\d\d-\d\d-\d\d", date) is None or not machine.get("cpu"):
        raise _refused(path, "it names no command, date or machine", "take what `scripts/bench` wrote")
    accelerator = f", {machine['gpu']}" if machine.get("gpu") else ""
    about = f"{machine['cpu']}, {machine.get('cores', '?')} cores{accelerator}"
    return Origin(digest, command, date, about, instance_type)


def _table(loaded: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    held = loaded.get(name)
    if not isinstance(held, dict):
        raise _refused(path, f"it has no `{name}`")
    return held


def _refused(path: Path, why: str, hint: str = "give what `scripts/bench serve` wrote") -> CommandError:
    return CommandError(ExitCode.USAGE, "not_measured", f"`{path.name}` is no measurement: {why}", hint)
