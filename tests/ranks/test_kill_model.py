"""A real model on three ranks under load, in the whole endpoint: any rank killed or stopped in mid-decode.

Bars: no client waits longer than ANSWERED_S after a kill and HUNG_S after a stop, `/ping` says 503 from the
strike until the model answers again as before, and no process outlives its server.

STRONGROOM_TEST_KILLS and STRONGROOM_TEST_STOPS ask for more strikes than the suite has time for. 20 kills and
5 stops, 2 cores that others used too, 2026-11-23, 14.5 minutes: 0 hung clients of 125, every rank came to its
turn, no process left. Seconds after the signal:

                       clients answered         ping red            serving again
    20 kills         median 0.21, most 0.63   0.12, 0.46            23.8, 66.0
    5 stops                 0.33, 10.55       0.19, 9.88            28.7, 58.0

A stopped follower is seen by rank 0 at once, a stopped rank 0 by the supervisor's deadline of 10 s.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks.test_followers import followers_of
from tests.ranks.test_kill_ranks import Caller
from tests.ranks.test_process import alive
from tests.sagemaker_entry.harness import Server, wait_until

RANKS = 3
KILLS = int(os.environ.get("STRONGROOM_TEST_KILLS", "2"))
STOPS = int(os.environ.get("STRONGROOM_TEST_STOPS", "1"))
ANSWERED_S = 5.0
HUNG_S = 20.0  # the supervisor's deadline for a step is 10 s, longer when steps are slow
RED_S = {signal.SIGKILL: 2.0, signal.SIGSTOP: 15.0}
READY_S = 120.0  # three processes import torch and load the model on cores that others use, too
CLIENTS = 5
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300 + 60 * (KILLS + STOPS))]
TOKENS = 1500  # more than are made before the strike
QUESTION = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 16}}


class ModelServer(Server):
    launcher = "tests.ranks.launch_model"

    def __enter__(self) -> ModelServer:
        self.start()
        try:
            self.wait_ready(READY_S)
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, limit_s: float = READY_S) -> None:
        """Ask now and then: pings compete with the ranks for cores."""
        wait_until(lambda: time.sleep(0.1) or self.ping() == 200, limit_s, "a healthy /ping")

    def ranks(self) -> list[int]:
        rank_0 = [e["child_pid"] for e in self.events("child_started") if e["child"] == "engine"][-1]
        return [rank_0, *followers_of(rank_0)]

    def family(self) -> list[int]:
        """Return every process under the supervisor, itself included."""
        found = [self.process.pid]
        for pid in found:
            found += followers_of(pid)
        return found


@dataclass(frozen=True)
class Strike:
    """What one signal led to, in seconds after it."""

    rank: int
    number: signal.Signals
    answered_s: float
    red_s: float
    ready_s: float


def callers(server: Server) -> list[Caller]:
    tgi = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": TOKENS}}
    openai = {"prompt": "A long list of numbers:", "max_tokens": TOKENS, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "Tell a very long story."}], "ignore_eos": True}
    asked = [
        ("/invocations", tgi),
        ("/invocations", tgi | {"stream": True}),
        ("/v1/completions", openai),
        ("/v1/completions", openai | {"stream": True}),
        ("/v1/chat/completions", chat | {"max_tokens": TOKENS, "stream": True}),
    ]
    assert len(asked) == CLIENTS
    return [Caller(server, path, body) for path, body in asked]


def strike(server: ModelServer, rank: int, number: signal.Signals, expected: object) -> Strike:
    waiting = callers(server)
    wait_until(lambda: server.metric("vllm:num_requests_running") == CLIENTS, 30, "sequences in decode")
    old = server.ranks()
    assert len(old) == RANKS
    began = time.monotonic()
    os.kill(old[rank], number)
    wait_until(lambda: server.ping() == 503, RED_S[number], "a red ping")
    red_s = time.monotonic() - began
    for caller in waiting:
        caller.join(HUNG_S)
        assert not caller.is_alive(), "a client hangs"
        assert caller.failed_properly(), caller.reply[-300:]
    answered_s = max(caller.ended_s for caller in waiting) - began
    assert answered_s < (ANSWERED_S if number is signal.SIGKILL else HUNG_S)
    server.wait_ready()
    ready_s = time.monotonic() - began
    assert server.invoke(QUESTION) == expected
    assert set(server.ranks()).isdisjoint(old)
    assert not any(alive(pid) for pid in old), "new ranks met old ones"
    return Strike(rank, number, answered_s, red_s, ready_s)


def told(found: list[Strike]) -> str:
    """Return the figures of all strikes, for whoever runs this by hand."""
    lines = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        kind = [each for each in found if each.number is number]
        if kind:
            for name in ("answered_s", "red_s", "ready_s"):
                values = [getattr(each, name) for each in kind]
                median, most = statistics.median(values), max(values)
                lines.append(f"{number.name} x {len(kind)} {name}: median {median:.2f}, most {most:.2f}")
    return "\n".join(lines)


def test_three_ranks_of_a_real_model_under_load_come_back_from_every_strike(
    tmp_path: Path, demo_checkpoint: Path
) -> None:
    order = random.Random(17)
    strikes = [signal.SIGKILL] * KILLS + [signal.SIGSTOP] * STOPS
    order.shuffle(strikes)
    targets = [index % RANKS for index in range(len(strikes))]  # each rank comes to its turn
    order.shuffle(targets)
    found = []
    with ModelServer(
        tmp_path,
        STRONGROOM_MODEL=str(demo_checkpoint),
        STRONGROOM_ALLOW_PLAINTEXT="on",
        STRONGROOM_WORKERS="1",
        STRONGROOM_TENSOR_PARALLEL=str(RANKS),
    ) as server:
        expected = server.invoke(QUESTION)
        assert expected[0] == 200
        for rank, number in zip(targets, strikes, strict=True):
            found.append(strike(server, rank, number, expected))
            print(found[-1], flush=True)
        assert server.metric("strongroom_engine_restarts_total") == len(strikes)
        family = server.family()
        assert len(family) > RANKS
        assert server.stop() == 0
    assert not any(alive(pid) for pid in family), "a process was left behind"
    print(f"\n{told(found)}")
