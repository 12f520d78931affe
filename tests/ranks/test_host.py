"""The host behind raw sockets: order, refusals, cancels, backpressure, hostile bytes, draining, idling."""

from __future__ import annotations

import random
import resource
import signal
import socket
import time

import msgspec
import pytest

from container.engine.request import ErrorCode
from container.ranks import messages, switchboard
from container.ranks.channel import FrameDecoder
from container.ranks.client import EngineClient
from container.ranks.door import knock, make_door
from container.ranks.heartbeat import EngineState, Verdict, health
from container.ranks.messages import Cancel, Delta, Deltas, Hello, Welcome, frame
from container.ranks.switchboard import batch_frames
from container.ranks.translation import error_deltas
from tests.ranks.doubles import (
    WELCOME,
    FakeEngine,
    Serving,
    add,
    collect,
    open_descriptors,
    serving,
    submit,
    tokens_of,
    wait_until,
)


class Raw:
    """A front that says exactly what it is told to."""

    def __init__(self, serving: Serving, hello: bool = True) -> None:
        self.socket = knock(serving.door_fd)
        self.socket.settimeout(5.0)
        self._decoder = FrameDecoder()
        self._frames: list[messages.FromEngine] = []
        if hello:
            self.send(Hello())
            assert self.receive() == WELCOME

    def send(self, *messages_: messages.FromFront) -> None:
        self.socket.sendall(b"".join(frame(m) for m in messages_))

    def receive(self) -> messages.FromEngine | None:
        """Return the next message, or None at the end."""
        while not self._frames:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames += [messages.decode_from_engine(p) for p in self._decoder.feed(data)]
        return self._frames.pop(0)

    def deltas(self, ended: int) -> list[Delta]:
        """Return deltas until `ended` final ones have come."""
        out: list[Delta] = []
        while sum(d.finish is not None or d.error is not None for d in out) < ended:
            message = self.receive()
            assert isinstance(message, Deltas)
            out += message.deltas
        return out

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_a_request_is_answered_token_by_token_with_one_final_delta():
    with serving() as s, Raw(s) as front:
        front.send(add(1, [5, 6, 7]))
        deltas = front.deltas(1)
        assert [d.tokens[0].token for d in deltas] == [5, 6, 7, 5]
        assert [d.finish for d in deltas] == [None, None, None, "length"]
        assert deltas[0].cached_tokens == 0


def test_one_step_makes_one_frame_per_connection():
    with serving(FakeEngine(step_s=0.05)) as s, Raw(s) as front, Raw(s) as other:
        front.send(*(add(i, [i]) for i in range(1, 9)))
        other.send(add(1, [900]))
        front.receive()
        message = front.receive()
        assert isinstance(message, Deltas)
        assert [d.id for d in message.deltas] == list(range(1, 9))
        assert {t.token for d in other.deltas(1) for t in d.tokens} == {900}


def test_the_engine_is_touched_by_one_thread_only():
    with serving() as s, Raw(s) as front:
        front.send(add(1, [1], 50), add(2, [1], 50), Cancel(2))
        front.deltas(1)
        assert s.engine.threads == {s.thread.ident}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": b""},
        {"prompt": b"\x00" * 5},
        {"stop_token_ids": [1] * 2000},
        {"tenant": "t" * 300},
        {"cache_salt": "s" * 300},
    ],
)
def test_a_request_beyond_a_bound_gets_an_error_and_the_next_one_an_answer(changes):
    with serving() as s, Raw(s) as front:
        front.send(add(1, [1], **changes))
        assert [(d.id, d.choice, d.error) for d in front.deltas(1)] == [(1, 0, "invalid_request")]
        front.send(add(2, [4], 1))
        assert tokens_of(front.deltas(1)) == [4]


def test_prompt_logprobs_that_cannot_fit_a_frame_are_refused():
    sampling = msgspec.structs.replace(add(1, [1]).sampling, prompt_logprobs=20)
    with serving() as s, Raw(s) as front:
        front.send(add(1, [1] * 60_000, sampling=sampling))
        assert front.deltas(1)[0].error == "invalid_request"


