"""The front's part of unlocking by invocation: two content types of `/invocations`.

Owns: the content types, what a client hears. Must not know: keys, the documents' form, how the engine waits.
Invariant: the front sees a key only as it was sealed to the engine; no reply holds anything but the engine's
description of itself or a word of our own.

    application/vnd.strongroom.describe+json   -> the container's description
    application/vnd.strongroom.unlock+json     -> the key is taken, or refused
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.health import Health
from sagemaker_entry.sealed.wire import Status, Verb, call

WAIT_S: Final = 5.0
RETRY_S: Final = 1
VERBS: Final = MappingProxyType(
    {
        "application/vnd.strongroom.describe+json": Verb.DESCRIBE,
        "application/vnd.strongroom.unlock+json": Verb.UNLOCK,
    }
)
UNLOCKED: Final = b'{"status":"unlocked"}'
_WORD: Final = re.compile(rb"[a-z-]{1,64}")


class Unlocking:
    """Asks the engine on a client's behalf while it waits for its key."""

    def __init__(self, door_fd: int, health: Health) -> None:
        self._door_fd = door_fd
        self._health = health

    def answer(self, verb: Verb, body: bytes) -> bytes:
        """Return the reply's body, JSON; raises ApiError."""
        if not self._health.locked():
            raise ApiError(Code.NOT_LOCKED)
        try:
            status, reply = call(self._door_fd, verb, body, WAIT_S)
        except (OSError, ValueError):
            raise ApiError(Code.LOCKED, retry_after_s=RETRY_S) from None
        if status is Status.REFUSED:
            reason = reply.decode() if _WORD.fullmatch(reply) else "unknown"
            raise ApiError(Code.UNLOCK_REFUSED, reason=reason)
        return reply if verb is Verb.DESCRIBE else UNLOCKED
