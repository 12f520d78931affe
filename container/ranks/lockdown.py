"""The egress lockdown: a process has the kernel refuse it every way out, and proves that it holds.

Owns: installing the filter in all threads, the test that it holds, the look for sockets that are open before.
Must not know: what the process does, when its moment is, settings.
Invariant: `hold` returns only when every refused call was seen refused in this very process. A filter cannot
be taken off again, and children inherit it, so what held once holds to the end. Nothing here needs a
privilege, a flag of the container runtime or a library: it works where nobody can pass any.

Each process holds at its own moment: the supervisor once it listens; front and workers, which inherit that,
at their start; ranks at their start, or, where torch.distributed has to connect them over loopback, after
their group has formed. Only in that last case does the supervisor keep the right to make sockets, for the
ranks that it may have to start again; it parses nothing, and every process that does is locked fully.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from container.ranks.lockdown_bpf import INSTRUCTION, MSG_FASTOPEN, PROCESSORS, Processor, Scope, program

PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_SET_MODE_FILTER: Final = 1
# To all threads; and without the slower speculation that kernels before 5.16 otherwise put every filtered
# process under: it is for code that must not read its own process, and ours runs nobody else's.
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 4
NOWHERE: Final = -1  # a descriptor or process that cannot exist: a call that gets through can do no harm
INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


class LockdownFailed(Exception):
    """The lockdown was asked for and does not hold; the text names calls and families, nothing else."""


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def hold(scope: Scope = Scope.FULL, keep: Collection[int] = (), *, loopback: bool = False) -> None:
    """Lock this process, all its threads and its future children; return once that is proven.

    A process that inherited the lockdown only proves it. `keep` are the sockets to the outside it may have:
    the listener. `loopback` also allows those that cannot leave the machine, which ranks have among them.
    Raises LockdownFailed.
    """
    strays = [*_strays(keep, loopback)] if scope is Scope.FULL else []
    if strays:
        raise LockdownFailed(f"{len(strays)} sockets are open already: {', '.join(strays)}")
    processor = PROCESSORS.get(os.uname().machine)
    if processor is None:
        raise LockdownFailed(f"there are no rules for `{os.uname().machine}`")
    if permitted(scope):
        _install(program(processor, scope), processor)
    left = permitted(scope)
    if left:
        raise LockdownFailed(f"not refused: {', '.join(left)}")
    if not _channels_work():
        raise LockdownFailed("sockets within the machine are refused too")


def permitted(scope: Scope = Scope.FULL) -> list[str]:
    """Return which calls that `scope` refuses are not refused to the calling thread; does none of them.

    Every call has arguments that cannot succeed: the filter answers EPERM before the kernel looks at them,
    the kernel itself something else.
    """
    processor = PROCESSORS.get(os.uname().machine)
    if processor is None:
        return ["any"]
    checked = _ALWAYS_REFUSED | (_SOCKETS_REFUSED if scope is Scope.FULL else {})
    return [name for name, (call, *arguments) in checked.items() if not _refused(processor, call, arguments)]


# What is tried: name -> system call and arguments. No socket has type 14, none of AF_UNIX has protocol -1.
_SOCKETS_REFUSED: Final[dict[str, tuple[str, *tuple[int, ...]]]] = {
    "internet stream": ("socket", socket.AF_INET, 14, 0),
    "internet datagram over version 6": ("socket", socket.AF_INET6, 14, 0),
    "netlink": ("socket", socket.AF_NETLINK, 14, 0),
    "packet": ("socket", socket.AF_PACKET, 14, 0),
    "vsock": ("socket", socket.AF_VSOCK, 14, 0),
    "datagram within the machine": ("socket", socket.AF_UNIX, socket.SOCK_DGRAM, NOWHERE),
    "datagram pair": ("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM, NOWHERE, 0),
    "connect": ("connect", NOWHERE, 0, 0),
    "send to an address": ("sendto", NOWHERE, 0, 0, 0, 1, 0),
    "send to a high address": ("sendto", NOWHERE, 0, 0, 0, 1 << 40, 0),
    "send to connect": ("sendto", NOWHERE, 0, 0, MSG_FASTOPEN, 0, 0),
    "send a message to connect": ("sendmsg", NOWHERE, 0, MSG_FASTOPEN),
    "send many": ("sendmmsg", NOWHERE, 0, 0, 0),
}
_ALWAYS_REFUSED: Final[dict[str, tuple[str, *tuple[int, ...]]]] = {
    "io_uring": ("io_uring_setup", 0, 0),
    "io_uring entry": ("io_uring_enter", NOWHERE, 0, 0, 0, 0),
    "tracing": ("ptrace", 0x4200, NOWHERE, 0, 0),
    "reading another process": ("process_vm_readv", NOWHERE, 0, 0, 0, 0, 0),
    "writing another process": ("process_vm_writev", NOWHERE, 0, 0, 0, 0, 0),
    "taking a descriptor": ("pidfd_getfd", NOWHERE, 0, 0),
    "keys": ("keyctl", NOWHERE, 0, 0, 0, 0),
    "another namespace": ("setns", NOWHERE, 0),
    "a mount": ("umount2", 0, NOWHERE),
}


def _refused(processor: Processor, call: str, arguments: list[int]) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    # each as wide as a register: ctypes would pass the lower half only
    result = libc.syscall(processor.numbers[call], *(ctypes.c_long(one) for one in arguments))
    return bool(result < 0 and ctypes.get_errno() == errno.EPERM)


def _channels_work() -> bool:
    """Return whether what the processes need among each other is left."""
    try:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return False
    with one, other:
        socket.send_fds(one, [b"x"], [other.fileno()])
        _, (passed,), _, _ = socket.recv_fds(other, 1, 1)
        os.close(passed)
    return True


def _install(filter_program: bytes, processor: Processor) -> None:
    """Give the filter to every thread of this process; raises LockdownFailed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0) != 0:
        raise LockdownFailed("the kernel refuses to give up privileges")
    described = _Program(len(filter_program) // INSTRUCTION.size, filter_program)
    for speculation in (SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0):  # a kernel that does not know the flag: EINVAL
        result = libc.syscall(
            ctypes.c_long(processor.numbers["seccomp"]),
            ctypes.c_long(SECCOMP_SET_MODE_FILTER),
            ctypes.c_long(SECCOMP_FILTER_FLAG_TSYNC | speculation),
            ctypes.byref(described),
        )
        if result >= 0 or ctypes.get_errno() != errno.EINVAL:
            break
    if result > 0:  # the id of a thread that could not follow
        raise LockdownFailed("a thread has a filter of its own")
    if result < 0:
        code = errno.errorcode.get(ctypes.get_errno(), "an unknown error")
        raise LockdownFailed(f"the kernel takes no filter: {code}")


def _strays(keep: Collection[int], loopback: bool) -> Iterator[str]:
    """Yield the family of every open socket that could reach outside and is not meant to."""
    for entry in Path("/proc/self/fd").iterdir():
        fd = int(entry.name)
        try:
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            continue  # the descriptor of this very listing
        if not is_socket or fd in keep:
            continue
        looked_at = socket.socket(fileno=fd)
        try:
            within = looked_at.family == socket.AF_UNIX or (loopback and _on_loopback(looked_at))
            if not within:
                yield socket.AddressFamily(looked_at.family).name
        finally:
            looked_at.detach()


def _on_loopback(connection: socket.socket) -> bool:
    """Return whether a socket is bound to the machine's own address, so that no other machine hears it."""
    if connection.family not in INTERNET or connection.type != socket.SOCK_STREAM:
        return False
    address: str = connection.getsockname()[0]
    return address.startswith("127.") or address == "::1"
