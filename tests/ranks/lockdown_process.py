"""A process that tries every way out, and everything the product needs, before or after it locked itself.

python -m tests.ranks.lockdown_process WHEN LISTEN_FD      WHEN: `open` or `locked`; prints one JSON object:
name -> "done", or the name of the error. It says "ready" first, then somebody has to connect to the listener.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from container.ranks.lockdown import hold
from container.ranks.lockdown_bpf import MSG_FASTOPEN, PROCESSORS

NUMBERS = PROCESSORS[os.uname().machine].numbers
CHILD = (
    "import socket\ntry:\n    socket.socket()\n    print('done')\nexcept OSError as e:\n    print(e.errno)"
)
Outcomes = dict[str, str]


def outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "unknown")
    return "done"


def call(name: str, *arguments: int, offset: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(NUMBERS[name] + offset, *(ctypes.c_long(one) for one in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)


class Prepared:
    """What was opened before the lock, as an attacker inside would wish for."""

    def __init__(self, listen_fd: int) -> None:
        self.listener = socket.socket(fileno=listen_fd)
        self.address = self.listener.getsockname()
        self.stream = socket.socket()
        self.second_stream = socket.socket()
        self.datagram = socket.socket(type=socket.SOCK_DGRAM)
        self.own_listener = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.directory = tempfile.TemporaryDirectory()
        self.path = str(Path(self.directory.name, "s"))
        self.unix_listener = socket.socket(socket.AF_UNIX)
        self.unix_listener.bind(self.path)
        self.unix_listener.listen()
        self.go = threading.Event()
        self.from_thread = ""
        self.thread = threading.Thread(target=self._wait)
        self.thread.start()

    @property
    def internet(self) -> list[int]:
        kept = (self.listener, self.stream, self.second_stream, self.datagram, self.own_listener)
        return [one.fileno() for one in kept]

    def _wait(self) -> None:
        self.go.wait()
        self.from_thread = outcome(socket.socket)

    def reconnect(self) -> None:
        """Turn a listener into a client: closed by shutdown, it may connect by sending."""
        with contextlib.suppress(OSError):
            self.own_listener.shutdown(socket.SHUT_RDWR)
        self.own_listener.sendmsg([b"x"], [], MSG_FASTOPEN, self.address)


def ways_out(prepared: Prepared) -> Outcomes:
    """Try everything that reaches another process or machine."""
    p = prepared
    families = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM),
        "tcp over version 6": (socket.AF_INET6, socket.SOCK_STREAM),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM),
        "udp over version 6": (socket.AF_INET6, socket.SOCK_DGRAM),
        "raw": (socket.AF_INET, socket.SOCK_RAW),
        "netlink": (socket.AF_NETLINK, socket.SOCK_RAW),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM),
        "unix datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    made = {name: outcome(lambda f=pair: socket.socket(*f)) for name, pair in families.items()}
    p.go.set()
    p.thread.join()
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    message = struct.pack("4Q", 0, 0, 0, 0) + bytes(24)
    return made | {
        "datagram pair": outcome(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)),
        "connect": outcome(lambda: p.stream.connect(p.address)),
        "unix connect": outcome(lambda: p.unix.connect(p.path)),
        "sendto": outcome(lambda: p.datagram.sendto(b"x", p.address)),
        "sendmmsg": outcome(lambda: call("sendmmsg", p.unix.fileno(), id_of(message), 0, 0)),
        "sendto that connects": outcome(lambda: p.second_stream.sendto(b"x", MSG_FASTOPEN, p.address)),
        "sendmsg that connects": outcome(p.reconnect),
        "thread of before": p.from_thread,
        "child": "done" if child.strip() == "done" else errno.errorcode[int(child)],
        "second table": outcome(lambda: call("socket", 2, 1, 0, offset=0x40000000)),
        "own memory through the back": outcome(lambda: call("process_vm_readv", os.getpid(), 0, 0, 0, 0, 0)),
        "other memory": outcome(lambda: call("process_vm_writev", os.getpid(), 0, 0, 0, 0, 0)),
        "io_uring": outcome(lambda: call("io_uring_enter", -1, 0, 0, 0, 0, 0)),
        "trace": outcome(lambda: call("ptrace", 0x4200, -1, 0, 0)),
        "descriptor of another": outcome(lambda: call("pidfd_getfd", -1, 0, 0)),
        "namespace": outcome(lambda: call("setns", -1, 0)),
    }


def id_of(buffer: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0


def needed(prepared: Prepared) -> Outcomes:
    """Do everything the processes do while they serve."""
    return {
        "accept": outcome(lambda: converse(prepared.listener)),
        "stream pair": outcome(lambda: socket.socketpair()),
        "seqpacket pair": outcome(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)),
        "unix listener": outcome(listen_within),
        "pass a descriptor": outcome(pass_one),
        "affinity": outcome(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
        "affinity of a thread": outcome(
            lambda: os.sched_setaffinity(threading.get_native_id(), os.sched_getaffinity(0))
        ),
        "clock": outcome(lambda: time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)),
        "thread": outcome(lambda: in_thread(lambda: None)),
        "process": outcome(lambda: subprocess.run(["/bin/true"], check=True)),
        "memory": outcome(lambda: os.ftruncate(os.memfd_create("x"), 4096)),
        "watch a process": outcome(lambda: os.pidfd_open(os.getpid())),
        "events": outcome(lambda: select.epoll().register(os.eventfd(0), select.EPOLLIN)),
        "file": outcome(lambda: tempfile.TemporaryFile().write(b"x")),
    }


def converse(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        assert connection.recv(5) == b"hello"
        connection.send(b"by send ")
        connection.sendmsg([b"by sendmsg"])
        connection.shutdown(socket.SHUT_RDWR)


def listen_within() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel chooses a name
        listener.listen()


def pass_one() -> None:
    one, other = socket.socketpair()
    with one, other:
        socket.send_fds(one, [b"x"], [0])
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        os.close(fds[0])


def in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


if __name__ == "__main__":
    prepared = Prepared(int(sys.argv[2]))
    if sys.argv[1] == "locked":
        hold(keep=prepared.internet)
    print("ready", flush=True)
    print(json.dumps({"needed": needed(prepared), "out": ways_out(prepared)}), flush=True)
    os._exit(0)
