"""`strongroom doctor`: can this machine run the product?

Owns: the checks and their sentences. Must not know: how a model is loaded or served.
Invariant: nothing is changed, started or downloaded; a check that cannot look says so instead of passing.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.report import Result

PYTHON = (3, 11)
CORES = 2  # one for the engine, one for the HTTP front
MEMORY_BYTES = 2 * 1024**3  # interpreter, torch and the smallest useful model
PACKAGES = ("torch", "transformers", "flask", "gunicorn", "gevent")

_PROC = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `hint` is the next move and empty when `ok`."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def examine(ports: list[int], model: Path | None) -> Result:
    """Return all findings; `ok` says that none failed."""
    memory_bytes = available_memory_bytes()
    checks = [check_python(), check_cores(), check_memory(memory_bytes), check_packages()]
    checks += [check_port(port) for port in ports]
    if model is not None:
        checks.append(check_model(model, memory_bytes))
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}


def show(result: Result) -> None:
    """Print one line a finding."""
    for check in result["checks"]:
        print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}: {check['detail']}")
        if check["hint"]:
            print(f"      hint: {check['hint']}")


def check_python() -> Check:
    """Look at the interpreter's version."""
    detail = "{}.{}.{}".format(*sys.version_info[:3])
    ok = sys.version_info[:2] >= PYTHON
    return Check("python", ok, detail, "" if ok else f"use Python {PYTHON[0]}.{PYTHON[1]} or newer")


def check_cores() -> Check:
    """Look at the processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    ok = count >= CORES
    return Check("cores", ok, f"{count} usable", "" if ok else f"give the machine {CORES} cores or more")


def check_memory(available_bytes: int | None) -> Check:
    """Look at the memory left, within the cgroup's limit."""
    if available_bytes is None:
        return Check("memory", False, "cannot be read on this system", "check by hand that 2 GiB are free")
    ok = available_bytes >= MEMORY_BYTES
    hint = "" if ok else f"free memory: at least {_gib(MEMORY_BYTES)} are needed, more for larger models"
    return Check("memory", ok, f"{_gib(available_bytes)} available", hint)


def check_packages() -> Check:
    """Look for what serving needs, without importing it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        hint = "install strongroom[serve]; not needed where the image serves"
        return Check("packages", False, f"missing {', '.join(missing)}", hint)
    return Check("packages", True, "serving packages are installed")


def check_port(port: int) -> Check:
    """Try to listen on a loopback port, as the emulator and a local server would."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Check(f"port {port}", False, "in use or not permitted", "choose another with --port")
    return Check(f"port {port}", True, "free")


def check_model(model: Path, available_bytes: int | None) -> Check:
    """Look whether `model` holds a readable checkpoint that is smaller than the memory left."""
    try:
        files = [path for path in sorted(model.iterdir()) if path.is_file()]
    except OSError:
        return Check("model", False, f"{model} is not a readable directory", "pass --model DIRECTORY")
    weights = [path for path in files if path.suffix in (".safetensors", ".gguf")]
    if not weights:
        return Check("model", False, f"{model} has no *.safetensors or *.gguf", "name the model's own folder")
    config = model / "config.json"
    needed = weights if weights[0].suffix == ".gguf" else [*weights, config]
    for path in needed:
        if not os.access(path, os.R_OK):
            return Check("model", False, f"cannot read {path.name}", "check that it exists and its mode")
    size_bytes = sum(path.stat().st_size for path in weights)
    detail = f"{len(weights)} weight files, {_gib(size_bytes)}"
    if available_bytes is not None and size_bytes > available_bytes:
        return Check("model", False, f"{detail}, more than the memory available", "use a larger machine")
    return Check("model", True, detail)


def available_memory_bytes(meminfo: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Return the bytes this process may still use, None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free_bytes = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = (cgroup / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return free_bytes
    return free_bytes if limit == "max" else max(min(free_bytes, int(limit) - int(used)), 0)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.1f} GiB"
