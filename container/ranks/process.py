"""What the engine process does to itself before it holds anything worth stealing.

Owns: dying with its parent, no core files, no foreign reader, lower priority, silence of third-party code.
Must not know: models, requests. No torch.
Invariant: after `harden`, nothing but `say` reaches the operator's stderr, so no library can print a tensor's
name, a path or a prompt.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from types import TracebackType
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
NICENESS: Final = 5  # on few cores the front must still answer /ping while a step computes


def harden(niceness: int = NICENESS) -> int:
    """Apply all of it and return the descriptor of the real stderr, for `say`.

    `niceness` comes on top of the parent's. Raises OSError when the kernel refuses a part.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(niceness)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a parent that waits for signals blocks them for us too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches the whole group; the supervisor decides
    return _silence()


def interpreter() -> list[str]:
    """Return how to start another interpreter: isolated from environment and folder where this one is."""
    return [sys.executable, *(["-I", "-B", "-X", "utf8"] if sys.flags.isolated else [])]


def dumpable() -> bool:
    """Return whether another process of the same user may read this one's memory."""
    return _prctl(PR_GET_DUMPABLE, 0) != 0


def say(stderr_fd: int, line: str) -> None:
    """Write one line to the operator."""
    os.write(stderr_fd, (line.replace("\n", " ") + "\n").encode())


def where(trace: TracebackType | None) -> str:
    """Return module and line of the innermost frame of ours, such as `container.ranks.host:120`."""
    place = "unknown"
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.startswith("container."):
            place = f"{module}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _silence() -> int:
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return kept


def _prctl(option: int, value: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl option {option} was refused")
    return result