def test_every_choice_of_a_refused_request_is_ended():
    with serving(FakeEngine(limit=0)) as s, Raw(s) as front:
        front.send(add(1, [1], choices=3))
        deltas = front.deltas(3)
        assert [(d.choice, d.error, d.retry_after_s) for d in deltas] == [
            (c, "queue_full", 7) for c in range(3)
        ]


def test_an_id_used_twice_ends_in_an_error_and_runs_nothing():
    with serving(FakeEngine(step_s=0.02)) as s, Raw(s) as front:
        front.send(add(1, [1], 10_000))
        front.receive()
        front.send(add(1, [2], 10_000))
        assert front.deltas(1)[-1].error == "invalid_request"
        wait_until(lambda: not s.engine.live)


def test_a_cancelled_request_stops_and_sends_nothing_more():
    with serving(FakeEngine(step_s=0.01)) as s, Raw(s) as front:
        front.send(add(1, [1], 100_000))
        front.receive()
        front.send(Cancel(1), Cancel(1), Cancel(77))
        wait_until(lambda: not s.engine.live)
        assert len(s.engine.cancels) == 1
        front.send(add(2, [2], 1))
        assert tokens_of(front.deltas(1)[-1:]) == [2]


def test_a_worker_that_dies_has_its_requests_cancelled_and_no_one_elses():
    with serving(FakeEngine(step_s=0.01)) as s, Raw(s) as survivor:
        survivor.send(add(1, [3], 30))
        dying = Raw(s)
        dying.send(*(add(i, [1], 100_000) for i in range(1, 20)))
        dying.receive()
        dying.socket.close()
        wait_until(lambda: s.engine.lost == [2])
        assert tokens_of(survivor.deltas(1)) == [3] * 30
        assert not s.engine.live


def test_a_cancel_storm_leaves_nothing_behind():
    rng = random.Random(11)
    with serving(FakeEngine(step_s=0.001)) as s, Raw(s) as front:
        for i in range(1, 1001):
            front.send(add(i, [i % 7], rng.choice((1, 5, 100_000))), Cancel(rng.randint(1, i)), Cancel(i))
        wait_until(lambda: not s.engine.live)
        front.send(add(2000, [9], 1))
        while not any(d.id == 2000 for d in front.deltas(1)):
            pass
        counts = s.engine.stats()
        assert counts.accepted == counts.completed + counts.cancelled == 1001


@pytest.mark.parametrize("first", [add(1, [1]), Cancel(1), Hello(schema=99)])
def test_who_does_not_greet_properly_is_shown_out(first):
    with serving() as s, Raw(s, hello=False) as front:
        front.send(first)
        assert front.receive() is None
        wait_until(lambda: s.page.read().channel_faults == 1)


def test_a_second_greeting_ends_the_connection():
    with serving() as s, Raw(s) as front:
        front.send(Hello())
        assert front.receive() is None


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_close_their_channel_and_the_host_lives(seed):
    rng = random.Random(seed)
    with serving() as s, Raw(s) as good:
        for _ in range(30):
            with Raw(s, hello=rng.random() < 0.5) as bad:
                kind = rng.randrange(4)
                data = frame(add(1, [1, 2], 2))
                if kind == 0:
                    data = rng.randbytes(rng.randint(1, 5000))
                elif kind == 1:
                    data = data[: rng.randint(1, len(data) - 1)]
                elif kind == 2:
                    data = messages.LENGTH.pack(rng.randint(messages.MAX_FRAME_BYTES + 1, 2**32 - 1)) + data
                else:
                    data = data[:4] + data[4:].replace(b"add", b"adx")
                bad.socket.sendall(data)
        good.send(add(1, [8], 2))
        assert tokens_of(good.deltas(1)) == [8, 8]
        wait_until(lambda: s.page.read().connections == 1)
        assert s.failures == []


def test_connections_beyond_the_limit_are_closed_at_once(monkeypatch):
    monkeypatch.setattr(switchboard, "MAX_CONNECTIONS", 2)
    with serving() as s, Raw(s), Raw(s), Raw(s, hello=False) as third:
        assert third.socket.recv(1) == b""


def test_connecting_200_times_leaves_no_descriptor_behind():
    with serving() as s:
        with Raw(s):
            pass
        wait_until(lambda: s.switchboard.connections == 0)
        baseline = open_descriptors()
        for _ in range(200):
            with Raw(s) as front:
                front.send(add(1, [1], 2))
        wait_until(lambda: s.switchboard.connections == 0)
        assert open_descriptors() == baseline


