"""Child processes that render templates: started, fed, timed, killed and replaced.

Owns: the pool, the deadlines.
Must not know: what a template or a message is; a reply is text with ranges, or a word.
Invariant: a call ends within its deadline whatever the child does; a child that missed it is dead and reaped.

Only `socket` and `threading` block here, so a process patched by gevent waits without stopping its other
requests.
"""

from __future__ import annotations

import signal
import threading
from typing import Any, Final

from container.text import frames
from container.text.child import Child, exchange
from container.text.errors import TextCode, TextError

START_S: Final = 20.0  # interpreter, jinja2 and compilation on a busy machine
RENDER_S: Final = 3.0  # wall clock; the child's own CPU limit is 1 s
CHILDREN: Final = 2  # one stuck render must not hold up the rest


class _Child(Child):
    """One sandbox process and our end of its socket."""

    def __init__(self, setup: bytes) -> None:
        """Raises TextError when it does not come up or refuses the setup."""
        super().__init__("container.text.sandbox")
        if "error" in self.exchange(setup, START_S):
            self.end()
            raise TextError(TextCode.TEMPLATE_FAILED)

    def exchange(self, request: bytes, wait_s: float) -> dict[str, Any]:
        """Return the reply to one frame; when TextError is raised the child is gone."""
        reply = None
        code = TextCode.TEMPLATE_FAILED
        try:
            reply = exchange(self.socket, request, wait_s)
        except TimeoutError:
            code = TextCode.TEMPLATE_TIMEOUT
        except (OSError, ValueError):
            code = TextCode.TEMPLATE_FAILED
        finally:  # also when the waiting request itself was cancelled: the reply would be the next one's
            if reply is None and self.end() == signal.SIGXCPU:
                code = TextCode.TEMPLATE_TIMEOUT
        if reply is None:
            raise TextError(code)
        return reply


class Renderer:
    """A small pool of sandbox processes that share one setup. Safe to call from many threads."""

    def __init__(self, setup: bytes, *, children: int = CHILDREN, render_s: float = RENDER_S) -> None:
        """Start the first child, which checks the setup; raises TextError when it refuses."""
        self._setup = setup
        self._render_s = render_s
        self._free = threading.BoundedSemaphore(children)
        self._lock = threading.Lock()
        self._idle: list[_Child] = [_Child(setup)]
        self._closed = False

    def render(self, request: bytes) -> dict[str, Any]:
        """Return the reply to `request`; raises TextError (too large, timeout, failed)."""
        if len(request) > frames.MAX_FRAME_BYTES:
            raise TextError(TextCode.TOO_LARGE)
        if not self._free.acquire(timeout=self._render_s):
            raise TextError(TextCode.TEMPLATE_TIMEOUT)
        try:
            child = self._take()
            reply = child.exchange(request, self._render_s)
            if reply.get("error") == "memory":
                child.end()
            else:
                self._put(child)
            return reply
        finally:
            self._free.release()

    def _take(self) -> _Child:
        while True:
            with self._lock:
                if self._closed:
                    raise TextError(TextCode.TEMPLATE_FAILED)
                child = self._idle.pop() if self._idle else None
            if child is None:
                return _Child(self._setup)
            if child.alive:
                return child
            child.end()

    def _put(self, child: _Child) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(child)
                return
        child.end()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the idle children."""
        with self._lock:
            return tuple(child.pid for child in self._idle)

    def close(self) -> None:
        """End every child; renders in flight end theirs. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()
