"""What was asked and how it ended, without a byte of what was said.

Owns: the last requests as sizes, header names and codes. Must not know: bodies, header values, paths as sent.
Invariant: an entry's texts come from our own tables or from the registry, header names are letters, digits
and hyphens; the journal holds at most ENTRIES of them.
"""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

ENTRIES: Final = 1000


@dataclass(slots=True)
class Entry:
    """One request. Names are None unless the registry knows them; times are in seconds."""

    route: str = "unknown"
    endpoint: str | None = None
    component: str | None = None
    status: int | None = None  # None: the client left before an answer
    container_status: int | None = None
    outcome: str = "open"
    request_headers: list[str] = field(default_factory=list)
    request_bytes: int = 0
    response_bytes: int = 0  # of the container's body, before framing
    parts: int = 0
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    duration_s: float = 0.0


class Journal:
    """The last ENTRIES finished requests, oldest first; safe to use from any thread."""

    def __init__(self) -> None:
        self._entries: collections.deque[tuple[int, Entry]] = collections.deque(maxlen=ENTRIES)
        self._lock = threading.Lock()
        self._count = 0

    def add(self, entry: Entry) -> None:
        """Keep `entry`; nobody may change it afterwards."""
        with self._lock:
            self._count += 1
            self._entries.append((self._count, entry))

    @property
    def count(self) -> int:
        """Return how many requests have ended since the start."""
        with self._lock:
            return self._count

    def rows(self) -> list[dict[str, Any]]:
        """Return the entries as plain objects with their `number`."""
        with self._lock:
            entries = list(self._entries)
        return [{"number": number, **asdict(entry)} for number, entry in entries]
