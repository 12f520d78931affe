"""The front side: many requests at once, an engine that dies, stalls, lies or comes late."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest

from container.engine.request import ErrorCode
from container.ranks import client as client_module
from container.ranks.client import EngineClient
from container.ranks.door import answer, make_door
from container.ranks.messages import Deltas, frame
from container.ranks.submission import (
    DeltaTimeout,
    EngineBusy,
    EngineGone,
    EngineSilent,
    Submission,
)
from container.ranks.translation import error_deltas
from tests.ranks.doubles import (
    GREEDY,
    WELCOME,
    FakeEngine,
    collect,
    open_descriptors,
    serving,
    submit,
    tokens_of,
    wait_until,
)


@pytest.fixture
def door():
    front_fd, engine_fd = make_door()
    yield front_fd, engine_fd
    os.close(front_fd)
    os.close(engine_fd)


@contextlib.contextmanager
def closing(client: EngineClient):
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def puppet(door: tuple[int, int], first: bytes = frame(WELCOME)):
    """Yield a client whose request is under way and the bare socket that plays its engine."""
    with closing(EngineClient(door[0])) as client:
        with pytest.raises(EngineSilent):
            client.welcome(0.0)
        (engine,) = answer(door[1])
        engine.setblocking(True)
        engine.sendall(first)
        with engine:
            yield client, engine


@contextlib.contextmanager
def engine_process(engine_fd: int, step_s: float = 0.02):
    command = [sys.executable, "-m", "tests.ranks.engine_process", str(engine_fd), str(step_s)]
    with subprocess.Popen(command, pass_fds=[engine_fd]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_64_requests_at_once_on_two_clients_each_get_their_own_answer_in_order():
    with serving() as s, closing(s.client()) as one, closing(s.client()) as two:

        def ask(number: int) -> bool:
            tokens = [number, number + 1, number + 2]
            deltas = collect(submit((one, two)[number % 2], tokens, 12, choices=2))
            return all(tokens_of(deltas, choice) == tokens * 4 for choice in (0, 1))

        with ThreadPoolExecutor(128) as pool:
            assert all(pool.map(ask, range(128)))
        assert one.live == two.live == 0
        assert s.engine.counts.completed == 128


def test_the_welcome_tells_the_model_s_bounds():
    with serving() as s, closing(s.client()) as client:
        assert client.welcome() == WELCOME


def test_a_refusal_arrives_as_a_delta_with_its_retry_time():
    with serving(FakeEngine(limit=0)) as s, closing(s.client()) as client:
        (delta,) = collect(submit(client, [1]))
        assert (delta.error, delta.retry_after_s) == ("queue_full", 7)


def test_when_the_engine_is_killed_every_waiter_learns_within_a_second(door):
    with engine_process(door[1]) as process, closing(EngineClient(door[0])) as client:
        client.welcome(20.0)
        submissions = [submit(client, [i], 1_000_000) for i in range(64)]
        for submission in submissions:
            submission.next(5.0)
        lag_s: list[float] = []

        def wait(submission: Submission) -> None:
            with pytest.raises(EngineGone):
                while True:
                    submission.next(5.0)
            lag_s.append(time.monotonic())

        with ThreadPoolExecutor(64) as pool:
            waits = [pool.submit(wait, submission) for submission in submissions]
            process.send_signal(signal.SIGKILL)
            killed_s = time.monotonic()
            for done in waits:
                done.result(5.0)
        assert len(lag_s) == 64
        assert max(lag_s) - killed_s < 1.0
        assert client.live == 0


def test_the_next_engine_at_the_same_door_serves_the_same_client(door):
    with closing(EngineClient(door[0])) as client:
        for _ in range(2):
            with engine_process(door[1], 0.0) as process:
                client.welcome(20.0)
                assert tokens_of(collect(submit(client, [7, 8], 2))) == [7, 8]
                process.send_signal(signal.SIGKILL)
                process.wait()
            with pytest.raises((EngineGone, EngineSilent)):
                client.submit(array("i", [1]), max_tokens=1, sampling=GREEDY, wait_s=0.1).next(0.1)


def test_a_worker_process_that_dies_has_its_requests_cancelled():
    program = (
        "import sys, time\n"
        "from container.ranks.client import EngineClient\n"
        "from tests.ranks.doubles import submit\n"
        "s = [submit(EngineClient(int(sys.argv[1])), [i], 1_000_000) for i in range(1, 9)]\n"
        "print('sent', flush=True)\n"
        "time.sleep(60)\n"
    )
    with serving(FakeEngine(step_s=0.005)) as s:
        command = [sys.executable, "-c", program, str(s.door_fd)]
        with subprocess.Popen(command, pass_fds=[s.door_fd], stdout=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"sent\n"
            wait_until(lambda: len(s.engine.live) == 8)
            worker.kill()
        wait_until(lambda: not s.engine.live, 1.0)


def test_no_engine_is_said_within_the_wait_and_the_late_one_still_answers(door):
    with closing(EngineClient(door[0])) as client:
        for _ in range(50):  # one knock in all, or a loading engine would find the door full
            with pytest.raises(EngineSilent):
                client.submit(array("i", [1]), max_tokens=1, sampling=GREEDY, wait_s=0.001)
        with serving(door=door) as s:
            assert tokens_of(collect(submit(client, [4], 1))) == [4]
            assert s.switchboard.connections == 1


def test_a_full_door_is_engine_gone_not_a_wait(door):
    many = [EngineClient(door[0]) for _ in range(2000)]
    with contextlib.ExitStack() as stack, pytest.raises(EngineGone):
        for client in many:
            stack.enter_context(closing(client))
            with pytest.raises(EngineSilent):
                client.welcome(0.0)
    while theirs := answer(door[1]):
        for sock in theirs:
            sock.close()


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", frame(Deltas(1, []))[:-1] + b"\xc1" * 100],
)
def test_an_engine_that_talks_rubbish_is_left(door, rubbish):
    with puppet(door) as (client, engine):
        submission = submit(client, [1])
        engine.sendall(rubbish)
        with pytest.raises(EngineGone):
            submission.next(2.0)


def test_an_engine_of_another_schema_is_left(door):
    from msgspec.structs import replace

    with closing(EngineClient(door[0])) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.welcome, 10.0)  # waits already when the answer comes
        engines: list[socket.socket] = []
        wait_until(lambda: engines.extend(answer(door[1])) or bool(engines))
        engines[0].setblocking(True)
        with engines[0] as engine:
            engine.sendall(frame(replace(WELCOME, schema=99)))
            with pytest.raises(EngineGone):
                asked.result(10)


def test_an_engine_that_stops_reading_blocks_nobody(door, monkeypatch):
    monkeypatch.setattr(client_module, "QUEUED_BYTES", 2_000_000)
    with puppet(door) as (client, _):
        client.welcome(2.0)
        submissions = []
        with pytest.raises(EngineBusy):
            for _ in range(100):
                started_s = time.monotonic()
                submissions.append(submit(client, [1] * 100_000))
                assert time.monotonic() - started_s < 0.5
        assert len(submissions) >= 4
        for submission in submissions:
            submission.cancel()  # cancels are always taken
        assert client.live == 0


def test_a_wait_without_deltas_times_out_and_the_request_goes_on():
    with serving(FakeEngine(step_s=0.3)) as s, closing(s.client()) as client:
        submission = submit(client, [6], 1)
        with pytest.raises(DeltaTimeout):
            submission.next(0.01)
        assert tokens_of(submission.next(5.0)) == [6]
        assert submission.next(0.0) == [] or submission.ended


def test_a_deadline_bounds_the_whole_stream():
    with serving(FakeEngine(step_s=0.02)) as s, closing(s.client()) as client:
        submission = submit(client, [1], 1_000_000)
        started_s = time.monotonic()
        with pytest.raises(DeltaTimeout), submission:
            for _ in submission.batches(silence_s=5.0, deadline_s=started_s + 0.2):
                pass
        assert 0.15 < time.monotonic() - started_s < 1.0
        wait_until(lambda: not s.engine.live)


def test_leaving_the_block_cancels_what_has_not_ended():
    with serving(FakeEngine(step_s=0.01)) as s, closing(s.client()) as client:
        with submit(client, [1], 1_000_000) as submission:
            submission.next(5.0)
        wait_until(lambda: not s.engine.live)
        assert submission.ended
        assert submission.next() == []
        assert client.live == 0


def test_leaving_the_block_after_the_end_sends_no_cancel():
    with serving() as s, closing(s.client()) as client:
        with submit(client, [1], 1) as submission:
            collect(submission)
        collect(submit(client, [1], 1))
        assert s.engine.cancels == []


def test_a_cancel_from_another_thread_wakes_the_waiter(door):
    with puppet(door) as (client, _):
        submission = submit(client, [1])
        threading.Timer(0.05, submission.cancel).start()
        assert submission.next(5.0) == []
        assert submission.ended


def test_one_choice_can_be_cancelled_and_the_others_end_the_request():
    with serving(FakeEngine(step_s=0.005)) as s, closing(s.client()) as client:
        submission = submit(client, [1], 40, choices=3)
        deltas = submission.next(5.0)
        submission.cancel(1)
        submission.cancel(1)
        deltas += collect(submission)
        assert [len(tokens_of(deltas, choice)) for choice in (0, 2)] == [40, 40]
        assert len(tokens_of(deltas, 1)) < 40
        assert len(s.engine.cancels) == 1
        assert client.live == 0 and submission.ended


def test_cancelling_the_last_open_choice_ends_the_request_and_loses_nothing_that_arrived():
    with serving(FakeEngine(step_s=0.005)) as s, closing(s.client()) as client:
        submission = submit(client, [1], 1_000_000, choices=2)
        wait_until(lambda: s.engine.counts.steps > 3)
        submission.cancel(0)
        submission.cancel(1)
        wait_until(lambda: not s.engine.live)
        assert client.live == 0
        assert len(tokens_of(collect(submission), 1)) >= 3
        assert submission.ended
        submission.cancel(0)
        submission.cancel()


def test_a_choice_that_the_engine_ended_is_not_cancelled():
    with serving() as s, closing(s.client()) as client:
        submission = submit(client, [1], 1, choices=2)
        wait_until(lambda: client.live == 0)
        submission.cancel(0)
        assert [d.choice for d in collect(submission) if d.finish] == [0, 1]
        assert s.engine.cancels == []


def test_a_choice_cancelled_while_the_reader_ends_the_others_leaves_nothing_live():
    told: list[int | None] = []
    submission = Submission(1, 2, lambda _, choice: told.append(choice) or race(choice))

    def race(choice: int | None) -> None:
        if choice is not None:  # the reader comes in between
            submission.deliver([error_deltas(1, [0], ErrorCode.INTERNAL)[0]])

    submission.cancel(1)
    assert told == [1, None], "the request stayed known for ever"
    assert [d.choice for d in collect(submission)] == [0]
    assert submission.ended


def test_deltas_for_requests_unknown_or_cancelled_are_dropped():
    with serving(FakeEngine(step_s=0.002)) as s, closing(s.client()) as client:
        for _ in range(200):
            submit(client, [1], 1_000_000).cancel()
        assert tokens_of(collect(submit(client, [2], 3))) == [2, 2, 2]
        wait_until(lambda: not s.engine.live)
        assert client.live == 0


def test_what_arrived_before_the_end_is_handed_out_before_engine_gone():
    with serving(FakeEngine(step_s=0.01)) as s, closing(s.client()) as client:
        submission = submit(client, [3], 1_000_000)
        wait_until(lambda: s.engine.counts.steps > 5)
        client.close()
        assert tokens_of(submission.next(1.0))[:5] == [3] * 5
        with pytest.raises(EngineGone):
            submission.next(1.0)


@pytest.mark.parametrize("choices", [0, -1, 17, 10**9])
def test_choices_out_of_bounds_never_reach_the_engine(door, choices):
    with pytest.raises(ValueError, match="choices"):
        submit(EngineClient(door[0]), [1], 1, choices=choices)


def test_an_oversize_prompt_is_the_caller_s_error_and_leaves_nothing_live():
    with serving() as s, closing(s.client()) as client:
        with pytest.raises(ValueError, match="exceeds"):
            submit(client, [1] * 5_000_000)
        assert client.live == 0
        assert tokens_of(collect(submit(client, [2], 1))) == [2]


def test_connecting_200_times_leaves_no_descriptor_or_thread_behind():
    with serving() as s:
        with closing(s.client()) as client:
            collect(submit(client, [1], 1))
        wait_until(lambda: s.switchboard.connections == 0)
        descriptors, threads = open_descriptors(), threading.active_count()
        for _ in range(200):
            with closing(s.client()) as client:
                collect(submit(client, [1], 1))
        wait_until(lambda: s.switchboard.connections == 0)
        assert open_descriptors() == descriptors
        assert threading.active_count() == threads


def test_under_gevent_50_requests_run_at_once_and_a_ticker_keeps_ticking():
    run = subprocess.run(
        [sys.executable, "-m", "tests.ranks.gevent_worker"], capture_output=True, timeout=60, check=True
    )
    right, ticks = map(int, run.stdout.split())
    assert right == 50
    assert ticks > 20  # 20 steps of 20 ms: a blocked hub would tick once or twice


def test_the_front_s_modules_import_neither_torch_nor_transformers_nor_gevent():
    program = (
        "import sys\n"
        "import container.ranks.client, container.ranks.messages, container.ranks.heartbeat\n"
        "import container.ranks.door, container.ranks.submission, container.ranks.config\n"
        "import container.ranks.host, container.ranks.process\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'gevent', 'flask') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_client_that_never_connected_closes_without_a_word(door):
    EngineClient(door[0]).close()
    with pytest.raises(BlockingIOError), socket.socket(fileno=os.dup(door[1])) as end:
        end.recv(1)
