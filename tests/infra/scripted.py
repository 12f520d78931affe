"""A container for tests: a raw socket server that answers as told, badly where asked.

Owns: reading one request per connection and handing it to a script. Must not know: the emulator.
Invariant: after `close` no thread and no socket is left; every wait is bounded.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Received:
    """A request as the container saw it."""

    path: str
    headers: dict[str, str]  # lower-case names
    body: bytes
    at_s: float = field(default_factory=time.monotonic)


Script = Callable[[Received, socket.socket], None]


class ScriptedContainer:
    """Runs `script` for each request, each on its own connection; a context manager."""

    def __init__(self, script: Script, unix: Path | None = None) -> None:
        self.script = script
        self.requests: list[Received] = []
        self.failures: list[BaseException] = []
        if unix is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(unix))
            self._listener.listen()
            self.address = f"unix:{unix}"
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> ScriptedContainer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive(), "a script did not end"
        assert not self.failures, self.failures

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._answer, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                request = _read(connection)
                if request is not None:
                    self.requests.append(request)
                    self.script(request, connection)
            except (BrokenPipeError, ConnectionResetError):
                return  # the other side gave up, as some tests ask it to
            except Exception as failure:  # noqa: BLE001 (`__exit__` fails the test with it)
                self.failures.append(failure)


def _read(connection: socket.socket) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    parts = [body]
    left = int(headers["content-length"]) - len(body)
    while left > 0:
        more = connection.recv(1 << 20)
        if not more:
            return None
        parts.append(more)
        left -= len(more)
    return Received(first.split(" ")[1], headers, b"".join(parts))


def head(status: int = 200, *headers: str) -> bytes:
    """Return a response head with `headers` as whole lines."""
    return "\r\n".join((f"HTTP/1.1 {status} Scripted", *headers, "", "")).encode("latin-1")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply(body: bytes = b"{}", status: int = 200, *headers: str) -> Script:
    """Answer with a whole body."""
    lines = headers or ("Content-Type: application/json",)

    def script(request: Received, connection: socket.socket) -> None:
        connection.sendall(head(status, *lines, f"Content-Length: {len(body)}") + body)

    return script


def stream(
    events: Iterable[bytes],
    gap_s: float = 0.0,
    sent: list[float] | None = None,
    ending: Script | None = None,
    content_type: str = "text/event-stream",
) -> Script:
    """Answer with chunks, `gap_s` apart; `sent` gets their times, `ending` replaces the last chunk."""

    def script(request: Received, connection: socket.socket) -> None:
        connection.sendall(head(200, f"Content-Type: {content_type}", "Transfer-Encoding: chunked"))
        for number, event in enumerate(events):
            if number:
                time.sleep(gap_s)
            connection.sendall(chunk(event))
            if sent is not None:
                sent.append(time.monotonic())
        if ending is None:
            connection.sendall(b"0\r\n\r\n")
        else:
            ending(request, connection)

    return script


def cut(request: Received, connection: socket.socket) -> None:
    """End the connection as if all had been said."""


def reset(request: Received, connection: socket.socket) -> None:
    """End the connection with a reset."""
    time.sleep(0.05)  # let what was sent be read: a reset overtakes it
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stall(request: Received, connection: socket.socket) -> None:
    """Say nothing until the other side gives up."""
    assert connection.recv(1) == b"", "nothing follows a request"


def short_body(request: Received, connection: socket.socket) -> None:
    """Announce ten bytes, send four."""
    connection.sendall(head(200, "Content-Type: text/plain", "Content-Length: 10") + b"four")


def wait_until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    """Return once `condition` holds; an assertion fails after `limit_s`."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.01)
