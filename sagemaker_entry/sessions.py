"""Stateful sessions: which ids are open, shared by every worker of the front.

Owns: the table, ids, expiry, the bound. Must not know: HTTP, prompts, the prefix cache.
Invariant: a slot holds an id's digest and a time, nothing else, and only in memory; a session is open from
    its creation until it is closed or expires, for every worker alike. Each region has one writer of new
    sessions; closing only writes a zero.

    | region 0: unused | region 1: worker 1 | ...     each SLOTS times | expires, float64 | digest, 24 bytes |

The table dies with the front: after a restart of it every session is unknown, as if it had expired.

A session is a promise of the platform to come back to this container, where the prefix cache still knows the
conversation's beginning. It is never the only copy of a conversation: clients send theirs whole.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable
from typing import Final

from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import MAX_WORKERS

SLOTS: Final = 4096  # per worker, and the most sessions that can be asked for
SLOT_BYTES: Final = 32
PAGE_BYTES: Final = (MAX_WORKERS + 1) * SLOTS * SLOT_BYTES
DIGEST_BYTES: Final = 24
# An expired slot is not used again at once: a worker that is closing it may just have looked at it.
REST_S: Final = 10.0
RETRY_AFTER_S: Final = 5

_ID: Final = re.compile(r"([0-9a-f]{2})([0-9a-f]{4})-[0-9a-f]{32}")


def create() -> mmap.mmap:
    """Return an empty table in memory that processes forked from this one share; it has no file."""
    return mmap.mmap(-1, PAGE_BYTES)


class Sessions:
    """The table as one worker sees it; `region` is the worker's own."""

    def __init__(
        self,
        page: mmap.mmap,
        region: int,
        limit: int,
        life_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bytes = memoryview(page)
        self._times = self._bytes.cast("d")
        self._region = region
        self._limit = limit
        self._life_s = life_s
        self._clock = clock
        self._next = 0

    def open(self) -> tuple[str, str]:
        """Return a new session's id, and the id with its expiry as the platform reads it.

        Raises ApiError SESSIONS_FULL when as many as allowed are open.
        """
        now_s = self._clock()
        if self._count(now_s) >= self._limit:
            raise ApiError(Code.SESSIONS_FULL, retry_after_s=RETRY_AFTER_S)
        slot = self._free(now_s)
        session = f"{self._region:02x}{slot:04x}-{os.urandom(16).hex()}"
        expires_s = now_s + self._life_s
        at = (self._region * SLOTS + slot) * SLOT_BYTES
        self._bytes[at + 8 : at + SLOT_BYTES] = _digest(session)
        self._times[at // 8] = expires_s  # last: from here on it is open
        shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires_s))
        return session, f"{session}; Expires={shown}"

    def check(self, session: str) -> None:
        """Raise ApiError SESSION_NOT_FOUND unless `session` is open."""
        self._find(session, Code.SESSION_NOT_FOUND)

    def close(self, session: str) -> None:
        """Close `session`; raises ApiError SESSION_NOT_CLOSED when it is not open."""
        self._times[self._find(session, Code.SESSION_NOT_CLOSED) // 8] = 0.0

    def _find(self, session: str, otherwise: Code) -> int:
        match = _ID.fullmatch(session)
        region, slot = (int(match[1], 16), int(match[2], 16)) if match else (0, SLOTS)
        if region > MAX_WORKERS or slot >= SLOTS:
            raise ApiError(otherwise)
        at = (region * SLOTS + slot) * SLOT_BYTES
        known = bytes(self._bytes[at + 8 : at + SLOT_BYTES]) == _digest(session)
        if not known or self._times[at // 8] <= self._clock():
            raise ApiError(otherwise)
        return at

    def _count(self, now_s: float) -> int:
        return sum(expires_s > now_s for expires_s in self._times[:: SLOT_BYTES // 8])

    def _free(self, now_s: float) -> int:
        for step in range(SLOTS):
            slot = (self._next + step) % SLOTS
            expires_s = self._times[(self._region * SLOTS + slot) * SLOT_BYTES // 8]
            if expires_s < now_s - REST_S:
                self._next = (slot + 1) % SLOTS
                return slot
        raise ApiError(Code.SESSIONS_FULL, retry_after_s=RETRY_AFTER_S)


def _digest(session: str) -> bytes:
    return hashlib.sha256(session.encode()).digest()[:DIGEST_BYTES]
