"""The emulator: a listening socket on the loopback address and a bounded number of callers.

Owns: listening, one thread per connection up to CONNECTIONS, start and end. Must not know: routes, formats.
Invariant: it binds 127.0.0.1 and nothing else; after `close` no thread and no socket of it is left.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from infra.emulator import tokens
from infra.emulator.caller import Caller
from infra.emulator.control import Control
from infra.emulator.errors import busy
from infra.emulator.journal import Journal
from infra.emulator.queueing import AsyncConfig, AsyncQueue, Notify
from infra.emulator.registry import Endpoint, Registry, parse_address
from infra.emulator.service import Limits, Options, RuntimeService
from infra.emulator.sigv4 import Keys
from infra.emulator.splitting import Split
from infra.emulator.stores import Store
from infra.emulator.transform import Transforms
from infra.emulator.upstream import Clock

HOST: Final = "127.0.0.1"
CONNECTIONS: Final = 256  # a thread each; four times the concurrency the tests ask for
BACKLOG: Final = 128
REFUSAL_S: Final = 0.1  # spent on a caller beyond the bound; nobody else is accepted meanwhile
STOP_POLL_S: Final = 0.1
ASYNC_SUFFIX: Final = "-async"

# Not secrets: they open nothing, and every emulator prints them.
LOCAL_KEYS: Final = Keys("STRONGROOMLOCAL00001", "strongroom-local-keys-open-nothing")
LOCAL_REGION: Final = "us-east-1"


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread per connection, no more than CONNECTIONS, all ended by `drop`."""

    allow_reuse_address = True
    request_queue_size = BACKLOG
    daemon_threads = False
    block_on_close = True

    def __init__(self, port: int, service: RuntimeService) -> None:
        self.faults = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((HOST, port), type("BoundCaller", (Caller,), {"service": service}))

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            _refuse(request)
            self.shutdown_request(request)
            return
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """Count and name a fault of ours; a caller's reset is none. Texts are left out: they may quote."""
        kind = sys.exc_info()[0]
        if kind is not None and issubclass(kind, ConnectionError | TimeoutError):
            return
        self.faults += 1
        print(f"emulator: a request failed with {kind.__name__ if kind else '?'}", file=sys.stderr)

    def drop(self) -> None:
        """End every connection, so that its thread ends."""
        with self._lock:
            for request in self._open:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has ended by itself


class Emulator:
    """A SageMaker runtime for one machine, in front of running containers; a context manager.

    `upstream` is HOST:PORT or unix:/PATH of the container that serves `endpoint`; `components` maps names of
    inference components to theirs. `port` 0 takes a free one. `split` is none, bytes=N or random:SEED. With a
    `store`, batch transform jobs run on its objects; with `async_output` besides, a location in it, there is
    a second endpoint `NAME-async`, whose calls are answered there and told to `notify`. After
    `fail_after_parts` parts every stream fails as the platform's own doing. Raises ValueError for a malformed
    argument and OSError when the port is taken.
    """

    def __init__(
        self,
        upstream: str,
        endpoint: str,
        port: int = 0,
        *,
        components: Mapping[str, str] | None = None,
        strict: bool = False,
        split: str = "none",
        region: str = LOCAL_REGION,
        limits: Limits | None = None,
        store: Store | None = None,
        async_output: str | None = None,
        notify: Notify | None = None,
        fail_after_parts: int | None = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
    ) -> None:
        self._options = Options(
            LOCAL_KEYS,
            region,
            strict,
            Split.parse(split),
            limits or Limits(),
            fail_after_parts,
            clock,
            wall_clock,
        )
        self._name = endpoint
        self._registry = Registry()
        self._journal = Journal()
        self.add(endpoint, upstream, components)
        self._queue: AsyncQueue | None = None
        self._transforms: Transforms | None = None
        control = None
        if store is not None:
            self._transforms = Transforms(store, clock)
            control = Control(self._registry, self._transforms, region)
        if async_output is not None:
            if store is None:
                raise ValueError("`async_output` needs a store")
            config = AsyncConfig(async_output)
            self._registry.put(
                Endpoint(endpoint + ASYNC_SUFFIX, parse_address(upstream), asynchronous=config)
            )
            self._queue = AsyncQueue(store, region, config.concurrency, clock, notify)
        self._service = RuntimeService(self._registry, self._journal, self._options, self._queue, control)
        try:
            self._server = _Server(port, self._service)
        except OSError:
            self._close_jobs()
            raise
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="emulator", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, end every connection and wait for their threads."""
        self._server.shutdown()
        self._thread.join()
        self._server.drop()
        self._server.server_close()
        self._close_jobs()

    def _close_jobs(self) -> None:
        if self._queue is not None:
            self._queue.close()
        if self._transforms is not None:
            self._transforms.close()

    def add(self, endpoint: str, upstream: str, components: Mapping[str, str] | None = None) -> None:
        """Put another endpoint in service; raises ValueError for a malformed name or address."""
        addresses = {name: parse_address(address) for name, address in (components or {}).items()}
        self._registry.put(Endpoint(endpoint, parse_address(upstream), components=addresses))

    @property
    def port(self) -> int:
        """Return the port it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Return the endpoint URL for an AWS SDK."""
        return f"http://{HOST}:{self.port}"

    @property
    def faults(self) -> int:
        """Return how many requests ended in an error of the emulator's own."""
        return self._server.faults

    def openai_base_url(self, endpoint: str | None = None, component: str | None = None) -> str:
        """Return the base URL for an OpenAI client, of the first endpoint unless another is named."""
        middle = f"/inference-components/{component}" if component else ""
        return f"{self.url}/endpoints/{endpoint or self._name}{middle}/openai/v1"

    def token(self, expires_s: int = tokens.EXPIRES_S) -> str:
        """Return a bearer token made with the local keys; raises ValueError for a life out of range."""
        return tokens.make(self._options.keys, self._options.region, expires_s, self._options.wall_clock())

    def boto3_arguments(self) -> dict[str, str]:
        """Return keyword arguments for `boto3.client("sagemaker-runtime", ...)`."""
        return {
            "endpoint_url": self.url,
            "region_name": self._options.region,
            "aws_access_key_id": self._options.keys.access_key_id,
            "aws_secret_access_key": self._options.keys.secret_access_key,
        }

    def journal(self) -> list[dict[str, Any]]:
        """Return the last requests, oldest first: sizes, header names and codes."""
        return self._journal.rows()

    @property
    def has_store(self) -> bool:
        """Return whether batch jobs can run."""
        return self._transforms is not None

    def notifications(self) -> list[dict[str, Any]]:
        """Return what the topics of asynchronous calls would have been told, oldest first."""
        return [] if self._queue is None else self._queue.notifications()

    def state(self) -> dict[str, object]:
        """Return endpoints, limits and the number of requests so far."""
        return self._service.state()


def _refuse(request: socket.socket) -> None:
    error = busy()
    body = error.body()
    lines = [
        f"HTTP/1.1 {error.status} Service Unavailable",
        *(f"{name}: {value}" for name, value in error.headers()),
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        "",
    ]
    try:
        request.settimeout(REFUSAL_S)
        request.sendall("\r\n".join(lines).encode() + body)
        request.shutdown(socket.SHUT_WR)
        # Closing over unread bytes resets the connection, and the caller would lose the answer.
        while request.recv(64 * 1024):
            pass
    except OSError:
        return  # the caller has left already, or is too slow to wait for
