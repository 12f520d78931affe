"""One call of a container from within: no caller waits on a socket, so a stop does in its place.

Owns: sending a body, reading a whole answer, giving up at a deadline or when the emulator closes.
Must not know: who wanted the answer.
Invariant: a call ends with the container's answer, the deadline or `Stop.end`, whichever comes first.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Final

from infra.emulator.upstream import Address, Clock, Deadline, Exchange, UpstreamBroken, host_header

ANSWER_BYTES: Final = 100 * 1024 * 1024  # what the platform takes of a batch or asynchronous call


class Stop:
    """Ends the calls that watch it, also those that have not begun."""

    def __init__(self) -> None:
        self.watched, self._held = socket.socketpair()
        self.watched.setblocking(False)

    def end(self) -> None:
        """Make every call that watches raise ClientGone; idempotent."""
        self._held.close()

    def close(self) -> None:
        """Let go of the sockets, once nobody watches any more."""
        self._held.close()
        self.watched.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of a container."""

    status: int
    content_type: str
    body: bytes = field(repr=False)
    attributes: str | None = None

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


def call(
    address: Address,
    headers: list[tuple[str, str]],
    body: bytes,
    stop: Stop,
    timeout_s: float,
    clock: Clock,
    *,
    method: str = "POST",
    path: str = "/invocations",
) -> Answer:
    """Return the answer; raises ExchangeFailed."""
    framing = [
        ("Host", host_header(address)),
        *headers,
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    with Exchange(address, Deadline(clock, timeout_s), stop.watched) as exchange:
        exchange.send(path, framing, body, method)
        head = exchange.head()
        received = bytearray()
        for piece in exchange.pieces():
            received += piece
            if len(received) > ANSWER_BYTES:
                raise UpstreamBroken(f"the answer is larger than {ANSWER_BYTES} bytes")
    attributes = head.get("X-Amzn-SageMaker-Custom-Attributes")
    return Answer(head.status, head.get("Content-Type") or "", bytes(received), attributes)
