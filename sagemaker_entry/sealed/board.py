"""What an opened package gives the front: its small files and a few facts, in memory, written once.

Owns: the anonymous file, its form, when it counts as written. Must not know: keys, sealing, weights.
Invariant: the board holds no weights and no key, has no name in any file system, and never changes once it is
published; a later engine of the same container publishes nothing else.

PID 1 makes it, the engine writes it, the front reads it: so that the front needs no key.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

import msgspec

MAX_BYTES: Final = 512 * 1024 * 1024
SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Licence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The admitted licence's end, in seconds since 1970."""

    not_after_s: int


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is told of the package that is served."""

    content_sha256: str
    licence: Licence | None
    files: dict[str, bytes]

    def __repr__(self) -> str:
        return f"Published(files={len(self.files)})"


def create() -> int:
    """Return a descriptor of an empty board."""
    return os.memfd_create("board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def published(fd: int) -> bool:
    """Return whether the board has been written."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


def publish(fd: int, told: Published) -> None:
    """Write the board, for ever. Raises ValueError beyond MAX_BYTES, OSError where it has been written."""
    raw = msgspec.msgpack.encode(told)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"the files for the front exceed {MAX_BYTES} bytes")
    os.ftruncate(fd, 0)  # an engine may have died while it wrote
    done = 0
    while done < len(raw):
        done += os.pwrite(fd, raw[done:], done)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def read(fd: int) -> Published | None:
    """Return what the board says, None while it has not been written; raises msgspec.DecodeError."""
    if not published(fd):
        return None
    size = os.fstat(fd).st_size
    raw = bytearray(size)
    done = 0
    while done < size:
        done += os.preadv(fd, [memoryview(raw)[done:]], done)
    return msgspec.msgpack.decode(raw, type=Published)