def test_reading_pauses_while_the_engine_has_not_applied_what_came(monkeypatch):
    """Backpressure reaches the sender; once the step is over everything is taken."""
    monkeypatch.setattr("container.ranks.channel.INTAKE_BYTES", 200_000)
    gate = {"open": False}

    def hold() -> None:
        while not gate["open"]:
            time.sleep(0.005)

    with serving(FakeEngine(before_step=hold)) as s, Raw(s) as front:
        front.send(add(1, [1], 1))
        time.sleep(0.1)
        front.socket.setblocking(False)
        data, sent = frame(add(2, [1] * 20_000, 1)), 0
        rest = memoryview(b"".join(frame(add(i, [1] * 20_000, 1)) for i in range(2, 102)))
        for _ in range(100):
            try:
                while rest:
                    n = front.socket.send(rest)
                    sent, rest = sent + n, rest[n:]
            except BlockingIOError:
                time.sleep(0.002)
        assert sent < 200_000 + 2 * len(data) + 1_000_000  # intake limit, one read, both socket buffers
        gate["open"] = True
        front.socket.settimeout(5.0)
        front.socket.sendall(rest)
        assert len(front.deltas(101)) == 101


def test_a_front_that_does_not_read_is_cut_off_and_the_others_go_on():
    with serving(FakeEngine(step_s=0.0005), backlog_bytes=20_000) as s, Raw(s) as deaf, Raw(s) as good:
        deaf.send(*(add(i, [1], 100_000) for i in range(1, 200)))
        wait_until(lambda: s.engine.lost == [1])
        good.send(add(1, [4], 3))
        assert tokens_of(good.deltas(1)) == [4, 4, 4]
        wait_until(lambda: s.page.read().channel_faults == 1)


def test_deltas_too_large_for_one_frame_leave_in_several_in_order(monkeypatch):
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 200)
    deltas = [d for i in range(1, 40) for d in error_deltas(i, [0], ErrorCode.INTERNAL)]
    frames = list(batch_frames(3, deltas))
    assert all(len(f) <= 204 for f in frames)
    out = [d for f in frames for d in messages.decode_from_engine(f[4:]).deltas]
    assert out == deltas


def test_draining_finishes_what_runs_and_refuses_the_rest():
    with serving(FakeEngine(step_s=0.02)) as s, Raw(s) as front:
        front.send(add(1, [1], 20))
        front.receive()
        s.host.request_drain()
        wait_until(lambda: s.page.read().state == EngineState.DRAINING)
        front.send(add(2, [2], 1))
        deltas = front.deltas(2)
        assert [d.error for d in deltas if d.id == 2] == ["draining"]
        assert [d.finish for d in deltas if d.id == 1][-1] == "length"
        assert front.receive() is None
        s.thread.join(5.0)
        assert s.page.read().state == EngineState.STOPPED


def test_what_outlives_the_drain_is_told_so_choice_by_choice():
    with serving(FakeEngine(step_s=0.02), drain_s=0.1) as s, Raw(s) as front:
        front.send(add(1, [1], 100_000, choices=2))
        front.receive()
        started_s = time.monotonic()
        s.host.request_drain()
        deltas = front.deltas(2)
        assert [(d.choice, d.error) for d in deltas[-2:]] == [(0, "draining"), (1, "draining")]
        assert time.monotonic() - started_s < 2.0
        assert front.receive() is None
        s.thread.join(5.0)
        assert not s.thread.is_alive()


def test_a_stop_shortens_a_drain_and_a_second_drain_does_not_lengthen_it():
    with serving(FakeEngine(step_s=0.02), drain_s=600.0) as s, Raw(s) as front:
        front.send(add(1, [1], 100_000))
        front.receive()
        s.host.request_drain()
        s.host.request_stop()
        s.host.request_drain()
        assert front.deltas(1)[-1].error == "draining"
        s.thread.join(5.0)
        assert not s.thread.is_alive()


