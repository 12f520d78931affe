"""The engine process, from its first instruction to its exit status.

Owns: the order of hardening, configuration, assembling and serving; signals; the one line said on failure.
Must not know: how a model is loaded (assembly), how requests run (host).
Invariant: exit 0 only after a drain; every other exit leaves FAILED and a cause on the page and exactly one
line on stderr, which names neither content nor tensors.

    python -m container.ranks --config-fd N --door-fd N --heartbeat-fd N
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from container.engine.engine import Engine
from container.ranks.assembly import Loader, StartFailed, assemble, load
from container.ranks.config import EngineConfig, decode
from container.ranks.heartbeat import EngineState, HeartbeatWriter, LoadPhase, StartFault
from container.ranks.host import Host
from container.ranks.messages import Welcome
from container.ranks.process import harden, say, where
from container.ranks.switchboard import Switchboard

CONFIG_BYTES: Final = 64 * 1024
EXIT_OK: Final = 0
EXIT_START: Final = 2  # it never served
EXIT_FAILED: Final = 1  # it served, then broke
# How the two allocators name a lack of memory; they share no exception type.
OUT_OF_MEMORY_SIGNS: Final = ("can't allocate memory", "out of memory")


def main(argv: Sequence[str] | None = None, loader: Loader = load) -> int:
    """Run the engine process and return its exit status."""
    parser = argparse.ArgumentParser(prog="container.ranks", allow_abbrev=False)
    for name in ("--config-fd", "--door-fd", "--heartbeat-fd"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args(argv)
    stderr_fd = harden()
    with HeartbeatWriter(options.heartbeat_fd) as page:
        page.begin(os.getpid(), time.monotonic_ns())
        try:
            engine, welcome = _start(options.config_fd, page, loader)
        except Exception as error:  # noqa: BLE001 - told in one line, by type
            return _fail(page, stderr_fd, "cannot start", error, EXIT_START)
        try:
            _serve(engine, welcome, options.door_fd, page)
        except Exception as error:  # noqa: BLE001 - as above
            return _fail(page, stderr_fd, "stopped serving", error, EXIT_FAILED)
    return EXIT_OK


def read_config(fd: int) -> EngineConfig:
    """Return the configuration that `fd` holds up to its end, and close it; raises StartFailed."""
    with os.fdopen(fd, "rb") as source:
        raw = source.read(CONFIG_BYTES + 1)
    try:
        if len(raw) > CONFIG_BYTES:
            raise StartFailed(StartFault.BAD_CONFIG, f"the configuration exceeds {CONFIG_BYTES} bytes")
        return decode(raw.decode())
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StartFailed(StartFault.BAD_CONFIG, "the configuration does not fit its schema") from None


def _start(config_fd: int, page: HeartbeatWriter, loader: Loader) -> tuple[Engine, Welcome]:
    def report(phase: LoadPhase) -> None:
        page.write(state=EngineState.LOADING, load_phase=phase, beat_ns=time.monotonic_ns())

    gc.disable()  # importing makes a million objects that stay; walking them again and again is a sixth of it
    try:
        started = assemble(read_config(config_fd), report, loader)
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process; no collection need walk them
    return started


def _serve(engine: Engine, welcome: Welcome, door_fd: int, page: HeartbeatWriter) -> None:
    host = Host(engine, Switchboard(door_fd, welcome, refusal=engine.refusal), page)
    signal.signal(signal.SIGTERM, lambda *_: host.request_drain())
    signal.signal(signal.SIGQUIT, lambda *_: host.request_stop())
    host.run()


def _fail(page: HeartbeatWriter, stderr_fd: int, what: str, error: Exception, status: int) -> int:
    fault, cause = _diagnose(error)
    page.write(state=EngineState.FAILED, fault=fault, beat_ns=time.monotonic_ns())
    say(stderr_fd, f"engine {what}: {fault.name.lower()}: {cause}")
    return status


def _diagnose(error: Exception) -> tuple[StartFault, str]:
    """Return the closed cause and words of our own; a foreign exception's text may hold anything."""
    if isinstance(error, StartFailed):
        return error.fault, str(error)
    place = where(error.__traceback__)
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS):
        return StartFault.OUT_OF_MEMORY, f"{type(error).__name__} at {place}"
    return StartFault.INTERNAL, f"{type(error).__name__} at {place}"
