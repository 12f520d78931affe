"""A child process with one socket: started, spoken to with a deadline, ended, reaped.

Owns: how a child of this room is spawned, the framing on the parent's side.
Must not know: what the child does, what a reply means.
Invariant: a child that was ended is dead and reaped; a process forked from ours never touches our child.

Only `socket` blocks here, so a process patched by gevent waits without stopping its other requests.
`posix_spawn` and not fork: a patched or threaded process must not run Python between fork and exec.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from container.text import frames

_ROOT: Final = str(Path(__file__).resolve().parents[2])
# It holds what clients wrote: nobody of the same user may read its memory (PR_SET_DUMPABLE, reset by exec).
_BOOT: Final = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); sys.path.insert(0, sys.argv[1]); "
    "from importlib import import_module; import_module(sys.argv[2]).main()"
)
_RESET_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)


class Child:
    """A Python process that runs `main()` of one module, with a socket as its descriptor 0."""

    def __init__(self, module: str, inherited_fd: int | None = None) -> None:
        """`inherited_fd` becomes the child's descriptor 3. It has no environment and no other descriptor."""
        self._owner = os.getpid()
        self._reaped = False
        ours, theirs = socket.socketpair()
        actions: list[Any] = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        if inherited_fd is not None:
            actions.append((os.POSIX_SPAWN_DUP2, inherited_fd, 3))
        with theirs:
            os.set_blocking(theirs.fileno(), True)  # a socketpair made by gevent does not block
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-B", "-c", _BOOT, _ROOT, module],
                {},
                file_actions=actions,
                setpgroup=0,  # a terminal's Ctrl-C is ours to handle
                setsigmask=(),
                setsigdef=_RESET_SIGNALS,
            )
        self.socket = ours

    @property
    def alive(self) -> bool:
        """False when it ended, or belongs to the process this one was forked from."""
        if self._reaped or self._owner != os.getpid():
            return False
        try:
            self._reaped = os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        except ChildProcessError:
            self._reaped = True
        return not self._reaped

    def end(self) -> int | None:
        """Kill and reap; return the signal that ended it, None if none or unknown. Idempotent."""
        self.socket.close()
        if self._reaped or self._owner != os.getpid():
            return None
        self._reaped = True  # the id may name another process from here on
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            status = os.waitpid(self.pid, 0)[1]
        except ChildProcessError:
            return None
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def exchange(channel: socket.socket, request: bytes, wait_s: float) -> dict[str, Any] | None:
    """Return the reply to one frame, None when the peer ended without one.

    Raises TimeoutError after `wait_s` in all, OSError, and ValueError on a frame that is none.
    """
    deadline = time.monotonic() + wait_s

    def wait_until_deadline() -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        channel.settimeout(left_s)

    wait_until_deadline()
    frames.send(channel, request)
    return frames.receive(channel, wait_until_deadline)
