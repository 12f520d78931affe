"""The lockdown's rules and the BPF program made of them: which system calls the kernel refuses from then on.

Owns: the refused calls with their numbers on both processors, the conditions on arguments, the assembler.
Must not know: how a program is installed (lockdown), processes. Computes only.
Invariant: every path through a program ends in one of three verdicts; a processor other than the one the
program was made for never reaches a rule. All jumps go forward, as the kernel demands.

    seccomp_data:  | number u32 | architecture u32 | instruction u64 | argument 0 u64 | ... | argument 5 u64 |
                   0            4                  8                 16                     56

A filter sees numbers, never memory: the address that connect(2) is given lies behind a pointer, so connect is
refused whole, AF_UNIX included; so is sendto with any address. sendmsg keeps its address in memory and cannot
be judged: what it could reach is closed by refusing every socket it would need. The one way round that, TCP
fast open, which connects by sending, is a flag and refused by it.
Numbers: Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

ALLOW: Final = 0x7FFF0000  # SECCOMP_RET_ALLOW
REFUSE: Final = 0x00050001  # SECCOMP_RET_ERRNO with EPERM
KILL: Final = 0x80000000  # SECCOMP_RET_KILL_PROCESS
X32_BIT: Final = 0x40000000  # the second table of numbers on x86_64
AF_UNIX: Final = 1
SOCK_STREAM: Final = 1
SOCK_SEQPACKET: Final = 5
SOCK_TYPE_MASK: Final = 0xF  # the rest are flags
MSG_FASTOPEN: Final = 0x20000000
INSTRUCTION: Final = struct.Struct("<HBBI")  # struct sock_filter: code, jump if true, jump if not, constant

_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


class Scope(enum.Enum):
    """How much a process gives up."""

    FULL = "full"
    KEEPS_SOCKETS = "keeps sockets"  # of a parent whose children still have to connect to each other


@dataclass(frozen=True, slots=True)
class Processor:
    """One instruction set: its name for the audit system, its numbers of the calls named here."""

    audit: int
    numbers: dict[str, int]
    has_x32: bool = False


# Reading or steering other processes, and ways round a filter. Refused in every scope.
REFUSED_ALWAYS: Final = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "perf_event_open"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),  # its calls pass no filter
    *("bpf", "userfaultfd"),
    *("add_key", "request_key", "keyctl"),  # a key request makes the kernel ask a helper, which asks DNS
    *("unshare", "setns"),
    *("mount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
)
REFUSED_SOCKETS: Final = ("connect", "sendmmsg")
JUDGED: Final = ("socket", "socketpair", "sendto", "sendmsg")  # by their arguments

_SAME: Final = {  # calls added since both processors share a table
    **dict(zip(("io_uring_setup", "io_uring_enter", "io_uring_register"), range(425, 428), strict=True)),
    **dict(zip(("open_tree", "move_mount", "fsopen", "fsconfig", "fsmount"), range(428, 433), strict=True)),
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
}
PROCESSORS: Final = {
    "x86_64": Processor(
        0xC000003E,
        _SAME
        | {"socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "socketpair": 53, "sendmmsg": 307}
        | {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "perf_event_open": 298}
        | {"bpf": 321, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250}
        | {"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155}
        | {"init_module": 175, "finit_module": 313, "delete_module": 176}
        | {"kexec_load": 246, "kexec_file_load": 320, "seccomp": 317},
        has_x32=True,
    ),
    "aarch64": Processor(
        0xC00000B7,
        _SAME
        | {"socket": 198, "connect": 203, "sendto": 206, "sendmsg": 211, "socketpair": 199, "sendmmsg": 269}
        | {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "perf_event_open": 241}
        | {"bpf": 280, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219}
        | {"unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41}
        | {"init_module": 105, "finit_module": 273, "delete_module": 106}
        | {"kexec_load": 104, "kexec_file_load": 294, "seccomp": 277},
    ),
}


@dataclass(frozen=True, slots=True)
class _Step:
    """One instruction whose jumps name labels; None: go on with the next."""

    code: int
    constant: int
    then: str | None = None
    otherwise: str | None = None
    label: str | None = None


def program(processor: Processor, scope: Scope) -> bytes:
    """Return the filter as an array of struct sock_filter."""
    return _assemble([*_steps(processor, scope)])


def _steps(processor: Processor, scope: Scope) -> Iterator[_Step]:
    yield _Step(_LOAD, _ARCHITECTURE_AT)
    yield _Step(_JUMP_EQUAL, processor.audit, otherwise="kill")
    yield _Step(_LOAD, _NUMBER_AT)
    if processor.has_x32:
        yield _Step(_JUMP_ABOVE, X32_BIT, then="refuse")
    sockets = scope is Scope.FULL
    for name in (*REFUSED_ALWAYS, *(REFUSED_SOCKETS if sockets else ())):
        yield _Step(_JUMP_EQUAL, processor.numbers[name], then="refuse")
    if sockets:
        for name in JUDGED:
            yield _Step(_JUMP_EQUAL, processor.numbers[name], then=name)
    yield _Step(_RETURN, ALLOW)
    if sockets:
        yield from _judgements()
    yield _Step(_RETURN, ALLOW, label="allow")
    yield _Step(_RETURN, REFUSE, label="refuse")
    yield _Step(_RETURN, KILL, label="kill")


def _judgements() -> Iterator[_Step]:
    """What decides over the calls that are judged by their arguments."""
    for name in ("socket", "socketpair"):
        # AF_UNIX, and connection-oriented: a datagram socket sends to any name without connecting
        yield _Step(_LOAD, _low(0), label=name)
        yield _Step(_JUMP_EQUAL, AF_UNIX, otherwise="refuse")
        yield _Step(_LOAD, _low(1))
        yield _Step(_AND, SOCK_TYPE_MASK)
        yield _Step(_JUMP_EQUAL, SOCK_STREAM, then="allow")
        yield _Step(_JUMP_EQUAL, SOCK_SEQPACKET, then="allow", otherwise="refuse")
    # send(2) is sendto without an address; both halves of the pointer must be zero
    yield _Step(_LOAD, _low(4), label="sendto")
    yield _Step(_JUMP_EQUAL, 0, otherwise="refuse")
    yield _Step(_LOAD, _high(4))
    yield _Step(_JUMP_EQUAL, 0, otherwise="refuse")
    yield _Step(_LOAD, _low(3))
    yield _Step(_JUMP_ANY_BIT, MSG_FASTOPEN, then="refuse", otherwise="allow")
    yield _Step(_LOAD, _low(2), label="sendmsg")
    yield _Step(_JUMP_ANY_BIT, MSG_FASTOPEN, then="refuse", otherwise="allow")


def _low(argument: int) -> int:
    return _ARGUMENTS_AT + 8 * argument  # both processors are little-endian


def _high(argument: int) -> int:
    return _low(argument) + 4


def _assemble(steps: Sequence[_Step]) -> bytes:
    places = {step.label: place for place, step in enumerate(steps) if step.label is not None}

    def distance(place: int, label: str | None) -> int:
        return 0 if label is None else places[label] - place - 1

    return b"".join(
        INSTRUCTION.pack(
            step.code, distance(place, step.then), distance(place, step.otherwise), step.constant
        )
        for place, step in enumerate(steps)
    )
