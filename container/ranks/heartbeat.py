"""The shared page on which the engine says how it is, readable without asking it.

Owns: the page's layout, its writer and reader, and the verdict drawn from a snapshot.
Must not know: requests, sockets, HTTP. No torch.
Invariant: every field is one aligned 64-bit word, so a reader never sees half a number; a sequence word makes
a whole snapshot consistent, and a writer killed in mid-write costs that consistency only, until the next.

    | magic | sequence | field 0 | field 1 | ...          each u64, native order, offset 8 * index
              odd: a write is going on
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
import threading
import time
from dataclasses import dataclass, fields
from typing import Final

PAGE_BYTES: Final = 4096
MAGIC: Final = 0x5354524F4E470006  # "STRONG", version 6
READ_TRIES: Final = 20  # a write takes microseconds; then the answer matters more than its consistency
READ_PAUSE_S: Final = 0.0005  # lets a descheduled writer finish
_MAGIC_WORD, _SEQUENCE_WORD, _FIRST_FIELD = 0, 1, 2
_WORD_MASK: Final = (1 << 64) - 1


class EngineState(enum.IntEnum):
    """Where the engine is in its life."""

    STARTING = 0  # no engine process yet, or one that has not read its configuration
    LOADING = 1
    READY = 2  # a warm-up token has come out of the whole path
    DRAINING = 3
    FAILED = 4  # it said so itself before it exited; see StartFault
    STOPPED = 5  # drained and gone


class LoadPhase(enum.IntEnum):
    """What a loading engine is doing."""

    NONE = 0
    OPENING = 1  # configuration and files
    WEIGHTS = 2
    PROBE = 3  # comparison with the reference forward
    WARMUP = 4
    LOCKED = 5  # waiting for the key of a sealed model, which comes in a call


class StartFault(enum.IntEnum):
    """Closed list of the reasons an engine gives when it fails."""

    NONE = 0
    BAD_CONFIG = 1
    MODEL_NOT_FOUND = 2
    MODEL_REFUSED = 3  # unsupported, damaged, or failed the probe with compat off
    OUT_OF_MEMORY = 4
    WARMUP_FAILED = 5
    INTERNAL = 6
    RANK_LOST = 7  # one of the ranks that hold the model died, was stopped or did not answer
    LOCKDOWN = 8  # it was asked to lock itself, and that does not hold
    PACKAGE_REFUSED = 9  # not sealed, not from whom it should be, damaged, too old
    KEY_REFUSED = 10  # no key, another's key, or a licence that is over


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The page at one moment. Times are CLOCK_MONOTONIC nanoseconds; counters count since `pid` started."""

    state: int = 0
    pid: int = 0
    starts: int = 0  # engines started on this page, the present one included
    load_phase: int = 0
    fault: int = 0
    beat_ns: int = 0
    progress_ns: int = 0  # last step that moved a sequence on, or last moment without work
    steps: int = 0
    step_ns_sum: int = 0
    step_p99_ns: int = 0  # over the last steps
    running: int = 0  # sequences
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    connections: int = 0
    channel_faults: int = 0  # connections closed for a broken rule
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0  # guessed ahead and verified
    accepted_tokens: int = 0  # of those, found to be what is sampled
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    accepted: int = 0  # requests; always completed + failed + cancelled + in_flight
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    in_flight: int = 0
    failed_steps: int = 0
    full_s: int = 0  # there is no room; the seconds after which to try again, 0 while there is
    ranks: int = 0  # processes that hold the model together
    locked: int = 0  # of those, how many the kernel refuses every way out


_INDEX: Final = {f.name: _FIRST_FIELD + i for i, f in enumerate(fields(Snapshot))}


