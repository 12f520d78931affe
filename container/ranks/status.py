"""What each rank says of itself while it starts and when it fails: a few words that rank 0 reads.

Owns: the words' layout. Must not know: who reads them, models. No torch.
Invariant: a rank writes its own words only; a word is never half written; a fault is there after its cause.

    word 256 * r: signs of progress   + 1: stage   + 2: fault   + 3: bytes of the cause
    from word 256 * r + 4 on: the cause, UTF-8
"""

from __future__ import annotations

import enum
from typing import Final

from container.ranks.heartbeat import StartFault
from container.ranks.memory import Memory, make

LINE_WORDS: Final = 256
LINE_BYTES: Final = 1024
PROGRESS, STAGE, FAULT, CAUSE_BYTES = 0, 1, 2, 3
HEAD_BYTES: Final = 16
MAX_CAUSE_BYTES: Final = LINE_BYTES - HEAD_BYTES  # our own sentences have 200 at most


class Stage(enum.IntEnum):
    """How far a rank has come."""

    STARTING = 0
    LOADING = 1
    READY = 2  # loaded; it waits for plans


def create(ranks: int) -> int:
    """Return a descriptor of the words of `ranks` ranks."""
    return make("ranks", ranks * LINE_BYTES)


class RankStatus:
    """The words of all ranks, as one of them or a reader sees them."""

    def __init__(self, fd: int) -> None:
        self._memory = Memory(fd)

    def progress(self, rank: int, stage: Stage) -> None:
        """Say that rank `rank` is at `stage` and moves."""
        word = LINE_WORDS * rank
        self._memory.store(word + STAGE, stage)
        self._memory.store(word + PROGRESS, self._memory.load(word + PROGRESS) + 1)

    def fail(self, rank: int, fault: StartFault, cause: str = "") -> None:
        """Say why rank `rank` is about to end; the end of a long cause is left out."""
        words = cause.encode()[:MAX_CAUSE_BYTES]
        start = LINE_BYTES * rank + HEAD_BYTES
        self._memory.bytes[start : start + len(words)] = words
        self._memory.store(LINE_WORDS * rank + CAUSE_BYTES, len(words))
        self._memory.store(LINE_WORDS * rank + FAULT, fault)

    def stage(self, rank: int) -> Stage:
        return Stage(self._memory.load(LINE_WORDS * rank + STAGE))

    def signs(self, ranks: int) -> tuple[int, ...]:
        """Return a number per rank that changes whenever the rank moves on."""
        return tuple(self._memory.load(LINE_WORDS * rank + PROGRESS) for rank in range(ranks))

    def fault(self, rank: int) -> StartFault:
        """Return what the rank said it failed of; NONE when it said nothing."""
        return StartFault(self._memory.load(LINE_WORDS * rank + FAULT))

    def cause(self, rank: int) -> str:
        """Return the words that the rank gave with its fault; "" when it gave none."""
        start = LINE_BYTES * rank + HEAD_BYTES
        length = min(self._memory.load(LINE_WORDS * rank + CAUSE_BYTES), MAX_CAUSE_BYTES)
        return bytes(self._memory.bytes[start : start + length]).decode(errors="replace")

    def close(self) -> None:
        self._memory.close()
