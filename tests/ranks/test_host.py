"""The host behind raw sockets: order, refusals, cancels, backpressure, hostile bytes."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing

import msgspec
import pytest

from container.engine.request import ErrorCode
from container.ranks import messages, switchboard
from container.ranks.messages import Cancel, Deltas, Hello, frame
from container.ranks.switchboard import batch_frames
from container.ranks.translation import error_deltas
from tests.ranks.doubles import (
    FakeEngine,
    Raw,
    add,
    collect,
    open_descriptors,
    serving,
    submit,
    tokens_of,
    wait_until,
)


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


def test_the_surplus_is_refused_while_a_step_runs_and_not_at_its_end():
    running, over = threading.Event(), threading.Event()

    def long_step() -> None:
        running.set()
        over.wait(10)

    with serving(FakeEngine(limit=3, before_step=long_step)) as s, closing(s.client()) as client:
        first = submit(client, [1])
        assert running.wait(5)
        waiting = [submit(client, [n]) for n in (2, 3)]
        surplus = [submit(client, [n], choices=2) for n in (4, 5)]
        for submission in surplus:
            deltas = collect(submission, silence_s=2.0)  # the step still runs
            assert [(d.choice, d.error, d.retry_after_s) for d in deltas] == [
                (0, "queue_full", 7),
                (1, "queue_full", 7),
            ]
        over.set()
        for token, submission in ((1, first), *zip((2, 3), waiting, strict=True)):
            assert tokens_of(collect(submission)) == [token] * 4
        assert s.switchboard.refused == 2
        assert tokens_of(collect(submit(client, [6]))) == [6] * 4  # room again


def test_the_page_says_when_there_is_no_room():
    with serving(FakeEngine(limit=2, step_s=0.02)) as s, closing(s.client()) as client:
        assert s.page.read().full_s == 0
        both = [submit(client, [n], max_tokens=20) for n in (1, 2)]
        wait_until(lambda: s.page.read().full_s == 7)
        for submission in both:
            collect(submission)
        wait_until(lambda: s.page.read().full_s == 0)


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


def test_a_cancelled_choice_stops_and_the_others_go_on_to_their_end():
    with serving(FakeEngine(step_s=0.01)) as s, Raw(s) as front:
        front.send(add(1, [1], 40, choices=3))
        front.receive()
        front.send(Cancel(1, 1), Cancel(1, 1), Cancel(1, 7), Cancel(2, 0))
        deltas = front.deltas(2)
        assert [tokens_of(deltas, choice).count(1) for choice in (0, 2)] == [39, 39]
        assert len(tokens_of(deltas, 1)) < 39
        assert [d.choice for d in deltas if d.finish] == [0, 2]
        assert len(s.engine.cancels) == 1
        wait_until(lambda: not s.engine.live)


def test_cancelling_every_choice_one_by_one_ends_the_request():
    with serving(FakeEngine(step_s=0.01)) as s, Raw(s) as front:
        front.send(add(1, [1], 100_000, choices=2))
        front.receive()
        front.send(Cancel(1, 0), Cancel(1, 1), Cancel(1))
        wait_until(lambda: not s.engine.live)
        assert len(s.engine.cancels) == 2
        front.send(add(1, [2], 1))  # the name is free again
        assert tokens_of(front.deltas(1)[-1:]) == [2]


@pytest.mark.parametrize("choice", [-1, 16])
def test_a_choice_no_request_can_have_breaks_the_schema(choice):
    with serving() as s, Raw(s) as front:
        front.send(Cancel(1, choice))
        assert front.receive() is None


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
