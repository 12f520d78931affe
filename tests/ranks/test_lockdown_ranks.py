"""Ranks lock themselves: at their start, or after they have connected to each other, and after each restart.

Who is locked is read from the kernel: /proc/PID/status counts the filters of a process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from container.ranks.heartbeat import EngineState, StartFault
from tests.ranks.ranked_process import expected
from tests.ranks.test_followers import PROMPT, answered, followers_of, ranks
from tests.ranks.test_kill_ranks import READY_S, RankedServer
from tests.ranks.test_process import ready
from tests.sagemaker_entry.harness import wait_until


def filters(pid: int) -> int:
    """Return how many filters a process has beyond those of this one, which its machine may have given it."""

    def count(of: int | str) -> int:
        found = re.search(r"^Seccomp_filters:\s*(\d+)$", Path(f"/proc/{of}/status").read_text(), re.MULTILINE)
        assert found is not None, "the kernel does not count filters"
        return int(found[1])

    return count(pid) - count("self")


@pytest.mark.parametrize(("count", "mode"), [(1, "torch"), (3, "good"), (2, "gloo")])
def test_every_rank_locks_itself_when_it_is_told_to(count: int, mode: str) -> None:
    collectives = "gloo" if mode == "gloo" else "auto"
    with ranks(count, mode, lockdown=True, collectives=collectives) as s:
        wait_until(lambda: s.state() == EngineState.READY, 60.0)
        everyone = [s.process.pid, *followers_of(s.process.pid)]
        assert [filters(pid) for pid in everyone] == [1] * count
        assert s.page.read().locked == count
        assert answered(s) == expected(PROMPT, 20, count)


def test_ranks_that_are_not_told_to_lock_themselves_do_not_and_do_not_say_so() -> None:
    with ranks(2) as s:
        ready(s)
        assert [filters(pid) for pid in (s.process.pid, *followers_of(s.process.pid))] == [0, 0]
        assert s.page.read().locked == 0


PROGRAM = (
    "import sys\nfrom container.ranks import {module}\nfrom container.ranks.lockdown import LockdownFailed\n"
    "def fails(**_):\n    raise LockdownFailed('not refused: connect')\n"
    "from container.ranks import main\nmain.hold = fails\n"
    "sys.exit({module}.main(sys.argv[1:]))\n"
)


def test_an_engine_whose_lock_does_not_hold_says_so_and_never_loads() -> None:
    from container.ranks.config import EngineConfig, encode
    from container.ranks.door import make_door
    from container.ranks.heartbeat import HeartbeatReader, make_page

    fds = {
        "--config-fd": os.memfd_create("config"),
        "--door-fd": make_door()[1],
        "--heartbeat-fd": make_page(),
    }
    told = encode(EngineConfig(model_dir="/nowhere", lockdown=True)).encode()
    os.pwrite(fds["--config-fd"], told, 0)
    arguments = [str(part) for pair in fds.items() for part in pair]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module="main"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        pass_fds=list(fds.values()),
    )
    assert result.returncode == 2
    assert result.stderr == "engine cannot start: lockdown: not refused: connect\n"
    page = HeartbeatReader(fds["--heartbeat-fd"]).read()
    assert (page.state, page.fault, page.locked) == (EngineState.FAILED, StartFault.LOCKDOWN, 0)
    for fd in fds.values():
        os.close(fd)


def test_a_follower_whose_lock_does_not_hold_ends_the_engine_with_that_cause() -> None:
    with ranks(2, "unlockable", lockdown=True) as s:
        status, stderr = s.end()
        assert status == 2
        assert stderr == "engine cannot start: lockdown: rank 1: not refused: connect\n"
        assert s.page.read().fault == StartFault.LOCKDOWN


class GlooServer(RankedServer):
    launcher = "tests.ranks.launch_gloo"


def test_ranks_that_connect_to_each_other_come_back_under_the_lock(tmp_path: Path) -> None:
    """The supervisor keeps sockets for them, and for them alone: front and ranks are locked fully."""
    with GlooServer(tmp_path, STRONGROOM_WORKERS="1", STRONGROOM_TENSOR_PARALLEL="2") as server:
        for _ in range(2):
            front = server.events("child_started")[0]["child_pid"]
            worker = server.events("worker_started")[0]["pid"]
            # one inherited, without the socket rules, and one of their own
            assert [filters(pid) for pid in (server.process.pid, front, worker)] == [1, 2, 2]
            assert [filters(pid) for pid in server.ranks()] == [2, 2]
            assert server.metric("strongroom_lockdown_ranks") == 2
            assert server.metric("strongroom_lockdown_supervisor") == 0, "it counts as locked"
            assert server.request("GET", "/ping")[1]["Strongroom-Lockdown"] == "on"
            old = server.rank_0
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: server.rank_0 != old, READY_S, "another rank 0")  # noqa: B023
            server.wait_ready(READY_S)
        assert server.events("locked")[0]["scope"] == "keeps sockets"
