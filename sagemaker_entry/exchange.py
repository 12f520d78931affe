"""One request and its reply, as connection and application both see it.

Owns: the facts both sides add while the exchange runs: route, dialect, counts, ids.
Must not know: sockets, Flask, generation.
Invariant: nothing in it is content; all of it may be logged, except `client_id` and `public_id`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sagemaker_entry.body import BodyReader
from sagemaker_entry.lifetime import Lifetime

ENVIRON_KEY: Final = "strongroom.exchange"

_BOOT_KEY = os.urandom(32)  # differs per process: hashes of client ids cannot be compared across restarts
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class StreamBroken(Exception):
    """The reply must end without its last chunk: the error event is already written."""


class ClientLeft(Exception):
    """Nobody reads the reply; there is nothing to write."""


@dataclass(slots=True)
class Counts:
    """What the log line and the metrics tell of a generation."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None

    def add(self, part: Counts) -> None:
        """Count what a part of the request took."""
        self.prompt_tokens += part.prompt_tokens
        self.cached_tokens += part.cached_tokens
        self.completion_tokens += part.completion_tokens


@dataclass(slots=True, eq=False)
class Exchange:
    """Facts of one exchange. `draining` asks the worker, at any time."""

    method: str
    body: BodyReader = field(repr=False)
    lifetime: Lifetime = field(repr=False)
    draining: Callable[[], bool] = field(repr=False)
    client_id: str | None = field(default=None, repr=False)
    forwarded_stream: bool = False  # the platform says that its caller asked for a stream
    id: str = field(default_factory=lambda: os.urandom(12).hex())
    started_s: float = field(default_factory=time.monotonic)
    route: str = "other"
    error_code: str | None = None
    counts: Counts = field(default_factory=Counts)

    def part(self, lifetime: Lifetime) -> Exchange:
        """Return the exchange of one line of this one's body, with a deadline and counts of its own."""
        inner = Exchange(self.method, self.body, lifetime, self.draining, client_id=self.client_id)
        inner.id, inner.route = self.id, self.route
        return inner

    @property
    def public_id(self) -> str:
        """The id shown to the client: its own when it is harmless, else ours."""
        if self.client_id is not None and _SAFE_ID.fullmatch(self.client_id):
            return self.client_id
        return self.id

    @property
    def hashed_client_id(self) -> str | None:
        """The client's id as the log may hold it."""
        if self.client_id is None:
            return None
        return hmac.new(_BOOT_KEY, self.client_id.encode(), hashlib.sha256).hexdigest()[:16]
