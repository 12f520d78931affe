"""How rank 0's commands reach the followers: a ring of slots in memory that all of them share.

Owns: the ring's layout, its one writer and its readers, waiting for space and for messages.
Must not know: what a message says, who the readers are beyond their number.
Invariant: every reader gets every message once, whole and in order; a message is seen only after its last
byte was written, so a writer that dies in the middle leaves nothing behind that a reader would act on.

    word 0: slots written     word 16 * (1 + r): slots that reader r has taken      each in its own cache line
    | words | slot 0 | slot 1 | ...        slot: | sequence u32 | bytes u32 | more u32 | - | payload |
"""

from __future__ import annotations

import struct
import time
from typing import Final

from container.ranks.memory import WORD_MASK, Memory, make

SLOT_BYTES: Final = 16 * 1024  # a step of two thousand tokens; longer plans take several slots
SLOTS: Final = 64
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024  # a plan of sixteen million tokens: nobody makes one
LINE_WORDS: Final = 16  # 64 bytes: a reader's counter does not share a cache line with another's
LINE_BYTES: Final = 64
SLOT_HEAD: Final = struct.Struct("<IIII")
PAYLOAD_BYTES: Final = SLOT_BYTES - SLOT_HEAD.size
SPIN_S: Final = 0.0  # commands come per step; the reader's wake-up hides behind rank 0's own start of it


class RingBroken(RuntimeError):
    """A reader does not take its messages, or a slot does not hold what it must; the ring is of no use."""


def create(readers: int) -> int:
    """Return a descriptor of an empty ring for `readers` readers."""
    return make("ring", (1 + readers) * LINE_BYTES + SLOTS * SLOT_BYTES)


class RingWriter:
    """The writing end; one per ring."""

    def __init__(self, fd: int, readers: int, wait_s: float) -> None:
        """`wait_s` bounds how long `send` waits for the slowest reader."""
        self._memory = Memory(fd)
        self._readers = readers
        self._written = self._memory.load(0)
        self.wait_s = wait_s

    def send(self, message: bytes) -> None:
        """Write one message of 1 to MAX_MESSAGE_BYTES bytes; raises ValueError, and RingBroken when a reader
        keeps it from being written for `wait_s`.
        """
        if not 0 < len(message) <= MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes is not in 1..{MAX_MESSAGE_BYTES}")
        deadline_s = time.monotonic() + self.wait_s
        view = memoryview(message)
        for first in range(0, len(view), PAYLOAD_BYTES):
            part = view[first : first + PAYLOAD_BYTES]
            self._put(part, first + len(part) < len(view), deadline_s)

    def _put(self, part: memoryview, more: bool, deadline_s: float) -> None:
        oldest = self._written + 1 - SLOTS  # what every reader must have taken before its slot is used again
        for reader in range(self._readers):
            word = LINE_WORDS * (1 + reader)
            if not self._memory.wait_beyond(word, oldest, SPIN_S, deadline_s):
                raise RingBroken("a rank takes no more plans")
        at = _slot_at(self._readers, self._written)
        self._written = (self._written + 1) & WORD_MASK
        body = at + SLOT_HEAD.size
        self._memory.bytes[body : body + len(part)] = part
        SLOT_HEAD.pack_into(self._memory.bytes, at, self._written, len(part), more, 0)
        self._memory.store(0, self._written)
        self._memory.wake(0)

    def close(self) -> None:
        self._memory.close()


class RingReader:
    """One reading end."""

    def __init__(self, fd: int, readers: int, reader: int) -> None:
        """Be reader number `reader` of `readers`."""
        assert 0 <= reader < readers, "a reader has a number of its own"
        self._memory = Memory(fd)
        self._readers = readers
        self._word = LINE_WORDS * (1 + reader)
        self._taken = self._memory.load(self._word)

    def receive(self, wait_s: float | None = None) -> bytes:
        """Return the next message; raises RingBroken for a slot out of order, or after `wait_s` without
        one.
        """
        deadline_s = None if wait_s is None else time.monotonic() + wait_s
        parts: list[bytes] = []
        more = True
        while more:
            part, more = self._take(deadline_s)
            parts.append(part)
            if len(parts) * PAYLOAD_BYTES > MAX_MESSAGE_BYTES + PAYLOAD_BYTES:
                raise RingBroken("a message has no end")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, deadline_s: float | None) -> tuple[bytes, bool]:
        wanted = (self._taken + 1) & WORD_MASK
        if not self._memory.wait_beyond(0, wanted, SPIN_S, deadline_s):
            raise RingBroken("no plan came")
        at = _slot_at(self._readers, self._taken)
        sequence, size, more, _ = SLOT_HEAD.unpack_from(self._memory.bytes, at)
        if sequence != wanted or not 0 < size <= PAYLOAD_BYTES:
            raise RingBroken("a slot does not hold the next plan")
        body = at + SLOT_HEAD.size
        part = bytes(self._memory.bytes[body : body + size])
        self._taken = wanted
        self._memory.store(self._word, wanted)
        self._memory.wake(self._word)
        return part, bool(more)

    def close(self) -> None:
        self._memory.close()


def _slot_at(readers: int, number: int) -> int:
    """Return where slot `number` begins; SLOTS divides 2**32, so wrapping changes nothing."""
    return (1 + readers) * LINE_BYTES + number % SLOTS * SLOT_BYTES
