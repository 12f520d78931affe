"""What a result must say about where it came from: machine, versions, command, date.

Owns: reading them. Must not know: what was measured.
Invariant: nothing here names a path of the machine, a user or a host.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Instruction sets that decide which kernels an engine can use.
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("strongroom", "torch", "transformers", "tokenizers", "numpy", "msgspec")
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@-]+){2,}")


def plain(text: str) -> str:
    """Return `text` with every absolute path cut down to its last part."""
    return _PATH.sub(lambda found: found.group().rpartition("/")[2], text)


def machine(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Return CPU model, the flags that matter, cores this process may use, memory, kernel."""
    fields: dict[str, str] = {}
    for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    memory_kib = int((proc / "meminfo").read_text(encoding="ascii").split()[1])
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
    }


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, and the commit measured."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit() -> str:
    """Return the commit of this checkout, with `+` when files differ from it; "unknown" without history."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def provenance(verb: str) -> dict[str, Any]:
    """Return what heads every result."""
    words = ["scripts/bench", *map(plain, sys.argv[1:])]
    return {
        "verb": verb,
        "command": " ".join(words),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
    }
