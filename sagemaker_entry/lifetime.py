"""How long anyone waits for an answer: until the client leaves, the drain ends, or the answer is there.

Owns: the lifetime of one exchange and the watch on its client's socket.
Must not know: HTTP, generation. Waiters register a callback; nothing is thrown into another greenlet.
Invariant: a lifetime ends at most once, and whoever registers after the end is called at once.
"""

from __future__ import annotations

import enum
import select
from collections.abc import Callable

import gevent
from gevent.monkey import get_original

from sagemaker_entry import log

WATCH_INTERVAL_S = 0.05  # half of the 100 ms in which a disconnect must reach the engine


class End(enum.StrEnum):
    """Why nobody waits any more."""

    CLIENT_LEFT = "client_left"
    DRAINING = "draining"


class Lifetime:
    """One exchange's. `reason` is None while somebody waits for the answer."""

    def __init__(self) -> None:
        self.reason: End | None = None
        self._callback: Callable[[], None] | None = None

    def end(self, reason: End) -> None:
        """End it; the first reason stays."""
        if self.reason is not None:
            return
        self.reason = reason
        if self._callback is not None:
            self._callback()

    def on_end(self, callback: Callable[[], None] | None) -> None:
        """Set what to call at the end, or None; called now if the end has come."""
        self._callback = callback
        if callback is not None and self.reason is not None:
            callback()


class ClientWatch:
    """Looks at the sockets of all running exchanges of this worker and ends those whose client is gone.

    A readable socket alone says nothing: the next pipelined request may hide the end of the connection. The
    kernel's hang-up flag does not have that problem, and one poll(2) over 128 sockets costs microseconds.
    """

    def __init__(self) -> None:
        self._poll = get_original("select", "poll")()
        self._lifetimes: dict[int, Lifetime] = {}
        self._greenlet: gevent.Greenlet | None = None

    def add(self, fd: int, lifetime: Lifetime) -> None:
        """Watch `fd` until `remove`."""
        self._lifetimes[fd] = lifetime
        self._poll.register(fd, select.POLLRDHUP)  # POLLHUP and POLLERR are always reported
        if not self._greenlet:  # none yet, or it has ended
            self._greenlet = gevent.spawn(self._run)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; before it is closed."""
        if self._lifetimes.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _run(self) -> None:
        while self._lifetimes:
            for fd, _ in self._poll.poll(0):
                lifetime = self._lifetimes.get(fd)
                if lifetime is None:
                    continue  # removed while an earlier one of this round was ended
                self.remove(fd)
                self._end(lifetime)
            gevent.sleep(WATCH_INTERVAL_S)

    @staticmethod
    def _end(lifetime: Lifetime) -> None:
        try:
            lifetime.end(End.CLIENT_LEFT)
        except Exception:  # noqa: BLE001  the watch over all other clients must go on
            log.write("error", "end_failed", kind=log.exception_name())
