"""Beyond capacity: the surplus is refused at once, the rest is served as before, `/ping` never notices."""

from __future__ import annotations

import json
import random
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.bench.workloads import CHAT_MEDIAN_OUTPUT
from tests.contract.calls import Reply, call, chat, metric
from tests.contract.conftest import Running
from tests.sagemaker_entry.harness import post

pytestmark = pytest.mark.real_model
WARM_S, SETTLED_S, WINDOW_S = 8.0, 1.0, 5.0
CLIENTS, FULL = 40, 31.0  # the engine computes 32 together; a place is empty for a step now and then
RETRY_S = 1.0
GENERATED, STEPS = "vllm:generation_tokens_total", "strongroom_engine_steps_total"


class Work:
    """The request that is sent over and over: one question, answered in so many tokens."""

    def __init__(self, answer_tokens: int) -> None:
        self.answer_tokens = answer_tokens
        body = chat("Tell me about the history of", max_tokens=answer_tokens, ignore_eos=True)
        self.request = post("/invocations", json.dumps(body).encode())


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextmanager
def pinging(port: int) -> Iterator[list[float]]:
    """Ping ten times a second meanwhile; yields the seconds each took (2 for a failure)."""
    taken: list[float] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.1):
            try:
                reply = call(port, "GET", "/ping", timeout_s=2)
                taken.append(reply.seconds if reply.status == 200 else 2.0)
            except OSError:
                taken.append(2.0)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()


@contextmanager
def waking() -> Iterator[list[float]]:
    """Wake a thread of this process every 10 ms meanwhile; yields how many seconds late each waking was.

    What the clock of any client here adds to what it measures: another guest of the machine may hold the
    cores for longer than a refusal takes.
    """
    late: list[float] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            due = time.monotonic() + 0.01
            time.sleep(0.01)
            late.append(time.monotonic() - due)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield late
    finally:
        stop.set()
        thread.join()


