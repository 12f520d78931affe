"""The host over time: draining, failing, idling, what its page says, handing the door on."""

from __future__ import annotations

import resource
import signal
import socket
import time

import pytest

from container.ranks import switchboard
from container.ranks.client import EngineClient
from container.ranks.door import knock, make_door
from container.ranks.heartbeat import EngineState, Verdict, health
from container.ranks.messages import Hello, Welcome
from tests.ranks.doubles import (
    FakeEngine,
    Raw,
    add,
    collect,
    serving,
    submit,
    tokens_of,
    wait_until,
)


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
        # Until the client has read the end of the connection it would ask the engine that is gone.
        wait_until(lambda: client._connection is not None and client._connection.lost)
        assert client.live == 0
    client.close()
    for fd in door:
        socket.close(fd)


def test_the_welcome_is_repeated_to_everyone():
    with serving() as s:
        for _ in range(3):
            with Raw(s, hello=False) as front:
                front.send(Hello())
                assert isinstance(front.receive(), Welcome)
