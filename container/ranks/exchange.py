"""Rounds in which every rank lays something down and reads what the others laid down.

Owns: the shared slots, the meeting at the end of a round, the check that all ranks do the same.
Must not know: tensors, what is summed, plans. No torch.
Invariant: nothing is read before every rank has written it, and no slot is written again before every rank
has read it: slots are doubled, and a rank that is in round n + 2 knows that all have finished reading round
n.

    word 16 * r: rounds that rank r has finished writing        each in its own cache line
    | words | even rounds: slot of rank 0 | rank 1 | ... | odd rounds: slot of rank 0 | rank 1 | ...
    slot:   | what u32 | kind u32 | rows u64 | columns u64 | - | payload |
"""

from __future__ import annotations

import os
import struct
import time
from typing import Final, NamedTuple

from container.ranks.memory import WORD_MASK, Memory, make

PAYLOAD_BYTES: Final = 1024 * 1024  # fits a core's cache; more goes in several rounds
LINE_WORDS: Final = 16
LINE_BYTES: Final = 64
HEAD: Final = struct.Struct("<IIQQ")
SLOT_BYTES: Final = LINE_BYTES + PAYLOAD_BYTES
SPIN_S: Final = 50e-6  # two ranks on two cores meet within this; sleeping and waking costs about as much
MAX_RANKS: Final = 64


class ExchangeBroken(RuntimeError):
    """A rank did not come to the meeting in time, or came with something else; this exchange is of no use."""


class What(NamedTuple):
    """What a rank does in a round. All ranks must say the same, but for the columns of a gather."""

    what: int  # which operation
    kind: int = 0  # of number: a dtype's place in the operation's own list
    rows: int = 0
    columns: int = 0


def area_bytes(ranks: int) -> int:
    """Return the size of the memory that `ranks` ranks need."""
    return ranks * LINE_BYTES + 2 * ranks * SLOT_BYTES


def create(ranks: int) -> int:
    """Return a descriptor of an exchange in which no round has been made."""
    return make("exchange", area_bytes(ranks))


class Exchange:
    """One rank's place in it.

    `wait_s` bounds the wait for the other ranks and may be changed between rounds.
    """

    def __init__(self, fd: int, rank: int, size: int, wait_s: float) -> None:
        assert 0 <= rank < size <= MAX_RANKS, "a rank has a number of its own"
        self.rank = rank
        self.size = size
        self.wait_s = wait_s
        self.memory = Memory(fd)
        self._round = self.memory.load(LINE_WORDS * rank)
        # With fewer cores than ranks, who spins keeps the core from whom it waits for.
        self._spin_s = SPIN_S if size <= len(os.sched_getaffinity(0)) else 0.0
        self._broken = False
        # The ranks whose coming must be seen, the next one first, so that not all look at the same word.
        self._others = [LINE_WORDS * ((rank + step) % size) for step in range(1, size)]

    @property
    def parity(self) -> int:
        """Which half of the slots the coming round uses: 0 or 1."""
        return self._round & 1

    def payload_at(self, parity: int, rank: int) -> int:
        """Return where the payload of a rank begins, in bytes from the start of the memory."""
        return self._slot_at(parity, rank) + LINE_BYTES

    def meet(self, what: What, *, columns_differ: bool = False) -> list[What]:
        """Publish this rank's payload of the coming round and wait for all; return what each rank said.

        The payloads of the round may be read until the next call. Raises ExchangeBroken, then and ever after.
        """
        if self._broken:
            raise ExchangeBroken("a rank was lost before")
        self._broken = True  # until it went well
        parity = self.parity
        memory = self.memory
        HEAD.pack_into(memory.bytes, self._slot_at(parity, self.rank), *what)
        self._round = (self._round + 1) & WORD_MASK
        own = LINE_WORDS * self.rank
        memory.store(own, self._round)
        memory.wake(own)
        deadline_s = time.monotonic() + self.wait_s
        for word in self._others:
            if not memory.wait_beyond(word, self._round, self._spin_s, deadline_s):
                lost = word // LINE_WORDS
                raise ExchangeBroken(f"rank {lost} did not answer within {self.wait_s:.1f} s")
        said = [
            What._make(HEAD.unpack_from(memory.bytes, self._slot_at(parity, rank)))
            for rank in range(self.size)
        ]
        kept = 3 if columns_differ else 4
        if any(one[:kept] != what[:kept] for one in said):
            raise ExchangeBroken("the ranks do not compute the same")
        self._broken = False
        return said

    def share(self, what: What, data: bytes) -> list[bytes]:
        """Return the `data` of every rank, all of the same length, PAYLOAD_BYTES at most."""
        assert len(data) <= PAYLOAD_BYTES, "what is shared fits one round"
        parity = self.parity
        at = self.payload_at(parity, self.rank)
        self.memory.bytes[at : at + len(data)] = data
        self.meet(what)
        places = [self.payload_at(parity, rank) for rank in range(self.size)]
        return [bytes(self.memory.bytes[place : place + len(data)]) for place in places]

    def close(self) -> None:
        """Unmap; views of the memory must be gone."""
        self.memory.close()

    def _slot_at(self, parity: int, rank: int) -> int:
        return self.size * LINE_BYTES + (parity * self.size + rank) * SLOT_BYTES
