"""The front process: a gunicorn arbiter over our workers, configured here and from nowhere else.

Owns: gunicorn's settings, the inherited descriptors, each worker's place on the metrics page.
Must not know: routes, generation; the application is built in the worker, after gevent has patched it.
Invariant: no environment variable and no file changes this configuration.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from container.ranks.lockdown import LockdownFailed, hold
from sagemaker_entry import children, log, sessions
from sagemaker_entry.health import HOLDS
from sagemaker_entry.metrics import MAX_WORKERS, Metrics
from sagemaker_entry.sessions import Sessions
from sagemaker_entry.settings import Settings, decode
from sagemaker_entry.worker import Worker

MAX_SETTINGS_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors from the supervisor."""

    listen: int
    settings: int
    door: int
    heartbeat: int
    metrics: int
    board: int | None = None  # of a sealed model: what the engine publishes, and where it is unlocked
    unlock: int | None = None


Build = Callable[[Settings, Inherited, Metrics, Sessions | None, Callable[[], None]], Any]


class Front(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """What gunicorn calls an application: configuration and a way to build the WSGI callable."""

    def __init__(self, settings: Settings, inherited: Inherited, build: Build) -> None:
        self.settings = settings
        self.inherited = inherited
        self.metrics = Metrics(inherited.metrics)  # replaced by the worker's own after the fork
        self._table = sessions.create()  # shared by the workers forked from here
        self._build = build
        self._asks_for_next = False
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._gunicorn_settings().items():
            self.cfg.set(name, value)

    def _gunicorn_settings(self) -> dict[str, Any]:
        return {
            "bind": f"fd://{self.inherited.listen}",
            "workers": 1,  # the next one starts when this one serves, see `serving`
            "worker_class": Worker,
            "worker_connections": 1000,
            "timeout": 15,  # a worker whose hub stands still for this long is replaced
            "graceful_timeout": int(self.settings.drain_s) + 2,
            "keepalive": 30,
            "http_parser": "python",
            "control_socket_disable": True,
            "http_protocols": "h1",
            "http2_cleartext": "off",
            "proxy_protocol": False,
            "header_map": "refuse",
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "secure_scheme_headers": {},
            "limit_request_line": 4094,
            "limit_request_fields": 100,
            "limit_request_field_size": 8190,
            "permit_obsolete_folding": False,
            "permit_unconventional_http_method": False,
            "permit_unconventional_http_version": False,
            "strip_header_spaces": False,
            "casefold_http_method": False,
            "logger_class": log.QuietLogger,
            "preload_app": False,
            "pre_fork": self._before_fork,
            "post_fork": self._after_fork,
            "proc_name": "strongroom-front",
        }

    def run(self) -> None:
        """Serve until told to stop; ends by SystemExit.

        gunicorn halts when a worker cannot load and reaps the others meanwhile: a second one that could not
        makes it halt inside its halting, and Python would print both traces.
        """
        arbiter = Arbiter(self)
        # The listener is the supervisor's, as it would be systemd's: gunicorn would otherwise take a Unix
        # socket out of the file system as soon as it drains, and when it dies in order.
        arbiter.systemd = True
        try:
            arbiter.run()
        except HaltServer as halt:
            raise SystemExit(halt.exit_status) from None

    def load(self) -> Any:
        """Build the WSGI callable; called in the worker."""
        held = None
        if self.settings.sessions == "on":
            limit, life_s = self.settings.max_sessions, self.settings.session_s
            held = Sessions(self._table, self.metrics.region, limit, life_s)
        return self._build(self.settings, self.inherited, self.metrics, held, self.serving)

    def serving(self) -> None:
        """Ask the arbiter for the next worker where some are missing; called once in a worker that serves.

        All at once they would take the cores from the engine that they wait for.
        """
        if self._asks_for_next:
            os.kill(os.getppid(), signal.SIGTTIN)

    @staticmethod
    def _before_fork(arbiter: Arbiter, worker: Any) -> None:
        taken = {other.region for other in arbiter.WORKERS.values()}
        worker.region = min(set(range(1, MAX_WORKERS + 1)) - taken)

    @staticmethod
    def _after_fork(arbiter: Arbiter, worker: Any) -> None:
        children.die_with_parent()
        children.undumpable()
        front: Front = worker.app
        # The newest alone asks: one that replaces a dead worker finds as many as there were.
        front._asks_for_next = worker.region == arbiter.num_workers < front.settings.workers
        front.metrics = Metrics(front.inherited.metrics, worker.region)
        front.metrics.reset_gauges()
        if front.settings.lockdown == "on":
            front.metrics.put("locked", lock([listener.fileno() for listener in worker.sockets]))
        log.write("info", "worker_started")


def parse_arguments(arguments: Sequence[str]) -> Inherited:
    """Return the descriptors named on the command line."""
    parser = argparse.ArgumentParser(prog="front", allow_abbrev=False)
    for name in ("listen", "settings", "door", "heartbeat", "metrics"):
        parser.add_argument(f"--{name}-fd", dest=name, type=int, required=True)
    for name in ("board", "unlock"):
        parser.add_argument(f"--{name}-fd", dest=name, type=int)
    return Inherited(**vars(parser.parse_args(arguments)))


def lock(listeners: Sequence[int]) -> int:
    """Prove the lockdown in this process, or lock it; return what to say of it.

    Raises SystemExit where that fails.
    """
    try:
        hold(keep=listeners)
    except LockdownFailed as error:
        log.write("error", "lockdown_failed", cause=str(error))
        sys.exit(children.EXIT_UNUSABLE)
    return HOLDS


def run(arguments: Sequence[str], build: Build) -> None:
    """Run the front until it is told to stop."""
    inherited = parse_arguments(arguments)
    settings = decode(os.pread(inherited.settings, MAX_SETTINGS_BYTES, 0).decode())
    log.set_level(settings.log_level)
    log.silence_libraries()
    children.undumpable()
    sys.argv = ["front"]  # gunicorn would read options here
    if settings.lockdown == "on":
        lock([inherited.listen])
    Front(settings, inherited, build).run()


def build_application(
    settings: Settings,
    inherited: Inherited,
    metrics: Metrics,
    held: Sessions | None,
    serving: Callable[[], None],
) -> Any:
    """Build the real application; imported late, so that gevent has patched what it imports."""
    from sagemaker_entry.wiring import build

    return build(
        settings,
        inherited.door,
        inherited.heartbeat,
        metrics,
        serving,
        sessions=held,
        board_fd=inherited.board,
        unlock_fd=inherited.unlock,
    )


if __name__ == "__main__":
    run(sys.argv[1:], build_application)
