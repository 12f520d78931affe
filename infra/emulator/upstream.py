"""One request to the container: sent, answered piece by piece, ended for a known reason.

Owns: the socket to the container, the total deadline, watching the client while waiting. Must not know:
routes, SageMaker's errors, what bodies say.
Invariant: every wait ends with the container's bytes, the deadline or the client's departure; the socket is
closed when the exchange is left, which is how a departure reaches the container.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from infra.emulator.http1 import Head, MalformedResponse, ResponseParser, TruncatedResponse

Clock = Callable[[], float]  # seconds, never going back
Address = tuple[str, int] | Path  # a port, or a Unix socket

READ_BYTES: Final = 64 * 1024
CONNECT_S: Final = 5.0  # a container that listens accepts at once, loading or not
# Longest wait between two looks at the clock: it may be a test's, which no selector can wait for.
POLL_S: Final = 0.1


class ExchangeFailed(Exception):
    """Root of what can end an exchange early.

    ExchangeFailed
    |- UpstreamBroken    refused, reset, cut short or not HTTP
    |- DeadlinePassed    the total time is over
    |- ClientGone        the caller closed its connection
    """


class UpstreamBroken(ExchangeFailed):
    """The container's connection failed or its answer is not whole."""


class DeadlinePassed(ExchangeFailed):
    """The total time for the exchange is over."""


class ClientGone(ExchangeFailed):
    """The caller has closed its connection."""


class Deadline:
    """A moment on a clock; `extend_to` moves it, counted from the start."""

    def __init__(self, clock: Clock, total_s: float) -> None:
        self._clock = clock
        self._start_s = clock()
        self._total_s = total_s

    def left_s(self) -> float:
        """Return the seconds left, 0 or less once it has passed."""
        return self._start_s + self._total_s - self._clock()

    def extend_to(self, total_s: float) -> None:
        """Let the exchange last `total_s` seconds from its start."""
        self._total_s = total_s


def host_header(address: Address) -> str:
    """Return what a request to `address` says in its Host header."""
    if isinstance(address, Path):
        return "localhost"  # a path is no name; RFC 9112 3.2 asks for the header all the same
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(address: Address, wait_s: float) -> socket.socket:
    """Return a connection to a port or a Unix socket; raises OSError."""
    if not isinstance(address, Path):
        connection = socket.create_connection(address, wait_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(wait_s)
        connection.connect(str(address))
    except OSError:
        connection.close()
        raise
    return connection


class Exchange:
    """A request and its response over one connection; a context manager.

    `client` is the caller's socket, watched for its end while waiting. All methods raise ExchangeFailed.
    """

    def __init__(self, address: Address, deadline: Deadline, client: socket.socket) -> None:
        self._deadline = deadline
        self._parser = ResponseParser()
        self._client: socket.socket | None = client
        try:
            self._socket = connect(address, min(CONNECT_S, max(deadline.left_s(), 0.001)))
        except OSError as error:
            raise UpstreamBroken("the container refused the connection") from error
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(client, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._socket.close()

    def send(self, path: str, headers: Sequence[tuple[str, str]], body: bytes, method: str = "POST") -> None:
        """Send a request; returns early when the container has answered without reading all of it."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        for data in (memoryview("\r\n".join(lines).encode("latin-1")), memoryview(body)):
            self._send_all(data)

    def head(self) -> Head:
        """Return the response's head, once it is whole."""
        while self._parser.head is None:
            self._receive()
        return self._parser.head

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it arrives, never more than one chunk of the container's at a time."""
        while True:
            try:
                yield from self._parser.pieces()
            except MalformedResponse as error:
                raise UpstreamBroken("the container's body is not HTTP") from error
            if self._parser.complete:
                return
            self._receive()

    def _send_all(self, data: memoryview) -> None:
        self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while data and self._parser.head is None:
            ready = self._wait()
            if ready & selectors.EVENT_READ:
                self._read()
                continue
            try:
                data = data[self._socket.send(data) :]
            except (BrokenPipeError, ConnectionResetError):
                break  # the answer may still be there to read, a 413 most likely
        self._selector.modify(self._socket, selectors.EVENT_READ)

    def _receive(self) -> None:
        self._wait()
        self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
            if data:
                self._parser.feed(data)
            else:
                self._parser.end_of_input()
        except (OSError, MalformedResponse, TruncatedResponse) as error:
            raise UpstreamBroken("the container's answer is not whole") from error

    def _wait(self) -> int:
        """Return the events of the container's socket once there are any."""
        while True:
            left_s = self._deadline.left_s()
            if left_s <= 0:
                raise DeadlinePassed
            ready = {key.fileobj: events for key, events in self._selector.select(min(left_s, POLL_S))}
            if self._client in ready:
                self._look_at_client(self._client)
            if self._socket in ready:
                return ready[self._socket]

    def _look_at_client(self, client: socket.socket) -> None:
        """Raise ClientGone if `client` has closed; stop watching it if it has sent its next request."""
        try:
            gone = not client.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, TimeoutError):
            return
        except OSError as error:
            raise ClientGone from error
        if gone:
            raise ClientGone
        self._selector.unregister(client)
        self._client = None
