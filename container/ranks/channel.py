"""One front connection as the engine's IO thread sees it, and the framing both sides use.

Owns: cutting a byte stream into frames, the outgoing backlog, the reason a connection was closed.
Must not know: requests, the engine, threads, selectors. No torch.
Invariant: nothing here blocks, or raises at the caller, for what a peer sent; a peer that breaks a rule loses
its connection, and none can make the engine hold more than one frame in and BACKLOG_BYTES out.
"""

from __future__ import annotations

import enum
import socket
from collections import deque
from typing import Final

import msgspec

from container.ranks import messages

READ_BYTES: Final = 256 * 1024  # one turn's worth per connection, so that none starves the others
BACKLOG_BYTES: Final = 64 * 1024 * 1024  # a worker this far behind has stopped reading
INTAKE_BYTES: Final = 32 * 1024 * 1024  # frames read but not yet applied by the engine; then reading pauses


class FrameError(Exception):
    """A length prefix is zero or above the limit."""


class FrameDecoder:
    """Cuts a stream into frame payloads; refuses a length before room for it is made."""

    def __init__(self, limit_bytes: int = messages.MAX_FRAME_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._rest = bytearray()

    @property
    def held_bytes(self) -> int:
        """Bytes of an unfinished frame; at most the limit plus one read."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes, in order; raises FrameError, which spends the decoder."""
        self._rest += data
        payloads: list[bytes] = []
        start, end = 0, len(self._rest)
        while end - start >= messages.LENGTH.size:
            (size,) = messages.LENGTH.unpack_from(self._rest, start)
            if not 0 < size <= self._limit_bytes:
                self._rest.clear()
                raise FrameError(f"frame length {size} is not in 1..{self._limit_bytes}")
            body = start + messages.LENGTH.size
            if end - body < size:
                break
            payloads.append(bytes(memoryview(self._rest)[body : body + size]))
            start = body + size
        del self._rest[:start]
        return payloads


class Fault(enum.StrEnum):
    """Why a connection ended."""

    LEFT = "left"  # the peer closed it
    MALFORMED = "malformed"  # broken framing, unknown tag, wrong type or field count
    PROTOCOL = "protocol"  # no hello first, two of them, or another schema
    BACKLOG = "backlog"  # the peer does not read
    CLOSED = "closed"  # by us, on the way out


class Channel:
    """A non-blocking stream socket that speaks frames. `fault` is set once it is closed, and stays."""

    def __init__(self, connection: socket.socket, number: int, *, backlog_bytes: int = BACKLOG_BYTES) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.number = number  # RequestKey.connection of all its requests; never reused
        self.greeted = False
        self.intake_bytes = 0  # see INTAKE_BYTES
        self.fault: Fault | None = None
        self._decoder = FrameDecoder()
        self._outgoing: deque[memoryview] = deque()
        self._backlog_limit_bytes = backlog_bytes
        self.backlog_bytes = 0

    def __repr__(self) -> str:
        return f"Channel(number={self.number}, fault={self.fault}, backlog_bytes={self.backlog_bytes})"

    @property
    def wants_read(self) -> bool:
        return self.fault is None and self.intake_bytes < INTAKE_BYTES

    @property
    def wants_write(self) -> bool:
        return self.fault is None and self.backlog_bytes > 0

    def read(self) -> list[tuple[messages.FromFront, int]]:
        """Return the messages that have arrived, each with its size in bytes; closes on end or fault."""
        try:
            data = self.socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        if not data:
            self.close(Fault.LEFT)
            return []
        try:
            return [(messages.decode_from_front(p), len(p)) for p in self._decoder.feed(data)]
        except (FrameError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.close(Fault.MALFORMED)
            return []

    def send(self, data: bytes) -> None:
        """Queue one frame and write what the socket takes now; a peer too far behind is cut off."""
        if self.fault is not None:
            return
        self._outgoing.append(memoryview(data))
        self.backlog_bytes += len(data)
        self.flush()
        if self.backlog_bytes > self._backlog_limit_bytes:
            self.close(Fault.BACKLOG)

    def flush(self) -> None:
        """Write queued bytes until none are left or the socket is full."""
        while self._outgoing and self.fault is None:
            head = self._outgoing[0]
            try:
                sent = self.socket.send(head)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close(Fault.LEFT)
                return
            self.backlog_bytes -= sent
            if sent == len(head):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = head[sent:]

    def close(self, fault: Fault) -> None:
        """Close the socket and drop what was queued; the first fault is kept."""
        if self.fault is None:
            self.fault = fault
            self._outgoing.clear()
            self.backlog_bytes = 0
            self.socket.close()
