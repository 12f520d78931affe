"""Any rank killed or stopped in mid-decode, many times over, behind the real supervisor and front.

Bar: no client waits longer than ANSWERED_S, and the server answers rightly again each time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

from tests.ranks.ranked_process import HANG, expected
from tests.ranks.test_followers import followers_of
from tests.ranks.test_process import alive
from tests.sagemaker_entry.harness import Server, post, read_all, status_of, wait_until

KILLS, STOPS, RANKS = 20, 5, 3
STEP_S = 2.0  # the supervisor's deadline for a step, 10 s outside of tests
ANSWERED_S = STEP_S + 3.0
READY_S = 30.0
PROMPT = "ABC"
TOKENS = 4000


class RankedServer(Server):
    launcher = "tests.ranks.launch_ranks"

    @property
    def rank_0(self) -> int:
        return [e["child_pid"] for e in self.events("child_started") if e["child"] == "engine"][-1]

    def ranks(self) -> list[int]:
        return [self.rank_0, *followers_of(self.rank_0)]

    def answers(self) -> bool:
        """Whether a short request is answered, and with what all ranks together compute."""
        status, reply = self.invoke({"inputs": PROMPT, "parameters": {"max_new_tokens": 12}})
        text = bytes(expected(list(PROMPT.encode()), 12, RANKS)).decode("latin-1")
        return status == 200 and reply == [{"generated_text": PROMPT + text}]


class Caller(threading.Thread):
    """A client in mid-answer."""

    def __init__(self, server: Server, path: str, body: dict[str, object]) -> None:
        super().__init__()
        self.stream = bool(body.get("stream"))
        self._client = server.connect()
        self._client.sendall(post(path, json.dumps(body).encode()))
        self.reply = b""
        self.ended_s = 0.0
        self.start()

    def run(self) -> None:
        self.reply = read_all(self._client)
        self.ended_s = time.monotonic()
        self._client.close()

    def failed_properly(self) -> bool:
        """Whether it got an error, or a stream that says so and breaks off."""
        if self.stream and status_of(self.reply) == 200:
            return b"error" in self.reply and not self.reply.endswith(b"0\r\n\r\n")
        return status_of(self.reply) in (424, 503)


def callers(server: Server) -> list[Caller]:
    tgi = {"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS}}
    openai = {"prompt": PROMPT, "max_tokens": TOKENS, "stream": True}
    return [
        Caller(server, "/invocations", tgi),
        Caller(server, "/invocations", tgi | {"stream": True}),
        Caller(server, "/v1/completions", openai),
    ]


def decoding(server: Server) -> bool:
    return server.metric("vllm:num_requests_running") == 3


def strike(server: RankedServer, rank: int, number: signal.Signals) -> float:
    """Send a signal to a rank in mid-decode; return the seconds until the last client had an answer."""
    waiting = callers(server)
    wait_until(lambda: decoding(server), READY_S, "three sequences in decode")
    old = server.ranks()
    assert len(old) == RANKS
    os.kill(old[rank], number)
    began = time.monotonic()
    for caller in waiting:
        caller.join(ANSWERED_S + 10)
        assert not caller.is_alive(), "a client hangs"
        assert caller.failed_properly(), caller.reply[-300:]
    waited_s = max(caller.ended_s for caller in waiting) - began
    assert waited_s < ANSWERED_S
    wait_until(lambda: server.rank_0 != old[0], READY_S, "another rank 0")
    assert not any(alive(pid) for pid in old), "new ranks met old ones"
    server.wait_ready(READY_S)
    assert server.answers()
    return waited_s


def test_no_client_hangs_and_all_is_well_again_after_twenty_kills_and_five_stops(tmp_path: Path) -> None:
    order = random.Random(11)
    strikes = [signal.SIGKILL] * KILLS + [signal.SIGSTOP] * STOPS
    order.shuffle(strikes)
    targets = [index % RANKS for index in range(len(strikes))]  # each rank comes to its turn
    order.shuffle(targets)
    with RankedServer(
        tmp_path, step_s=STEP_S, STRONGROOM_WORKERS="1", STRONGROOM_TENSOR_PARALLEL=str(RANKS)
    ) as server:
        assert server.answers()
        assert server.metric("strongroom_engine_ranks") == RANKS
        waits = [strike(server, rank, number) for rank, number in zip(targets, strikes, strict=True)]
        assert server.metric("strongroom_engine_restarts_total") >= len(strikes)
        assert server.ranks() == server.ranks()
        last = server.ranks()
    assert not any(alive(pid) for pid in last)
    print(
        f"\n{len(waits)} strikes, slowest client {max(waits):.2f} s after, median {sorted(waits)[12]:.2f} s"
    )


def test_a_rank_that_hangs_is_ended_by_the_supervisor_s_deadline(tmp_path: Path) -> None:
    with RankedServer(tmp_path, step_s=STEP_S, STRONGROOM_WORKERS="1", SM_NUM_GPUS="2") as server:
        old = server.ranks()
        began = time.monotonic()
        hangs = Caller(server, "/invocations", {"inputs": chr(HANG + 1), "parameters": {"max_new_tokens": 3}})
        wait_until(lambda: server.ping() == 503, ANSWERED_S, "a red ping")
        hangs.join(ANSWERED_S)
        assert hangs.failed_properly()
        assert STEP_S * 0.8 < hangs.ended_s - began < ANSWERED_S
        assert server.events("engine_hangs")
        wait_until(lambda: server.rank_0 != old[0], READY_S, "another rank 0")
        assert not any(alive(pid) for pid in old)
        server.wait_ready(READY_S)
        assert len(server.ranks()) == 2
