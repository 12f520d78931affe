"""Who used the CPU while something was measured: the measured process tree, or somebody else.

Owns: reading /proc, the tree of a process, its CPU time and memory. Must not know: engines, workloads.
Invariant: time is counted once: a process's own, plus that of its children it has already waited for.

    all CPUs  |== busy: ours ==|== busy: foreign ==|-- idle, waiting for disks --|
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
IDLE_FIELDS = (3, 4)  # of /proc/stat's `cpu` line: idle, iowait
COUNTED_FIELDS = 8  # user nice system idle iowait irq softirq steal; guests are part of user already


@dataclass(frozen=True, slots=True)
class CpuSample:
    """Clock ticks since boot: of all CPUs, of those busy, and of the measured tree."""

    total: int
    busy: int
    own: int


def sample(root: int, proc: Path = PROC) -> CpuSample:
    """Return the ticks so far, for the tree under process `root`."""
    return CpuSample(*machine_ticks((proc / "stat").read_text()), tree_ticks(tree(root, proc), proc))


def machine_ticks(stat: str) -> tuple[int, int]:
    """Return all and busy ticks from the text of /proc/stat. Stolen time is busy: somebody had the CPU."""
    first = stat.partition("\n")[0].split()
    if first[0] != "cpu":
        raise ValueError("`/proc/stat` does not begin with the sum of all CPUs")
    ticks = [int(word) for word in first[1 : 1 + COUNTED_FIELDS]]
    return sum(ticks), sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)


def foreign_share(before: CpuSample, after: CpuSample) -> float:
    """Return the share (0 to 1) of all CPU time between two samples that others used."""
    total = after.total - before.total
    if total <= 0:
        return 0.0
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, foreign / total)  # the two counters are read one after the other and round differently


def process_fields(pid: int, proc: Path = PROC) -> list[str] | None:
    """Return the fields of a process's `stat` after its name (state first), or None when it is gone."""
    try:
        text = (proc / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()  # a name may hold blanks and brackets


def tree(root: int, proc: Path = PROC) -> set[int]:
    """Return `root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (fields := process_fields(int(entry.name), proc)):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = set(), [root]
    while left:
        pid = left.pop()
        found.add(pid)
        left += [child for child in children.get(pid, ()) if child not in found]
    return found


def tree_ticks(pids: Iterable[int], proc: Path = PROC) -> int:
    """Return user and system ticks of these processes and of children they have waited for."""
    each = (process_fields(pid, proc) for pid in pids)
    return sum(int(word) for fields in each if fields for word in fields[11:15])


def run_s(pids: Iterable[int], proc: Path = PROC) -> float:
    """Return the seconds that the living threads of these processes ran, to the nanosecond.

    `tree_ticks` counts in hundredths of a second, too coarse for a process that does nothing.
    """
    total_ns = 0
    for pid in pids:
        for task in (proc / str(pid) / "task").glob("*/schedstat"):
            try:
                total_ns += int(task.read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    return total_ns / 1e9


def memory_mib(roots: Iterable[int], proc: Path = PROC) -> dict[str, float]:
    """Return the memory of the trees under `roots`.

    `peak_rss_mib`: VmHWM, the highest resident size of each process since its start, added up; pages that
    processes share count for each of them. `pss_mib`: the present size with shared pages divided among who
    holds them, or absent where the kernel does not let us read it.
    """
    pids = set[int]().union(*(tree(root, proc) for root in roots))
    peak = pss = 0
    readable = True
    for pid in pids:
        peak += _kib(proc / str(pid) / "status", "VmHWM:") or 0
        part = _kib(proc / str(pid) / "smaps_rollup", "Pss:")
        readable = readable and part is not None
        pss += part or 0
    made = {"peak_rss_mib": round(peak / 1024, 1)}
    return made | ({"pss_mib": round(pss / 1024, 1)} if readable and pids else {})


def _kib(path: Path, name: str) -> int | None:
    """Return the KiB in the line of `path` that begins with `name`; 0 without one, None where forbidden."""
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def available_mib(proc: Path = PROC) -> float:
    """Return the memory that can be taken without swapping."""
    return (_kib(proc / "meminfo", "MemAvailable:") or 0) / 1024


def me() -> int:
    """Return the root of the measured tree: this process, whose descendants all engines are."""
    return os.getpid()
