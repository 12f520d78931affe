"""One request as its sender in the front sees it: batches of deltas until every choice has ended.

Owns: the per-request queue, the count of open choices, the ways waiting can fail.
Must not know: sockets, framing, HTTP, text, torch, gevent (patching makes the standard queue cooperative).
Invariant: after `ended` nothing more arrives; an engine that goes away wakes every waiter with EngineGone.

    EngineError
    |- EngineGone     the connection ended; what was asked for is lost
    |- EngineBusy     the engine does not read fast enough; nothing was sent
    |- EngineSilent   it has not answered in time; it may still be loading
    `- DeltaTimeout   no delta within the time given; the request goes on
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

from container.ranks.messages import Delta


class EngineError(Exception):
    """Base of what a front must turn into 503, 429 or 504; carries no content."""


class EngineGone(EngineError):
    """The engine's end of the connection closed."""


class EngineBusy(EngineError):
    """Too many bytes wait to be sent."""


class EngineSilent(EngineError):
    """No welcome yet."""


class DeltaTimeout(EngineError):
    """Nothing arrived in time."""


class Submission:
    """Owned by one waiter; `cancel` may come from anywhere. As a context manager, leaving it cancels."""

    def __init__(self, request_id: int, choices: int, withdraw: Callable[[int, int | None], None]) -> None:
        self.id = request_id
        self._open = set(range(choices))
        self._withdraw = withdraw
        self._arrived: queue.SimpleQueue[list[Delta] | EngineGone | None] = queue.SimpleQueue()
        self._ended = False  # the waiter has taken the last batch, or cancelled

    def __repr__(self) -> str:
        return f"Submission(id={self.id}, open_choices={len(self._open)}, ended={self._ended})"

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def ended(self) -> bool:
        """True once the waiter has been given everything, or has cancelled."""
        return self._ended

    def next(self, wait_s: float | None = None) -> list[Delta]:
        """Return all deltas that have arrived, at least one, in order; [] once ended.

        Raises DeltaTimeout after `wait_s` seconds without any, and EngineGone.
        """
        if self._ended:
            return []
        try:
            batch = self._arrived.get(timeout=wait_s)
        except queue.Empty:
            raise DeltaTimeout from None
        deltas = list(self._take(batch))
        while not self._arrived.empty() and not self._ended:
            following = self._arrived.get()
            if isinstance(following, EngineGone):  # hand out what did arrive first
                self._arrived.put(following)
                break
            deltas += self._take(following)
        return deltas

    def batches(
        self, silence_s: float | None = None, deadline_s: float | None = None
    ) -> Iterator[list[Delta]]:
        """Yield batches until all choices have ended.

        `silence_s` bounds the wait for each, `deadline_s` (monotonic) the whole. Raises as `next` does.
        """
        while not self._ended:
            waits = [] if silence_s is None else [silence_s]
            if deadline_s is not None:
                waits.append(max(0.0, deadline_s - time.monotonic()))
            if batch := self.next(min(waits, default=None)):
                yield batch

    def cancel(self, choice: int | None = None) -> None:
        """Stop the request, or one choice of it; idempotent, never blocks.

        Without `choice` a waiter gets what has arrived, then []. With it the others go on: `next` ends once
        they have, and may still bring deltas of this one that were on their way.
        """
        if choice is None:
            if not self._ended:
                self._withdraw(self.id, None)
                self._arrived.put(None)
                self._ended = True
            return
        if choice not in self._open:
            return
        # Told before it is forgotten: the reader may end the other choices, and the request, at any time.
        if len(self._open) > 1:
            self._withdraw(self.id, choice)
        self._open.discard(choice)
        if not self._open:
            self._withdraw(self.id, None)
            self._arrived.put(None)

    def _take(self, batch: list[Delta] | EngineGone | None) -> list[Delta]:
        if isinstance(batch, EngineGone):
            self._ended = True
            raise batch
        if batch is None:
            self._ended = True
            return []
        return batch

    # Called by the connection's reader

    def deliver(self, batch: list[Delta]) -> bool:
        """Queue `batch` and return True when it ended the last open choice."""
        self._arrived.put(batch)
        for delta in batch:
            if delta.finish is not None or delta.error is not None:
                self._open.discard(delta.choice)
        if not self._open:
            self._arrived.put(None)
        return not self._open

    def lose(self) -> None:
        """Wake the waiter with EngineGone."""
        self._arrived.put(EngineGone("the engine's connection closed"))
