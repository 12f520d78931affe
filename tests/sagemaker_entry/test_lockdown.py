"""The lockdown as a whole: every process of a running container has it, and nothing is healthy without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from container.ranks.config import EngineConfig
from container.ranks.heartbeat import EngineState, HeartbeatReader, HeartbeatWriter, make_page
from sagemaker_entry import children, front, metrics
from sagemaker_entry.health import HOLDS, HOLDS_IN_PART, Health, Lock
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.settings import Settings
from sagemaker_entry.supervisor import EXIT_BROKEN, engine_config
from tests.ranks.test_lockdown_ranks import filters
from tests.sagemaker_entry.harness import ROOT, Server, wait_until

GAUGES = ("strongroom_lockdown_supervisor", "strongroom_lockdown_front", "strongroom_lockdown_ranks")


def roles(server: Server) -> dict[str, int]:
    """Return role -> process id of everything that runs."""
    started = {event["child"]: event["child_pid"] for event in server.events("child_started")}
    workers = {f"worker {i}": event["pid"] for i, event in enumerate(server.events("worker_started"))}
    return {"supervisor": server.process.pid} | started | workers


def test_every_process_of_the_container_is_locked_and_says_so(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS="2") as server:
        wait_until(lambda: len(server.events("text_model_loaded")) == 2, 20, "both workers")
        running = roles(server)
        assert set(running) == {"supervisor", "front", "engine", "worker 0", "worker 1"}
        assert {role: filters(pid) for role, pid in running.items()} == dict.fromkeys(running, 1)
        assert server.request("GET", "/ping")[1]["Strongroom-Lockdown"] == "on"
        assert [server.metric(name) for name in GAUGES] == [1, 1, 1]
        assert server.events("locked")[0]["scope"] == "full"
        for name in ("engine", "front"):  # what comes after a death is locked like what was there before
            os.kill(roles(server)[name], signal.SIGKILL)
            wait_until(lambda: roles(server)[name] != running[name], 10, name)  # noqa: B023
            # An old worker may answer a last ping while its front is replaced.
            wait_until(lambda: filters(roles(server)[name]) == 1, 10, f"a locked {name}")  # noqa: B023
            server.wait_ready()
        assert server.invoke({"inputs": "hello", "parameters": {"max_new_tokens": 2}})[0] == 200


def test_switched_off_nothing_is_locked_and_everybody_can_see_it(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS="1", STRONGROOM_LOCKDOWN="off") as server:
        assert set(map(filters, roles(server).values())) == {0}
        assert server.request("GET", "/ping")[1]["Strongroom-Lockdown"] == "off"
        assert [server.metric(name) for name in GAUGES] == [0, 0, 0]
        assert len(server.events("lockdown_off")) == 1
        assert not server.events("locked")


def test_an_engine_that_serves_unlocked_is_not_healthy(tmp_path: Path) -> None:
    server = Server(tmp_path, fault="UNLOCKED", STRONGROOM_WORKERS="1").start()
    try:
        wait_until(lambda: server.events("text_model_loaded"), 15, "the text model")
        wait_until(lambda: server.ping() == 503, 5, "a red ping")
        body = json.loads(server.request("GET", "/ping")[2])
        assert body["lockdown"] == "pending"
        assert server.invoke({"inputs": "hello"})[0] == 503
    finally:
        server.stop()


def health(*, asked: bool = True, supervisor: float = 0, worker: float = 0, **page: int) -> Health:
    cells, fd = metrics.create(), make_page()
    with HeartbeatWriter(fd) as writer:
        writer.write(state=EngineState.READY, **page)
    Metrics(cells).put("locked", supervisor)
    own = Metrics(cells, 1)
    own.put("locked", worker)
    return Health(HeartbeatReader(fd), own, lockdown=asked)


@pytest.mark.parametrize(
    ("supervisor", "worker", "locked", "ranks", "said"),
    [
        (HOLDS, HOLDS, 1, 1, Lock.ON),
        (HOLDS, HOLDS, 1, 0, Lock.ON),
        (HOLDS_IN_PART, HOLDS, 2, 2, Lock.ON),
        (0, HOLDS, 1, 1, Lock.PENDING),
        (HOLDS, 0, 1, 1, Lock.PENDING),
        (HOLDS, HOLDS, 0, 0, Lock.PENDING),
        (HOLDS, HOLDS, 1, 2, Lock.PENDING),
    ],
)
def test_the_lock_is_on_when_all_processes_have_proven_it(
    supervisor: float, worker: float, locked: int, ranks: int, said: Lock
) -> None:
    checked = health(supervisor=supervisor, worker=worker, locked=locked, ranks=ranks)
    assert checked.lock() is said
    assert health(asked=False, supervisor=supervisor, worker=worker).lock() is Lock.OFF


def test_a_supervisor_that_keeps_sockets_does_not_count_as_locked() -> None:
    series = health(supervisor=HOLDS_IN_PART, worker=HOLDS, locked=2, ranks=2).engine_series()
    assert [series[name][1] for name in GAUGES] == [0, 1, 2]


def test_the_lockdown_is_on_unless_it_is_switched_off() -> None:
    assert engine_config(Settings()).lockdown
    assert not engine_config(Settings(lockdown="off")).lockdown


@pytest.mark.parametrize(
    ("ranks", "collectives", "connects"),
    [
        (1, "gloo", False),
        (2, "auto", False),
        (2, "shared", False),
        (2, "gloo", True),
        (8, "nccl", True),
    ],
)
def test_only_several_ranks_over_gloo_or_nccl_connect(ranks: int, collectives: str, connects: bool) -> None:
    config = EngineConfig(model_dir="/m", tensor_parallel=ranks, collectives=collectives)
    assert config.connects is connects


FAILS = (
    "def fails(*_, **__):\n    raise LockdownFailed('not refused: connect')\n"
    "from container.ranks.lockdown import LockdownFailed\n"
)


def test_a_start_whose_lock_does_not_hold_stops_before_anything_serves(tmp_path: Path) -> None:
    program = FAILS + (
        "import os, sys\nfrom sagemaker_entry import supervisor, settings\nsupervisor.hold = fails\n"
        "chosen, _ = settings.read(os.environ)\n"
        "sys.exit(supervisor.Supervisor(chosen, supervisor.Commands(), os.environ).run())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"STRONGROOM_PORT": "0", "STRONGROOM_HOST": "127.0.0.1", "STRONGROOM_MODEL": str(tmp_path)}
        | {"STRONGROOM_ALLOW_PLAINTEXT": "on"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == EXIT_BROKEN
    said = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["event"] for line in said] == ["listening", "lockdown_failed"]
    assert said[1]["cause"] == "not refused: connect"
    assert "`STRONGROOM_LOCKDOWN=off`" in said[1]["hint"]


def test_a_front_whose_lock_does_not_hold_ends_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise front.LockdownFailed("not refused: connect")

    monkeypatch.setattr(front, "hold", fails)
    with pytest.raises(SystemExit) as caught:
        front.lock([0])
    assert caught.value.code == children.EXIT_UNUSABLE
