"""The front worker: gunicorn's gevent worker with our connections, our cap and our drain.

Owns: accepting, the connection cap, the worker's life from start to drain.
Must not know: HTTP beyond handing a socket to a connection; generation.
Invariant: while the process lives it accepts, so that a draining server answers 503 instead of nothing; it
leaves when no exchange runs here and no request anywhere in the front, or when the drain time is over.
"""

from __future__ import annotations

import resource
import time
from functools import partial
from typing import Any, Final

import gevent
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.workers.ggevent import GeventWorker

from sagemaker_entry import log
from sagemaker_entry.body import BodyBudget, BodyLimits
from sagemaker_entry.connection import Connection, Phase
from sagemaker_entry.exchange import Exchange
from sagemaker_entry.lifetime import ClientWatch, End
from sagemaker_entry.metrics import Metrics

MAX_CONNECTIONS: Final = 800  # per worker, well under the greenlet pool
FD_SHARE: Final = 0.8  # of the descriptor limit; the rest is for everything that is no client
RESERVED_FDS: Final = 48
BODIES_BYTES: Final = 256 * 1024 * 1024  # of all requests a worker holds at once
BODIES_AT_LEAST: Final = 4  # of the largest size, however large the operator made it
NOBODY: Final = ("", 0)  # the other end of a Unix socket
LOCAL: Final = ("localhost", 80)
TURN_S: Final = 0.1
LAST_WORDS_S: Final = 1.0  # for error events to be written once the drain time is over
QUIET_S: Final = 0.3  # requests that raced the drain still find somebody to refuse them


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process of the front. `app` is the Front, which carries settings and the inherited descriptors."""

    def init_process(self) -> None:
        settings = self.app.settings
        self.settings = settings
        self.body_limits = BodyLimits(settings.body_limit_bytes)
        self.body_budget = BodyBudget(max(BODIES_BYTES, BODIES_AT_LEAST * settings.body_limit_bytes))
        self.metrics: Metrics = self.app.metrics
        self.watch = ClientWatch()
        self.exchanges: set[Exchange] = set()
        self.connections: dict[Connection, None] = {}  # in order of arrival
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.connection_cap = max(8, min(MAX_CONNECTIONS, int(soft_limit * FD_SHARE) - RESERVED_FDS))
        super().init_process()

    @property
    def draining(self) -> bool:
        """True from the moment the supervisor says so, which is before any signal arrives here."""
        return not self.alive or self.metrics.draining

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one accepted socket."""
        if len(self.connections) >= self.connection_cap and not self._give_up_one():
            client.close()
            return
        name = listener.getsockname()
        if not isinstance(name, tuple):
            # The libraries ask for host and port, and trust the headers of a caller that has neither.
            addr, name = NOBODY, LOCAL
        connection = Connection(self, client, addr, name)
        self.connections[connection] = None
        self.metrics.add("strongroom_connections_open")
        try:
            connection.serve()
        finally:
            del self.connections[connection]
            self.metrics.add("strongroom_connections_open", -1)

    def _give_up_one(self) -> bool:
        """Break off the oldest connection of the least costly phase; False when all are running."""
        waiting = [connection for connection in self.connections if connection.phase < Phase.RUNNING]
        if not waiting:
            return False
        min(waiting, key=lambda connection: connection.phase).abort()
        return True

    def run(self) -> None:
        """Accept until told to stop, then drain.

        The supervisor's word counts as much as a signal: one that arrives between the fork and this process'
        own handlers is lost, and the drain would wait for this worker to its end.
        """
        gevent.get_hub().print_exception = _report
        servers = [self._server(listener) for listener in self.sockets]
        while not self.draining:
            self.notify()
            gevent.sleep(TURN_S)
        self._drain()
        for server in servers:
            server.close()
        log.write("info", "worker_stopped")

    def _server(self, listener: Any) -> StreamServer:
        listener.setblocking(False)
        server = StreamServer(
            listener, handle=partial(self.handle, listener), spawn=Pool(self.worker_connections)
        )
        server.max_accept = 8  # a burst is shared with the other workers instead of taken whole
        server.start()
        return server

    def _drain(self) -> None:
        started = time.monotonic()
        quiet_since = started
        while (now := time.monotonic()) - started < self.settings.drain_s:
            if self.exchanges or self.metrics.total("strongroom_requests_in_flight"):
                quiet_since = now
            elif now - quiet_since >= QUIET_S:
                return
            self.notify()
            gevent.sleep(TURN_S / 4)
        log.write("warning", "drain_time_over", exchanges=len(self.exchanges))
        for exchange in list(self.exchanges):
            exchange.lifetime.end(End.DRAINING)
        deadline = time.monotonic() + LAST_WORDS_S
        while self.exchanges and time.monotonic() < deadline:
            gevent.sleep(TURN_S / 4)


def _report(context: Any, kind: type[BaseException] | None, *_: Any) -> None:
    """Stand in for gevent's printing of a failed greenlet: its traceback and arguments may hold content."""
    log.write(
        "error", "greenlet_failed", kind=kind.__name__ if kind else "none", where=type(context).__name__
    )
