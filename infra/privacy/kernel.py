"""What the kernel was asked for by the processes of one tree: attempts that were refused are seen here, too.

Owns: a trace of its own in tracefs, what a line of it says, the arithmetic of the lockdown's self-test.
Must not know: containers, what is called. It sees every process of the machine and keeps only the tree's.
Invariant: events that were lost are counted as lost; the trace is gone when the context ends.

The lockdown proves itself by calls that must be refused, each with arguments that could do no harm. It makes
them all or none, so what is beyond whole rounds of them was an attempt of somebody else. A call that a filter
refuses never reaches its entry event, only its exit, with -EPERM (kernel/entry/common.c).
"""

from __future__ import annotations

import contextlib
import re
import socket
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

TRACEFS: Final = Path("/sys/kernel/tracing")
BUFFER_KIB: Final = 32 * 1024  # a processor: some hundred thousand events
# Calls that can begin something, with what the self-test makes of each in one round: refused, and, in the
# round before the filter is there, let through to the kernel. It alone asks for a pair that no kernel makes.
ROUND: Final = "socketpair"
REFUSED_A_ROUND: Final[Mapping[str, int]] = {
    "socket": 6,
    "connect": 1,
    "sendto": 3,
    "sendmsg": 1,
    "sendmmsg": 1,
}
MADE_A_ROUND: Final[Mapping[str, int]] = {"socket": 5, "connect": 1, "sendto": 2, "sendmmsg": 1}
# No send without an address, and of the pairs only those of the self-test.
MADE_FILTERS: Final = {"sendto": "addr != 0", ROUND: "protocol != 0"}
# A socket within the machine. The C library makes one for each look-up of a user's name, and its connect to a
# name service daemon (nscd(8)) is refused. Such a one could reach nobody outside; any other is an attempt.
WITHIN: Final = "socket within the machine"
WITHIN_A_ROUND: Final = 1
LINE: Final = re.compile(r"^ *(?P<comm>.*)-(?P<tid>\d+) +\[\d+\] \S+ +[\d.]+: (?P<said>.*)$")
FORK: Final = re.compile(r"sched_process_fork: comm=.* pid=(\d+) child_comm=.* child_pid=(\d+)$")
EXEC: Final = re.compile(r"sched_process_exec: filename=.* pid=(\d+) old_pid=\d+$")
MADE: Final = re.compile(r"sys_(\w+)\((?:family: (\w+))?")
ENDED: Final = re.compile(r"sys_(\w+) -> (0x[0-9a-f]+|-?\d+)$")
REFUSED: Final = (1 << 64) - 1  # -EPERM


@dataclass(frozen=True, slots=True)
class Asked:
    """What a tree of processes asked the kernel for; each name is a system call."""

    processes: int  # and threads
    made: Mapping[str, int] = field(default_factory=dict)  # got through to the kernel
    refused: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0

    def attempts(self, *, port: bool) -> dict[str, int]:
        """Return what is beyond whole rounds of the self-test: call -> how often, refused or made.

        The one socket that a server listens on is none: of the internet with `port`, else within the machine.
        """
        found: dict[str, int] = {}
        for title, seen, a_round in (
            ("refused", self.refused, REFUSED_A_ROUND),
            ("made", self.made, MADE_A_ROUND),
        ):
            for call, count in a_round.items():
                found[f"{call}, {title}"] = seen.get(call, 0) - count * seen.get(ROUND, 0)
        found["socket, made"] -= port
        connects = found.pop("connect, made") + found.pop("connect, refused")
        found["connect"] = connects - self.look_ups(port=port)
        return {call: count for call, count in found.items() if count}

    def look_ups(self, *, port: bool) -> int:
        """Return how often the C library looked for a name service daemon in the machine."""
        tested = WITHIN_A_ROUND * self.made.get(ROUND, 0)
        return self.made.get(WITHIN, 0) - tested - (not port)


def available() -> bool:
    """Return whether this kernel tells of system calls, and tells us."""
    try:
        return (TRACEFS / "events" / "syscalls" / "sys_exit_connect").is_dir()
    except OSError:
        return False


class Trace:
    """A recording of what every process asks for; a context. Needs root. Raises OSError."""

    def __init__(self) -> None:
        self._folder = TRACEFS / "instances" / f"strongroom-{uuid.uuid4().hex[:12]}"
        self._lines: list[str] = []
        self._lost = 0

    def __enter__(self) -> Self:
        self._folder.mkdir()
        try:
            self._write("buffer_size_kb", str(BUFFER_KIB))
            for call in (*REFUSED_A_ROUND, ROUND):
                self._write(f"events/syscalls/sys_exit_{call}/filter", "ret == -1")
                self._write(f"events/syscalls/sys_exit_{call}/enable", "1")
            for call in (*MADE_A_ROUND, ROUND):
                if call in MADE_FILTERS:
                    self._write(f"events/syscalls/sys_enter_{call}/filter", MADE_FILTERS[call])
                self._write(f"events/syscalls/sys_enter_{call}/enable", "1")
            for event in ("fork", "exec"):
                self._write(f"events/sched/sched_process_{event}/enable", "1")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def asked(self, first: int) -> Asked:
        """Return what process `first` and all that came of it asked for so far, from its last exec on."""
        self._write("tracing_on", "0")
        lines = (self._folder / "trace").read_text(errors="replace").splitlines()
        lost = sum(_overrun(path.read_text()) for path in self._folder.glob("per_cpu/cpu*/stats"))
        self._write("tracing_on", "1")
        return read(lines, first, lost)

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)


def read(lines: Iterable[str], first: int, lost: int = 0) -> Asked:
    """Return what the lines of a trace say of process `first` and its descendants."""
    tree = {first}
    made: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for line in lines:
        found = LINE.match(line)
        if found is None:
            continue
        tid, said = int(found["tid"]), found["said"]
        if fork := FORK.match(said):
            if int(fork[1]) in tree:
                tree.add(int(fork[2]))
        elif execed := EXEC.match(said):
            if int(execed[1]) == first:  # what the runtime did before the container's program began
                tree = {first}
                made.clear()
                refused.clear()
        elif tid not in tree:
            continue
        elif begun := MADE.match(said):
            within = begun[1] == "socket" and int(begun[2], 0) == socket.AF_UNIX
            made[WITHIN if within else begun[1]] += 1
        elif (ended := ENDED.match(said)) and int(ended[2], 0) % (1 << 64) == REFUSED:
            refused[ended[1]] += 1
    return Asked(len(tree), dict(made), dict(refused), lost)


def _overrun(stats: str) -> int:
    names = ("overrun", "commit overrun", "dropped events")
    rows = (line.partition(":") for line in stats.splitlines())
    return sum(int(value) for name, _, value in rows if name in names)