def make_page() -> int:
    """Return a new, zeroed page as a descriptor: anonymous memory that nobody can shrink under a reader."""
    fd = os.memfd_create("heartbeat", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, PAGE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with HeartbeatWriter(fd):
        return fd


def read_only(fd: int) -> int:
    """Return a second descriptor of the page that cannot write it; for handing to the front."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class HeartbeatWriter:
    """Writes fields; one writer at a time (the engine, or the supervisor while there is none)."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._words[_MAGIC_WORD] = MAGIC
        self._turn = threading.Lock()  # the watch over other ranks writes from a thread of its own

    def __enter__(self) -> HeartbeatWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, pid: int, now_ns: int) -> None:
        """Clear the page for a new engine, counting the start."""
        starts = self._words[_INDEX["starts"]] + 1
        cleared = dict.fromkeys(_INDEX, 0)
        self.write(**cleared | {"pid": pid, "starts": starts, "beat_ns": now_ns, "progress_ns": now_ns})

    def write(self, **values: int) -> None:
        """Set the named fields in one consistent step. Raises KeyError for a name that is no field."""
        with self._turn:
            self._put(values)

    def write_last(self, **values: int) -> None:
        """As write, and bar every later write of this process; for a thread that ends it at once."""
        self._turn.acquire()
        self._put(values)

    def _put(self, values: dict[str, int]) -> None:
        indexed = [(_INDEX[name], value & _WORD_MASK) for name, value in values.items()]
        words = self._words
        odd = words[_SEQUENCE_WORD] | 1  # it is odd already when the last writer died in mid-write
        words[_SEQUENCE_WORD] = odd
        for index, value in indexed:
            words[index] = value
        words[_SEQUENCE_WORD] = (odd + 1) & _WORD_MASK

    def close(self) -> None:
        self._words.release()
        self._map.close()


class HeartbeatReader:
    """Reads snapshots; any number of readers, in any process that holds the descriptor."""

    def __init__(self, fd: int) -> None:
        """Map the page read-only; raises ValueError when `fd` is not one."""
        self._map = mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ)
        self._words = memoryview(self._map).cast("Q")
        if self._words[_MAGIC_WORD] != MAGIC:
            self.close()
            raise ValueError("not a heartbeat page of this version")

    def read(self) -> Snapshot:
        """Return the page as it is now; consistent unless the writer died or stalled in mid-write.

        Takes microseconds, and READ_TRIES * READ_PAUSE_S at most.
        """
        words = self._words
        end = _FIRST_FIELD + len(_INDEX)
        for _ in range(READ_TRIES):
            before = words[_SEQUENCE_WORD]
            snapshot = words[_FIRST_FIELD:end].tolist()
            if before % 2 == 0 and words[_SEQUENCE_WORD] == before:
                break
            time.sleep(READ_PAUSE_S)
        return Snapshot(*snapshot)

    def close(self) -> None:
        self._words.release()
        self._map.close()


class Verdict(enum.StrEnum):
    """What /ping and the watchdog act on. Only READY is healthy; SILENT and STUCK call for a restart."""

    READY = "ready"
    STARTING = "starting"
    LOADING = "loading"
    DRAINING = "draining"
    FAILED = "failed"
    SILENT = "silent"  # no beat
    STUCK = "stuck"  # beats, has work, moves nothing


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Deadlines of security.md 8.2 rule 5."""

    idle_beat_s: float = 2.0  # an idle engine beats every 0.5 s
    step_s: float = 10.0  # floor of the deadline while work is queued
    step_p99_factor: float = 5.0
    first_step_s: float = 120.0
    load_silence_s: float = 600.0  # a loading engine reports phases, and a phase may take minutes


def health(page: Snapshot, now_ns: int, limits: HealthLimits | None = None) -> Verdict:
    """Return the verdict on `page` at `now_ns`; pure.

    Load alone never changes it: a long queue is READY as long as steps move sequences on.
    """
    limits = limits or HealthLimits()
    silence_s = max(0, now_ns - page.beat_ns) / 1e9
    if page.state in (EngineState.STARTING, EngineState.LOADING):
        if page.pid and silence_s > limits.load_silence_s:
            return Verdict.SILENT
        return Verdict.STARTING if page.state == EngineState.STARTING else Verdict.LOADING
    if page.state not in (EngineState.READY, EngineState.DRAINING):
        return Verdict.FAILED
    busy = page.running + page.waiting > 0
    deadline_s = step_deadline_s(page, limits)
    if silence_s > (deadline_s if busy else limits.idle_beat_s):
        return Verdict.SILENT
    if busy and max(0, now_ns - page.progress_ns) / 1e9 > deadline_s:
        return Verdict.STUCK
    return Verdict.READY if page.state == EngineState.READY else Verdict.DRAINING


def step_deadline_s(page: Snapshot, limits: HealthLimits) -> float:
    """Return how long one step may take before the engine counts as hung."""
    if page.steps == 0:
        return limits.first_step_s
    return max(limits.step_s, limits.step_p99_factor * page.step_p99_ns / 1e9)