def test_an_engine_that_raises_ends_the_host_and_every_connection():
    def broken() -> None:
        raise RuntimeError("of the device")

    with serving(FakeEngine(before_step=broken)) as s, Raw(s) as front:
        front.send(add(1, [1]))
        assert front.receive() is None
        s.thread.join(5.0)
        assert [type(f) for f in s.failures] == [RuntimeError]
        assert s.page.read().state != EngineState.STOPPED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_io_thread_ends_the_host(monkeypatch):
    with serving() as s:
        with Raw(s):
            pass
        monkeypatch.setattr(switchboard, "answer", lambda fd: 1 // 0)
        with knock(s.door_fd):
            s.thread.join(5.0)
        assert [type(f).__name__ for f in s.failures] == ["IoFailed"]


def test_an_idle_host_beats_and_costs_next_to_nothing():
    with serving() as s, Raw(s):
        time.sleep(0.6)
        before, beat_ns = resource.getrusage(resource.RUSAGE_SELF), s.page.read().beat_ns
        time.sleep(1.2)
        after, page = resource.getrusage(resource.RUSAGE_SELF), s.page.read()
        spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert spent_s < 0.012
        assert page.beat_ns > beat_ns
        assert time.monotonic_ns() - page.beat_ns < 1e9
        assert health(page, time.monotonic_ns()) is Verdict.READY


def test_the_page_tells_of_work_and_of_its_end():
    with serving(FakeEngine(step_s=0.02)) as s, Raw(s) as front:
        front.send(add(1, [1], 10))
        front.receive()
        wait_until(lambda: s.page.read().running == 1, 1.0)
        front.deltas(1)
        wait_until(lambda: s.page.read().running == 0, 0.4)
        page = s.page.read()
        assert (page.accepted, page.completed, page.steps) == (1, 1, 10)
        assert page.step_ns_sum >= 10 * 0.02 * 1e9
        assert page.step_p99_ns >= 0.02 * 1e9


def test_an_engine_that_moves_nothing_beats_without_progress_and_does_not_spin():
    turns: list[None] = []
    engine = FakeEngine(barren=True, before_step=lambda: turns.append(None))
    with serving(engine) as s, Raw(s) as front:
        front.send(add(1, [1]))
        wait_until(lambda: s.page.read().running == 1)
        before = len(turns)
        time.sleep(0.5)
        assert 0 < len(turns) - before <= 100  # one per 5 ms at most
        page = s.page.read()
        assert page.beat_ns - page.progress_ns > 0.4e9


def test_a_hung_step_stops_the_beat():
    gate = {"open": False}

    def hold() -> None:
        while not gate["open"]:
            time.sleep(0.005)

    with serving(FakeEngine(before_step=hold)) as s, Raw(s) as front:
        front.send(add(1, [1], 1))
        wait_until(lambda: s.page.read().waiting + s.page.read().running == 1)
        beat_ns = s.page.read().beat_ns
        time.sleep(0.7)
        assert s.page.read().beat_ns == beat_ns
        gate["open"] = True
        front.deltas(1)


def test_a_signal_handler_can_ask_for_the_drain():
    with serving() as s:
        previous = signal.signal(signal.SIGUSR1, lambda *_: s.host.request_drain())
        try:
            signal.raise_signal(signal.SIGUSR1)
            s.thread.join(2.0)
            assert not s.thread.is_alive()
        finally:
            signal.signal(signal.SIGUSR1, previous)


def test_the_host_leaves_when_nobody_holds_the_front_of_the_door():
    front_fd, engine_fd = make_door()
    with serving(door=(front_fd, engine_fd)) as s:
        socket.close(front_fd)
        s.thread.join(2.0)
        assert not s.thread.is_alive()
    socket.close(engine_fd)


def test_an_engine_that_takes_over_the_door_is_reached_by_the_same_client():
    door = make_door()
    client = EngineClient(door[0])
    for tokens in ([1, 2], [3, 4], [5, 6]):
        with serving(door=door):
            assert tokens_of(collect(submit(client, tokens, 2))) == tokens
        wait_until(lambda: client.live == 0)
    client.close()
    for fd in door:
        socket.close(fd)


def test_the_welcome_is_repeated_to_everyone():
    with serving() as s:
        for _ in range(3):
            with Raw(s, hello=False) as front:
                front.send(Hello())
                assert isinstance(front.receive(), Welcome)
