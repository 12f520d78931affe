"""The door between front workers and the engine: how a worker gets a connection without connect().

Owns: the one pair of sockets every worker and every engine inherits, and the passing of a descriptor over it.
Must not know: frames, requests, processes. No torch.
Invariant: the supervisor holds both ends for the life of the container, so the door outlives any engine and
any worker; what travels through it is one descriptor of an AF_UNIX stream socket per knock, nothing else.

    worker: socketpair() -> keeps one end, sends the other | door | -> engine: adopts it

connect() is dead once a process has locked itself, and so is a path in the filesystem under a read-only root:
a socketpair passed by SCM_RIGHTS needs neither.
"""

from __future__ import annotations

import array
import select
import socket
from typing import Final

KNOCK: Final = b"k"  # a packet needs at least one byte to carry a descriptor
ANSWERS_PER_CALL: Final = 64  # bounds one turn of the engine's IO loop


class DoorClosed(Exception):
    """No process holds the other end any more: supervisor and every worker are gone."""


def make_door() -> tuple[int, int]:
    """Return (front_fd, engine_fd), both non-blocking and closed on exec unless passed on explicitly."""
    front, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front.setblocking(False)
    engine.setblocking(False)
    return front.detach(), engine.detach()


def knock(front_fd: int) -> socket.socket:
    """Hand one end of a new stream socketpair through the door and return the other, blocking.

    The engine, or the next one if none runs now, adopts it when it gets there. Never blocks: raises
    BlockingIOError when too many knocks wait unanswered, and OSError when the process is out of descriptors.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    door = socket.socket(fileno=front_fd)
    try:
        socket.send_fds(door, [KNOCK], [theirs.fileno()], socket.MSG_DONTWAIT)
    except OSError:
        ours.close()
        raise
    finally:
        door.detach()
        theirs.close()
    return ours


def answer(engine_fd: int) -> list[socket.socket]:
    """Return the connections handed over since the last call, non-blocking, at most ANSWERS_PER_CALL.

    Whatever is not exactly one stream socket is closed and left out. Raises DoorClosed.
    """
    adopted: list[socket.socket] = []
    door = socket.socket(fileno=engine_fd)
    try:
        for _ in range(ANSWERS_PER_CALL):
            try:
                # CMSG_LEN, not CMSG_SPACE: its padding would hold a second descriptor
                data, ancillary, flags, _ = door.recvmsg(
                    1, socket.CMSG_LEN(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            fds = [fd for level, kind, payload in ancillary for fd in _descriptors(level, kind, payload)]
            adopted.extend(_adopt(fds, whole=not flags & socket.MSG_CTRUNC))
            if not data and not fds and _hung_up(engine_fd):
                raise DoorClosed
    finally:
        door.detach()
    return adopted


def _descriptors(level: int, kind: int, payload: bytes) -> list[int]:
    if level != socket.SOL_SOCKET or kind != socket.SCM_RIGHTS:
        return []
    fds = array.array("i")
    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return fds.tolist()


def _adopt(fds: list[int], *, whole: bool) -> list[socket.socket]:
    kept = []
    for fd in fds:
        connection = _stream(fd) if whole else None
        if connection is None:
            _close(fd)
        else:
            kept.append(connection)
    return kept


def _stream(fd: int) -> socket.socket | None:
    """Return a socket over `fd`, or None when it is anything but an AF_UNIX stream socket."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        return None  # not a socket at all
    if connection.family != socket.AF_UNIX or connection.type != socket.SOCK_STREAM:
        connection.detach()
        return None
    connection.setblocking(False)
    return connection


def _close(fd: int) -> None:
    socket.close(fd)


def _hung_up(fd: int) -> bool:
    """Tell the end of the door from an empty packet; recvmsg returns nothing for both."""
    poll = select.poll()
    poll.register(fd, select.POLLHUP)
    return bool(poll.poll(0))
