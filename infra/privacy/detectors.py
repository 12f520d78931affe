"""What an observation proves, and what it betrays: one detector per way out.

Owns: the detectors. Must not know: how anything is observed.
Invariant: a detector that saw nothing at all has found something: an observation that failed is no proof.
Each is shown to fail by a server that leaks on purpose (tests/infra/privacy).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from infra.image.checks.table import Findings, Table
from infra.image.container import Process
from infra.privacy.calling import Outcome
from infra.privacy.kernel import ROUND, Asked
from infra.privacy.network import OPENED, SENT, Packet
from infra.privacy.search import Found

MEMORY_SHARE: Final = 0.01  # of the canaries: the bar for what may be left in memory, which is no way out
QUIET: Final = ("tcp", "neighbour")  # answers to a client, and what a kernel says for itself
DETECTORS: Final = 11


@dataclass(frozen=True, slots=True)
class Observed:
    """One run of one subject, from before its first instruction to after its last."""

    outcomes: Sequence[Outcome] = field(repr=False)
    canaries: int
    counters: Mapping[str, int]
    packets: Mapping[Packet, int]  # its own; answers to its clients included
    packets_lost: int
    asked: Asked | None  # None: this kernel does not tell
    port: bool  # it listens on one, and not on a Unix socket
    lockdown: str | None  # as /ping says
    processes: tuple[Process, ...]
    log: Found
    log_bytes: int
    metrics: Found
    metrics_status: int
    answers: tuple[Found, ...]
    files: tuple[Found, ...]
    changes: tuple[str, ...]
    memory: tuple[Found, ...]  # of each process
    memory_after_s: float
    exit_code: int


TABLE: Final = Table[Observed]()


@TABLE.check(1, "every call ended as it should, and the server by itself")
def served(seen: Observed) -> Findings:
    wrong = [outcome for outcome in seen.outcomes if not outcome.as_expected]
    found = [f"`{one.call.kind}` was answered {one.status}" for one in wrong]
    found += ["no call was made"] * (not seen.outcomes)
    return found + [f"it ended with status {seen.exit_code}"] * (seen.exit_code != 0)


@TABLE.check(2, "no connection was opened, by the kernel's own counters")
def connections(seen: Observed) -> Findings:
    return _counted(seen, OPENED)


@TABLE.check(3, "no datagram and no echo request was sent, by the kernel's own counters")
def datagrams(seen: Observed) -> Findings:
    return _counted(seen, SENT)


@TABLE.check(4, "no packet left that began anything: no SYN, no datagram, no name look-up")
def packets(seen: Observed) -> Findings:
    begun = {packet: count for packet, count in seen.packets.items() if packet.kind not in QUIET}
    found = [f"{count} {one.kind} to {one.target} port {one.port}" for one, count in sorted_packets(begun)]
    return found + [f"{seen.packets_lost} packets were not seen"] * bool(seen.packets_lost)


@TABLE.check(5, "nobody tried: no call for a way out beyond the lockdown's own test, refused or not")
def attempts(seen: Observed) -> Findings:
    if seen.asked is None:
        return ["this kernel does not tell (tracefs with system calls is needed, and root)"]
    tried = seen.asked.attempts(port=seen.port)
    found = [f"{call}: {count}" for call, count in sorted(tried.items())]
    found += ["the lockdown's own test was not seen"] * (not seen.asked.refused.get(ROUND))
    return found + [f"{seen.asked.lost} events were lost"] * bool(seen.asked.lost)


@TABLE.check(6, "every process is locked, and says so")
def lockdown(seen: Observed) -> Findings:
    found = [f"/ping says `{seen.lockdown}`"] * (seen.lockdown != "on")
    for process in seen.processes:
        found += [f"process {process.pid} has no filter"] * (process.number("Seccomp") != 2)
        found += [f"process {process.pid} can gain rights"] * (process.number("NoNewPrivs") != 1)
    return found + ["no process was seen"] * (not seen.processes)


@TABLE.check(7, "no canary on stdout or stderr")
def log(seen: Observed) -> Findings:
    return _hits((seen.log,)) + ["it wrote no log at all"] * (not seen.log_bytes)


@TABLE.check(8, "no canary in the metrics")
def metrics(seen: Observed) -> Findings:
    status = seen.metrics_status
    return _hits((seen.metrics,)) + [f"/metrics was answered {status}"] * (status != 200)


@TABLE.check(9, "no canary in anybody else's answer, nor in an error of one's own")
def answers(seen: Observed) -> Findings:
    return _hits(seen.answers)


@TABLE.check(10, "no canary in any file, temporary files and shared memory included")
def files(seen: Observed) -> Findings:
    return _hits(seen.files)


@TABLE.check(11, "no file was changed, from the start to after the end")
def changes(seen: Observed) -> Findings:
    return list(seen.changes)


def canaries_left(seen: Observed) -> int:
    """Return how many canaries are in the memory of any process; one in another encoding counts as well."""
    numbers = frozenset[str]().union(*(one.numbers for one in seen.memory))
    return len(numbers) + sum(one.encoded for one in seen.memory)


def sorted_packets(packets: Mapping[Packet, int]) -> list[tuple[Packet, int]]:
    """Return packets in a fixed order."""
    return sorted(packets.items(), key=lambda pair: (pair[0].kind, pair[0].target, pair[0].port))


def _counted(seen: Observed, names: Sequence[str]) -> Findings:
    found = [f"{name} is {seen.counters[name]}" for name in names if seen.counters.get(name)]
    return found + [f"{name} was not read" for name in names if name not in seen.counters]


def _hits(places: Sequence[Found]) -> Findings:
    found = []
    for place in places:
        count = len(place.numbers)
        found += [f"{place.place}: {count} canaries, {place.encoded} encoded"] * bool(place)
    return found
