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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import msgspec

from container.engine.engine import Engine
from container.ranks.assembly import Loader, StartFailed, Tell, assemble, load, unheard
from container.ranks.config import EngineConfig, decode
from container.ranks.faults import diagnose
from container.ranks.followers import COMMAND, Followers
from container.ranks.heartbeat import EngineState, HeartbeatWriter, LoadPhase, StartFault
from container.ranks.host import Host
from container.ranks.lockdown import hold
from container.ranks.messages import Welcome
from container.ranks.process import harden, say
from container.ranks.switchboard import Switchboard

CONFIG_BYTES: Final = 64 * 1024
EXIT_OK: Final = 0
EXIT_START: Final = 2  # it never served
EXIT_FAILED: Final = 1  # it served, then broke


def main(
    argv: Sequence[str] | None = None,
    loader: Loader = load,
    follower: Sequence[str] = COMMAND,
    follower_fds: Sequence[int] = (),
) -> int:
    """Run the engine process and return its exit status.

    `follower` starts another rank, which inherits `follower_fds`.
    """
    parser = argparse.ArgumentParser(prog="container.ranks", allow_abbrev=False)
    for name in ("--config-fd", "--door-fd", "--heartbeat-fd"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args(argv)
    stderr_fd = harden()
    with HeartbeatWriter(options.heartbeat_fd) as page:
        page.begin(os.getpid(), time.monotonic_ns())
        life = Life(page, stderr_fd)
        followers: Followers | None = None
        try:
            config = read_config(options.config_fd)
            lock_at_start(config)
            followers = _gather(config, life, stderr_fd, follower, follower_fds)
            tell = partial(say, stderr_fd)
            engine, welcome = _start(config, page, loader, followers, tell)
            lock_when_connected(config)
            page.write(
                locked=config.tensor_parallel if config.lockdown else 0
            )  # followers lock or never load
            life.serving = True
            _serve(engine, welcome, options.door_fd, page)
            if followers is not None:
                followers.close()
        except Exception as error:  # noqa: BLE001 - told in one line, by type
            fault, cause = diagnose(error)
            # A follower leaves its words before its connections close.
            told = followers.cause() if followers is not None and fault is StartFault.RANK_LOST else None
            return life.fail(*(told or (fault, cause)))
    return EXIT_OK


class Life:
    """How this process ends when it does not end well: the page, one line, a status."""

    def __init__(self, page: HeartbeatWriter, stderr_fd: int) -> None:
        self._page = page
        self._stderr_fd = stderr_fd
        self.serving = False

    def fail(self, fault: StartFault, cause: str) -> int:
        """Leave the cause behind and return the exit status.

        Of two threads that come here the first is heard.
        """
        self._page.write_last(state=EngineState.FAILED, fault=fault, beat_ns=time.monotonic_ns())
        what = "stopped serving" if self.serving else "cannot start"
        say(self._stderr_fd, f"engine {what}: {fault.name.lower()}: {cause}")
        return EXIT_FAILED if self.serving else EXIT_START

    def lose(self, fault: StartFault, cause: str) -> None:
        """End the process now: another rank is lost, and the main thread may be waiting for it."""
        os._exit(self.fail(fault, cause))

    def loading_goes_on(self) -> None:
        """Another rank has moved on."""
        if not self.serving:
            self._page.write(beat_ns=time.monotonic_ns())


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


def lock_at_start(config: EngineConfig) -> None:
    """Lock this rank before it opens a file, unless it has to connect first; raises LockdownFailed."""
    if config.lockdown and not config.connects:
        hold()


def lock_when_connected(config: EngineConfig) -> None:
    """Lock a rank whose group has formed and computed over its connections; raises LockdownFailed."""
    if config.lockdown and config.connects:
        hold(loopback=True)


def _gather(
    config: EngineConfig, life: Life, stderr_fd: int, command: Sequence[str], fds: Sequence[int]
) -> Followers | None:
    """Start the other ranks, if there are any."""
    if config.tensor_parallel == 1:
        return None
    return Followers(config, stderr_fd, life.lose, life.loading_goes_on, command, fds)


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage inside, and never again walk what is there at the end.

    Importing and loading make a million objects that stay; walking them again and again is a sixth of the
    time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process


def _start(
    config: EngineConfig,
    page: HeartbeatWriter,
    loader: Loader,
    followers: Followers | None = None,
    tell: Tell = unheard,
) -> tuple[Engine, Welcome]:
    def report(phase: LoadPhase) -> None:
        page.write(state=EngineState.LOADING, load_phase=phase, beat_ns=time.monotonic_ns())

    page.write(ranks=config.tensor_parallel)
    with without_collection():
        if followers is None:
            return assemble(config, report, loader, tell=tell)
        return assemble(config, report, loader, followers.place, followers.lead, tell)


def _serve(engine: Engine, welcome: Welcome, door_fd: int, page: HeartbeatWriter) -> None:
    host = Host(engine, Switchboard(door_fd, welcome, refusal=engine.refusal), page)
    signal.signal(signal.SIGTERM, lambda *_: host.request_drain())
    signal.signal(signal.SIGQUIT, lambda *_: host.request_stop())
    host.run()
