"""PID 1: the listening socket, the order of starting and stopping, the watch over the children.

Owns: the listener, door, heartbeat page and metrics page; engine and front processes; restarts; signals.
Must not know: HTTP, requests, models. It parses nothing a client sent and imports no server code.
Invariant: the listener outlives every child; every child is reaped, and so is every rank that the engine
leaves behind, before another engine starts; after SIGTERM the process exits 0 within DRAIN_LIMIT_S + 1 s,
whatever the children do.

    STARTING -> engine + front running -> SIGTERM -> front drains -> engine stops -> exit 0
                 | engine dies or hangs: restarted; 3 deaths in 60 s: exit 70
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from container.ranks.config import EngineConfig
from container.ranks.config import encode as encode_engine
from container.ranks.door import make_door
from container.ranks.heartbeat import (
    EngineState,
    HealthLimits,
    HeartbeatReader,
    HeartbeatWriter,
    StartFault,
    Verdict,
    health,
    make_page,
    read_only,
)
from container.ranks.lockdown import LockdownFailed, hold
from container.ranks.lockdown_bpf import Scope
from container.ranks.process import interpreter
from sagemaker_entry import children, log, metrics
from sagemaker_entry.health import HOLDS, HOLDS_IN_PART
from sagemaker_entry.listening import listen
from sagemaker_entry.release import package_version
from sagemaker_entry.sealed import holding
from sagemaker_entry.sealed.plan import plan, rank_command
from sagemaker_entry.settings import Settings, encode

EXIT_BROKEN: Final = 70  # EX_SOFTWARE: the platform replaces the instance
EXIT_PACKAGE: Final = 65  # EX_DATAERR: the sealed package is refused
EXIT_KEY: Final = 77  # EX_NOPERM: there is no key for it, or no licence
SERVICE_ID: Final = 10001
TURN_S: Final = 0.1
DEATHS: Final = 3
DEATH_WINDOW_S: Final = 60.0
ABORT_GRACE_S: Final = 0.5  # between SIGABRT and SIGKILL for a hung engine
LINGER_S: Final = 5.0  # from an engine's last words to its end
DRAIN_LIMIT_S: Final = 27.0  # the platform kills 30 s after SIGTERM
STOP_S: Final = 0.5
FRONT_OOM_SCORE: Final = 200
SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
# Faults another start cannot cure: stop at once with the cause on the last line.
HOPELESS: Final = {
    StartFault.BAD_CONFIG: EXIT_BROKEN,
    StartFault.MODEL_NOT_FOUND: EXIT_BROKEN,
    StartFault.MODEL_REFUSED: EXIT_BROKEN,
    StartFault.LOCKDOWN: EXIT_BROKEN,
    StartFault.PACKAGE_REFUSED: EXIT_PACKAGE,
    StartFault.KEY_REFUSED: EXIT_KEY,
}


def engine_config(settings: Settings) -> EngineConfig:
    """Return what the engine process is told."""
    return EngineConfig(
        model_dir=settings.model,
        sequence_tokens=settings.max_sequence_tokens,
        running_limit=settings.max_running,
        step_tokens=settings.step_tokens,
        waiting_limit=settings.max_waiting,
        waiting_s=settings.max_wait_s,
        kv_mib=settings.kv_mib,
        prefix_cache=settings.prefix_cache != "off",
        compat=settings.compat != "off",
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        quantize=settings.quantize,
        speculate=settings.speculate,
        surgery=settings.surgery,
        tensor_parallel=settings.tensor_parallel,
        threads=settings.threads,
        lockdown=settings.lockdown == "on",
    )


def engine_command(config_fd: int, door_fd: int, heartbeat_fd: int) -> list[str]:
    """Return the command line of the engine process."""
    return [*interpreter(), "-m", "container.ranks", *engine_arguments(config_fd, door_fd, heartbeat_fd)]


def engine_arguments(config_fd: int, door_fd: int, heartbeat_fd: int) -> list[str]:
    """Return what every engine process is told of what it inherits."""
    return _told({"--config-fd": config_fd, "--door-fd": door_fd, "--heartbeat-fd": heartbeat_fd})


def front_command(
    listen_fd: int, settings_fd: int, door_fd: int, heartbeat_fd: int, metrics_fd: int
) -> list[str]:
    """Return the command line of the front."""
    fds = {
        "--listen-fd": listen_fd,
        "--settings-fd": settings_fd,
        "--door-fd": door_fd,
        "--heartbeat-fd": heartbeat_fd,
        "--metrics-fd": metrics_fd,
    }
    return [*interpreter(), "-m", "sagemaker_entry.front", *_told(fds)]


def _told(fds: Mapping[str, int]) -> list[str]:
    return [str(part) for pair in fds.items() for part in pair]


@dataclass(frozen=True, slots=True)
class Commands:
    """How the children are started; tests put their own in."""

    engine: Callable[[int, int, int], list[str]] = engine_command
    front: Callable[[int, int, int, int, int], list[str]] = front_command
    health_limits: HealthLimits = field(default_factory=HealthLimits)
    deaths: int = DEATHS  # of one child within DEATH_WINDOW_S before the supervisor gives up


class Child:
    """One role's process and its recent deaths."""

    def __init__(
        self, name: str, argv: Sequence[str], fds: Sequence[int], deaths: int, oom_score: int = 0
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self.starts = 0
        self._argv = argv
        self._fds = fds
        self._oom_score = oom_score
        self._remains: int | None = None  # process group of a dead one that may hold others
        self._deaths: deque[float] = deque(maxlen=deaths)

    def start(self, env: Mapping[str, str]) -> None:
        self.pid = children.spawn(self._argv, env, self._fds, self._oom_score)
        self.starts += 1

    def kill(self, number: int) -> None:
        """Send a signal; a child that is gone already is reaped elsewhere."""
        if self.pid is not None:
            os.kill(self.pid, number)  # an unreaped pid cannot be anybody else's

    def died(self, now_s: float) -> bool:
        """Note a death; True when it is one too many."""
        self.gone()
        self._deaths.append(now_s)
        return len(self._deaths) == self._deaths.maxlen and now_s - self._deaths[0] <= DEATH_WINDOW_S

    def gone(self) -> None:
        """It has been reaped; whoever it started shares its process group, and ends now."""
        self._remains, self.pid = self.pid, None
        if self._remains is not None:
            with contextlib.suppress(ProcessLookupError):  # it left nobody
                os.killpg(self._remains, signal.SIGKILL)

    def cleared(self) -> bool:
        """Return whether nothing of a former one is left, memory included; reaps what is."""
        while self._remains is not None:
            try:
                pid, _ = os.waitpid(-self._remains, os.WNOHANG)
            except ChildProcessError:
                self._remains = None
                return True
            if pid == 0:
                return False  # it is dying; a device may take its time
        return True


class Supervisor:
    """Runs the container until it is told to stop or cannot go on."""

    def __init__(self, settings: Settings, commands: Commands, env: MutableMapping[str, str]) -> None:
        """Raises ListenRefused; SettingsError and KeyRefused where no sealed model can be opened."""
        told = plan(settings, int(time.time()), package_version())
        held = None if told is None else holding.hold(told, env)
        self._sealed = held is not None
        self._exit_code = EXIT_BROKEN
        self._limits = commands.health_limits
        self._env = children.environment(env)
        self._drain_s = settings.drain_s
        self._listener = listen(settings)
        front_door, engine_door = make_door()
        page = make_page()
        self._page_writer = HeartbeatWriter(page)
        self._page_reader = HeartbeatReader(page)
        metrics_fd = metrics.create()
        self._metrics = metrics.Metrics(metrics_fd)
        config = engine_config(settings)
        # Ranks that connect to each other must be able to once more, after a restart.
        self._scope = Scope.KEEPS_SOCKETS if config.connects else Scope.FULL
        self._lockdown = config.lockdown
        self._config_fd = _memory("config", encode_engine(config))
        self._settings_fd = _memory("settings", encode(settings))
        readable = read_only(page)
        engine_fds = (self._config_fd, engine_door, page)
        front_fds = (self._listener.fileno(), self._settings_fd, front_door, readable, metrics_fd)
        engine, front = commands.engine(*engine_fds), commands.front(*front_fds)
        more = held or holding.NOTHING
        if held is not None:
            engine = rank_command("engine", held.engine) + engine_arguments(*engine_fds)
            front += _told(held.front)
        deaths = commands.deaths
        self._engine = Child("engine", engine, (*engine_fds, *more.engine.values()), deaths)
        self._front = Child("front", front, (*front_fds, *more.front.values()), deaths, FRONT_OOM_SCORE)
        self._deaths = commands.deaths
        self._abort_at_s: float | None = None

    def run(self) -> int:
        """Serve until a signal or a breakdown; return the exit code."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        children.adopt_orphans()
        if self._listener.path is None:
            log.write("info", "listening", port=self._listener.port)
        else:
            log.write("info", "listening", path=str(self._listener.path))
        try:
            return self._serve()
        finally:
            self._listener.close()

    def _serve(self) -> int:
        if not self._lock():
            return EXIT_BROKEN
        if not self._sealed:
            log.write("warning", "plaintext_allowed")
        self._start(self._front)
        self._start(self._engine)
        while True:
            received = signal.sigtimedwait(SIGNALS, TURN_S)
            if received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT):
                return self._drain()
            for child, status in self._reap():
                if not self._recover(child, status):
                    self._kill_all()
                    return self._exit_code
            for child in (self._front, self._engine):
                # A new engine beside what is left of the old one would hold the model's memory twice.
                if child.pid is None and child.cleared():
                    self._start(child)
            self._watch()

    def _lock(self) -> bool:
        """Lock this process and with it every one it will start; False where that does not hold."""
        if not self._lockdown:
            log.write("warning", "lockdown_off")
            return True
        try:
            hold(self._scope, keep=(self._listener.fileno(),))
        except LockdownFailed as error:
            log.write(
                "error", "lockdown_failed", cause=str(error), hint="`STRONGROOM_LOCKDOWN=off` goes without"
            )
            return False
        self._metrics.put("locked", HOLDS if self._scope is Scope.FULL else HOLDS_IN_PART)
        log.write("info", "locked", scope=self._scope.value)
        return True

    def _start(self, child: Child) -> None:
        for fd in (self._config_fd, self._settings_fd):
            os.lseek(fd, 0, os.SEEK_SET)  # the offset is shared with the last reader
        child.start(self._env)
        log.write("info", "child_started", child=child.name, child_pid=child.pid)

    def _reap(self) -> list[tuple[Child, int]]:
        """Reap every dead process, adopted orphans too; return our children among them."""
        ours: list[tuple[Child, int]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ours
            if pid == 0:
                return ours
            for child in (self._engine, self._front):
                if child.pid == pid:
                    ours.append((child, status))

    def _recover(self, child: Child, status: int) -> bool:
        """Restart a dead child; False when that is of no use."""
        code = os.waitstatus_to_exitcode(status)
        page = self._page_reader.read()
        fault = StartFault(page.fault) if page.fault in StartFault._value2member_map_ else StartFault.INTERNAL
        cause = fault.name.lower() if child is self._engine else None
        log.write("error", "child_died", child=child.name, code=code, cause=cause)
        too_often = child.died(time.monotonic())
        if child is self._engine:
            self._abort_at_s = None
            self._page_writer.write(
                state=EngineState.STARTING, pid=0
            )  # /ping turns red now, not at a timeout
            self._metrics.add("strongroom_engine_restarts_total")
            if fault in HOPELESS:
                log.write("error", "engine_cannot_start", cause=cause)
                self._exit_code = HOPELESS[fault]
                return False
        else:
            self._metrics.add("strongroom_front_restarts_total")
            if code == children.EXIT_UNUSABLE:
                log.write("error", "front_cannot_start", code=code)
                return False
        if too_often:
            log.write("error", "giving_up", child=child.name, deaths=self._deaths, within_s=DEATH_WINDOW_S)
            return False
        return True

    def _watch(self) -> None:
        """End an engine that has gone silent or moves nothing; its death is then handled like any other."""
        now_s = time.monotonic()
        if self._abort_at_s is not None:
            if now_s >= self._abort_at_s:
                self._engine.kill(signal.SIGKILL)  # a hung device call ignores everything else
            return
        page = self._page_reader.read()
        verdict = health(page, time.monotonic_ns(), self._limits)
        lingers = verdict is Verdict.FAILED and time.monotonic_ns() - page.beat_ns > LINGER_S * 1e9
        if (verdict in (Verdict.SILENT, Verdict.STUCK) or lingers) and self._engine.pid is not None:
            log.write("error", "engine_hangs", verdict=verdict.value)
            self._engine.kill(signal.SIGABRT)
            self._abort_at_s = now_s + ABORT_GRACE_S

    def _drain(self) -> int:
        log.write("info", "draining")
        self._metrics.drain()
        self._front.kill(signal.SIGTERM)
        self._wait_for(self._front, min(self._drain_s + 2.0, DRAIN_LIMIT_S))
        self._front.kill(signal.SIGKILL)
        self._engine.kill(signal.SIGTERM)
        self._wait_for(self._engine, STOP_S)
        self._kill_all()
        log.write("info", "stopped")
        return 0

    def _wait_for(self, awaited: Child, limit_s: float) -> None:
        """Reap until `awaited` is gone or the time is over; further signals change nothing."""
        deadline_s = time.monotonic() + limit_s
        while awaited.pid is not None and time.monotonic() < deadline_s:
            signal.sigtimedwait(SIGNALS, TURN_S / 4)
            for child, _ in self._reap():
                child.gone()

    def _kill_all(self) -> None:
        for child in (self._front, self._engine):
            child.kill(signal.SIGKILL)
        for child in (self._front, self._engine):
            self._wait_for(child, STOP_S)


def _memory(name: str, text: str) -> int:
    """Return a descriptor of an anonymous file that holds `text`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    return fd


def drop_privileges() -> None:
    """In a container started as root, go on as the service's own user; elsewhere the user was chosen.

    Raises PermissionError for a root that may not change its user: it has no capabilities at all.
    """
    if os.getpid() == 1 and os.getuid() == 0:
        os.setgroups([])
        os.setgid(SERVICE_ID)
        os.setuid(SERVICE_ID)
