"""The few bytes between a front worker and an engine that waits for its key.

Owns: their form and bounds, the worker's end. Must not know: HTTP, keys, the documents' form.
Invariant: what either side sends is bounded before it is read on.

    worker: knock -> verb 1 | document, end of stream
    engine:          status 1 | document or refusal, end of stream
"""

from __future__ import annotations

import enum
import socket
import time
from typing import Final

from container.ranks.door import knock

MAX_CALL_BYTES: Final = 1 + 4096 + 1  # a verb, the longest document, and one more that shows what is longer
MAX_REPLY_BYTES: Final = 8192


class Verb(enum.Enum):
    """What is asked of a locked engine."""

    DESCRIBE = b"d"
    UNLOCK = b"u"


class Status(enum.Enum):
    """How it went."""

    DONE = b"+"
    REFUSED = b"-"


def call(door_fd: int, verb: Verb, document: bytes, wait_s: float) -> tuple[Status, bytes]:
    """Ask the locked engine, from a front worker; raises OSError where it does not answer in time."""
    deadline_s = time.monotonic() + wait_s
    with knock(door_fd) as connection:
        connection.settimeout(wait_s)
        connection.sendall(verb.value + document[: MAX_CALL_BYTES - 1])
        connection.shutdown(socket.SHUT_WR)
        reply = until_end(connection, MAX_REPLY_BYTES)
    if not reply or time.monotonic() > deadline_s:
        raise TimeoutError
    return Status(reply[:1]), reply[1:]


def until_end(connection: socket.socket, most_bytes: int) -> bytes:
    """Return what the peer sends up to its end of stream, cut at `most_bytes`."""
    content = b""
    while len(content) < most_bytes:
        part = connection.recv(most_bytes - len(content))
        if not part:
            break
        content += part
    return content
