"""The frame between a front process and its template child: a length and one JSON object.

Owns: the framing and its limit.
Must not know: what the objects say.

    | u32 length, little endian | JSON, UTF-8 |
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

LENGTH: Final = struct.Struct("<I")
MAX_FRAME_BYTES: Final = 16 * 1024 * 1024  # the child has 256 MiB for a frame and all it makes of it
CHUNK_BYTES: Final = 1 << 20


def send(channel: socket.socket, payload: bytes) -> None:
    """Send one frame; raises OSError."""
    channel.sendall(LENGTH.pack(len(payload)) + payload)


def receive(channel: socket.socket, before: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Return the next frame, None when the peer closed the socket.

    `before` runs ahead of every wait. Raises OSError, and ValueError on a frame that is too large or no JSON.
    """
    header = _exactly(channel, LENGTH.size, before)
    if header is None:
        return None
    (size_bytes,) = LENGTH.unpack(header)
    if size_bytes > MAX_FRAME_BYTES:
        raise ValueError("frame too large")
    payload = _exactly(channel, size_bytes, before)
    if payload is None:
        return None
    frame: dict[str, Any] = json.loads(payload)
    return frame


def _exactly(channel: socket.socket, size_bytes: int, before: Callable[[], None]) -> bytearray | None:
    data = bytearray()
    while len(data) < size_bytes:
        before()
        chunk = channel.recv(min(CHUNK_BYTES, size_bytes - len(data)))
        if not chunk:
            return None
        data += chunk
    return data
