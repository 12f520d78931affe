"""Rank 0's hold on the other ranks: starting them, knowing that they live, taking them along to the end.

Owns: the memory all ranks share, the followers' processes, the watch over them.
Must not know: models, plans, sockets. No torch.
Invariant: no rank outlives another's death. A follower that ends, or is stopped, ends rank 0, at once and
with a cause; the kernel ends every follower with rank 0, stopped ones too. Whoever hangs without ending is
found by the supervisor, whose deadline ends rank 0.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from container.engine.step import Runner
from container.ranks import exchange, ring, status
from container.ranks.config import EngineConfig, encode
from container.ranks.heartbeat import StartFault
from container.ranks.place import LOAD_WAIT_S, Place
from container.ranks.process import interpreter
from container.ranks.ranked import RankedRunner
from container.ranks.status import RankStatus, Stage

COMMAND: Final = (*interpreter(), "-m", "container.ranks.follower")
WATCH_S: Final = 0.25  # how soon a stopped follower and progress of loading are seen; a death is seen at once
READY_POLL_S: Final = 0.01
LEAVE_S: Final = 0.3  # for followers to wipe and go; the supervisor gives all of it half a second

Lost = Callable[[StartFault, str], None]
Moved = Callable[[], None]


class RankLost(RuntimeError):
    """A follower is gone or does not come."""


class Followers:
    """All ranks but this one.

    Make it in the main thread: the kernel ends them with the thread that made them.
    """

    def __init__(
        self,
        config: EngineConfig,
        stderr_fd: int,
        lost: Lost,
        moved: Moved,
        command: Sequence[str] = COMMAND,
        keep_fds: Sequence[int] = (),
    ) -> None:
        """Start `config.tensor_parallel` - 1 processes; they inherit `keep_fds`, too.

        `lost` is called from the watching thread, once, with the cause and a line; it must not return.
        `moved` is called, from there too, when a follower has moved on while loading. Raises OSError.
        """
        assert threading.current_thread() is threading.main_thread(), "followers end with the main thread"
        self._size = config.tensor_parallel
        self._serve_wait_s = config.rank_wait_s
        self._lost = lost
        self._moved = moved
        self._leaving = threading.Event()
        self._runner: RankedRunner | None = None
        count = self._size - 1
        fds = {
            "--exchange-fd": exchange.create(self._size),
            "--ring-fd": ring.create(count),
            "--status-fd": status.create(self._size),
            "--rendezvous-fd": os.memfd_create("rendezvous", os.MFD_CLOEXEC),
        }
        self._status = RankStatus(fds["--status-fd"])
        self._ring = ring.RingWriter(fds["--ring-fd"], count, LOAD_WAIT_S)
        shared = exchange.Exchange(fds["--exchange-fd"], 0, self._size, LOAD_WAIT_S)
        self.place = Place(0, self._size, shared, f"/proc/self/fd/{fds['--rendezvous-fd']}")
        self._processes = [
            _start(command, rank, config, fds, stderr_fd, keep_fds) for rank in range(1, self._size)
        ]
        for name in ("--exchange-fd", "--ring-fd", "--status-fd"):
            os.close(fds[name])  # mapped here, inherited there
        self._pidfds = [os.pidfd_open(process.pid) for process in self._processes]
        threading.Thread(target=self._watch, name="followers", daemon=True).start()

    def lead(self, own: Runner) -> RankedRunner:
        """Wait until every follower is loaded; return the runner of all ranks over rank 0's `own`.

        From here on a rank that keeps the others waiting is lost. Raises RankLost after LOAD_WAIT_S.
        """
        deadline_s = time.monotonic() + LOAD_WAIT_S
        while any(self._status.stage(rank) is not Stage.READY for rank in range(1, self._size)):
            if time.monotonic() >= deadline_s:
                raise RankLost("a rank did not load in time")
            time.sleep(READY_POLL_S)
        self.place.serving(self._serve_wait_s)
        self._ring.wait_s = self._serve_wait_s
        self._runner = RankedRunner(own, self._ring)
        return self._runner

    def cause(self) -> tuple[StartFault, str] | None:
        """Return a follower's fault and its words; None where none has told one of its own."""
        for rank in range(1, self._size):
            fault = self._status.fault(rank)
            if fault not in (StartFault.NONE, StartFault.RANK_LOST):  # that is another's
                return fault, f"rank {rank}: {self._status.cause(rank)}"
        return None

    def close(self) -> None:
        """Wipe all ranks' KV and see the followers off; ends those that do not go."""
        self._leaving.set()
        if self._runner is not None:
            self._runner.close()
        deadline_s = time.monotonic() + LEAVE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        poller = select.poll()
        ranks = {fd: rank for rank, fd in enumerate(self._pidfds, 1)}
        for fd in self._pidfds:
            poller.register(fd, select.POLLIN)
        signs = self._status.signs(self._size)
        while True:
            ended = poller.poll(WATCH_S * 1000)
            if self._leaving.is_set():
                return
            for fd, _ in ended:
                self._tell(ranks[fd], f"ended {_how(self._processes[ranks[fd] - 1].wait())}")
            for fd, rank in ranks.items():
                if os.waitid(os.P_PIDFD, fd, os.WSTOPPED | os.WNOHANG) is not None:
                    self._tell(rank, "was stopped")
            now = self._status.signs(self._size)
            if now != signs:
                signs = now
                self._moved()

    def _tell(self, rank: int, what: str) -> None:
        self._lost(*(self.cause() or (StartFault.RANK_LOST, f"rank {rank} {what}")))


def _start(
    command: Sequence[str],
    rank: int,
    config: EngineConfig,
    fds: dict[str, int],
    stderr_fd: int,
    keep_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    """Start one follower: exec'd, with the shared memory, a configuration of its own and the operator's
    stderr.
    """
    told = encode(config).encode()
    config_fd = os.memfd_create("config", os.MFD_CLOEXEC)
    try:
        os.write(config_fd, told)
        os.lseek(config_fd, 0, os.SEEK_SET)
        numbers = fds | {"--config-fd": config_fd, "--rank": rank, "--parent": os.getpid()}
        return subprocess.Popen(  # noqa: S603  the command is ours
            [*command, *(str(part) for pair in numbers.items() for part in pair)],
            pass_fds=[*fds.values(), config_fd, *keep_fds],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
        )
    finally:
        os.close(config_fd)


def _how(status_code: int) -> str:
    if status_code >= 0:
        return f"with status {status_code}"
    try:
        return f"by {signal.Signals(-status_code).name}"
    except ValueError:
        return f"by signal {-status_code}"