@contextmanager
def asking(port: int, clients: int, work: Work) -> Iterator[list[Reply]]:
    """Keep `clients` asking meanwhile, each its next when the last is answered; yields the replies."""
    replies: list[Reply] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            replies.append(ask(port, work.request))
            if replies[-1].status == 429:
                stop.wait(RETRY_S)

    threads = [threading.Thread(target=loop) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield replies
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ask(port: int, request: bytes) -> Reply:
    """Return the reply to `request`, sent on a connection of its own."""
    began, received = time.monotonic(), bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while (reply := reply_of(received, time.monotonic() - began)) is None:
            data = connection.recv(65536)
            assert data, "closed before the end of an answer"
            received += data
    return reply


class Surplus:
    """Poisson arrivals that nobody holds back, each on a connection of its own, read as they are answered.

    Bytes prepared once and one loop over all sockets: at many times the capacity a client library would take
    more of these cores than the endpoint that refuses it.
    """

    def __init__(self, port: int, work: Work) -> None:
        self.replies: list[Reply] = []
        self._port = port
        self._chance = random.Random(11)
        self._request = work.request
        self._open: dict[socket.socket, tuple[float, bytearray]] = {}
        self._ready = selectors.DefaultSelector()

    def pass_by(self, seconds: float, per_s: float = 0.0) -> None:
        """Send `per_s` requests a second for as long, and take the answers that come meanwhile."""
        now = time.monotonic()
        ends = now + seconds
        due = now + self._chance.expovariate(per_s) if per_s else ends
        while (now := time.monotonic()) < ends:
            if now >= due:
                self._ask()
                due += self._chance.expovariate(per_s)
            else:
                self._take(min(due, ends) - now)

    def wait(self, limit_s: float) -> None:
        """Take the answers still to come."""
        ends = time.monotonic() + limit_s
        while self._open:
            left_s = ends - time.monotonic()
            assert left_s > 0, f"{len(self._open)} were left without an answer"
            self._take(left_s)

    def _ask(self) -> None:
        began = time.monotonic()
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        connection.sendall(self._request)
        self._open[connection] = began, bytearray()
        self._ready.register(connection, selectors.EVENT_READ)

    def _take(self, wait_s: float) -> None:
        for key, _ in self._ready.select(wait_s):
            connection: Any = key.fileobj
            began, received = self._open[connection]
            data = connection.recv(65536)
            received += data
            reply = reply_of(received, time.monotonic() - began)
            assert data or reply, "closed before the end of an answer"
            if reply is not None:
                self._ready.unregister(connection)
                connection.close()
                del self._open[connection]
                self.replies.append(reply)


def reply_of(received: bytearray, seconds: float) -> Reply | None:
    """Return the reply when all of it has come."""
    head, end, body = bytes(received).partition(b"\r\n\r\n")
    if not end:
        return None
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    whole = len(body) == int(headers["content-length"])
    return Reply(int(status.split()[1]), headers, body, seconds) if whole else None


@contextmanager
def output(port: int, step_tokens: float) -> Iterator[list[float]]:
    """Yield a list that then holds the generated tokens per second, as the endpoint counts them.

    `step_tokens`: fewer a step, and the engine had too little to do for a measurement.

    Tokens, not answers: answers of one batch end together, which would make a short window jump.
    """
    rate: list[float] = []
    steps, first, began = metric(port, STEPS), metric(port, GENERATED), time.monotonic()
    yield rate
    steps, last, ended = metric(port, STEPS) - steps, metric(port, GENERATED), time.monotonic()
    assert last - first >= step_tokens * steps, "too few requests for a measurement"
    rate.append((last - first) / (ended - began))


@pytest.mark.timeout(600)
def test_at_four_times_capacity_the_endpoint_goes_on_and_the_surplus_gets_429_at_once(
    endpoint: Running,
) -> None:
    assert share_kept(endpoint.port, Work(CHAT_MEDIAN_OUTPUT), rounds=9) >= 0.9


@pytest.mark.timeout(600)
def test_short_answers_at_four_times_capacity_too(endpoint: Running) -> None:
    # The faster the engine, the more refusals a second on the two cores that compute: at a capacity of 1,060
    # tokens a second, 130 of them, the share was 0.80 to 0.96 in nine rounds, 0.87 in the median.
    assert share_kept(endpoint.port, Work(24), rounds=9) >= 0.75


def share_kept(port: int, work: Work, rounds: int) -> float:
    """Return the share of its capacity that the endpoint goes on computing at four times as many arrivals.

    Checks meanwhile that the surplus is refused at once and that pings are answered.
    """
    capacity: list[float] = []  # tokens per second with as many clients as keep the engine full
    goodput: list[float] = []  # and with surplus arrivals
    surplus = Surplus(port, work)
    with asking(port, CLIENTS, work) as replies, pinging(port) as pings, waking() as late:
        time.sleep(WARM_S)
        # A shared machine's own speed drifts by half within a minute: each overload stands between two
        # measurements of capacity and is compared with their mean.
        for number in range(2 * rounds + 1):
            overloaded = number % 2 == 1
            rate = 4 * capacity[-1] / work.answer_tokens if overloaded else 0.0
            surplus.pass_by(SETTLED_S, rate)
            with output(port, FULL) as rates:
                surplus.pass_by(WINDOW_S, rate)
            (goodput if overloaded else capacity).extend(rates)
    surplus.wait(120)
    replies = replies + surplus.replies
    served = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 429]
    others = [(reply.status, reply.body[:200]) for reply in replies if reply.status not in (200, 429)]
    assert served and not others  # so every token counted belongs to an answer
    assert refused and all(1 <= int(reply.headers["retry-after"]) <= 30 for reply in refused)
    seconds = sorted(reply.seconds for reply in refused)
    shares = [good / statistics.mean(pair) for good, pair in zip(goodput, pairwise(capacity), strict=True)]
    report = (
        f"capacity {[round(value) for value in capacity]}, goodput {[round(value) for value in goodput]} "
        f"tokens/s, shares {[round(share, 2) for share in shares]}, of {len(replies)} requests "
        f"{len(refused)} refused in {[round(s, 3) for s in seconds[-5:]]} s at most, "
        f"this client woken {percentile(late, 0.99):.3f} s late"
    )
    print(report)
    assert percentile(seconds, 0.99) < 0.05 + percentile(late, 0.99), report
    assert percentile(pings, 0.99) < 0.2, report
    return statistics.median(shares)


@pytest.mark.timeout(400)
def test_two_hundred_stalled_sockets_slow_nobody_down(endpoint: Running) -> None:
    port = endpoint.port
    speeds: list[float] = []  # before, meanwhile, after

    def measure() -> None:
        time.sleep(SETTLED_S)
        with output(port, 6.0) as rates:
            time.sleep(WINDOW_S)
        speeds.extend(rates)

    with asking(port, 8, Work(24)) as replies:
        measure()
        stalled = stall(port, 200)
        try:
            with pinging(port) as pings:
                measure()
            check_cut_off(stalled)
        finally:
            for connection in stalled:
                connection.close()
        measure()
    assert {reply.status for reply in replies} == {200}
    assert percentile(pings, 0.99) < 0.2, statistics.mean(pings)
    before, meanwhile, after = speeds
    # noise of a shared machine allowed for beside the bar of 0.95
    assert meanwhile >= 0.8 * statistics.mean([before, after]), speeds


def stall(port: int, count: int) -> list[socket.socket]:
    """Return connections that stop in the middle of their headers, or of their body, by turns."""
    stalled = []
    for number in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        if number % 2:
            connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nX-A: ")
        else:
            connection.sendall(
                b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
        stalled.append(connection)
    return stalled


def check_cut_off(stalled: list[socket.socket]) -> None:
    """Each connection is closed by its deadline, told why at most."""
    deadline = time.monotonic() + 20
    for connection in stalled:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        data = connection.recv(4096)
        assert data == b"" or b" 408 " in data.split(b"\r\n", 1)[0]
