"""Starting child processes: exec'd, with nothing inherited but what is named.

Owns: the few system calls between fork and exec, the environment children see.
Must not know: what a child does.
Invariant: a child dies with its parent, dumps no core, and holds no descriptor beyond 0-2 and those passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36
EXEC_FAILED: Final = 127
EXIT_UNUSABLE: Final = 4  # of a front that another start cannot cure; gunicorn passes it on from a worker

# Everything else is dropped: each server variable changes configuration from outside.
PASSED: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "OMP_NUM_THREADS"),
)
ADDED: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def environment(source: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for children: the allowed names of `source` and ours."""
    return {name: source[name] for name in PASSED if name in source} | ADDED


def undumpable() -> None:
    """Let nobody of the same user read this process's memory, and write no core file."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; survives exec, not fork."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of what children leave behind, as PID 1 is anyway, so that it can be reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spawn(argv: Sequence[str], env: Mapping[str, str], keep_fds: Sequence[int], oom_score: int = 0) -> int:
    """Start `argv` and return its pid; the caller must be single-threaded.

    `oom_score` above 0 offers the child to the kernel first when memory runs out.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(EXEC_FAILED)  # the parent died before the line above
        os.setsid()  # a terminal's Ctrl-C reaches the supervisor alone
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if oom_score:
            # Of an undumpable process, /proc/self belongs to root; exec sets the same again.
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            with contextlib.suppress(OSError):  # a read-only /proc must not keep the child from starting
                Path("/proc/self/oom_score_adj").write_text(str(oom_score))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        at = 3
        for fd in sorted(keep_fds):
            os.closerange(at, fd)
            os.set_inheritable(fd, True)
            at = fd + 1
        os.closerange(at, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.execve(argv[0], list(argv), dict(env))  # noqa: S606  argv is ours
    finally:
        os._exit(EXEC_FAILED)
