"""Several real ranks: they start together, answer together, and none outlives another.

The processes are the real ones with a runner of ours in place of a model (tests.ranks.ranked_process).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from container.ranks import followers
from container.ranks.config import EngineConfig, encode
from container.ranks.heartbeat import EngineState, HealthLimits, LoadPhase, StartFault, Verdict, health
from container.ranks.submission import EngineGone
from tests.ranks.doubles import collect, submit, tokens_of, wait_until
from tests.ranks.model_process import CountingRunner
from tests.ranks.ranked_process import HANG, RAISE, expected
from tests.ranks.test_process import CANARY, Started, alive, ready, started

PROMPT = [3, 5, 7]


@contextmanager
def ranks(count: int = 3, mode: str = "good", **config: object) -> Iterator[Started]:
    told = encode(EngineConfig(model_dir=".", tensor_parallel=count, **config))
    with started(mode, told, "tests.ranks.ranked_process") as s:
        pids: list[int] = []
        try:
            yield s
        finally:
            pids = followers_of(s.process.pid)
    wait_until(lambda: not any(alive(pid) for pid in pids), 5.0)


def followers_of(pid: int) -> list[int]:
    """Return the children of the process, in the order they were started: rank 1 first."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return sorted(int(word) for word in text.split())


def answered(s: Started, count: int = 20) -> list[int]:
    return tokens_of(collect(submit(s.client, PROMPT, count)))


@pytest.mark.parametrize("count", [2, 4])
def test_all_ranks_take_part_in_every_answer(count: int) -> None:
    with ranks(count) as s:
        ready(s)
        page = s.page.read()
        assert page.ranks == count
        assert len(followers_of(s.process.pid)) == count - 1
        several = [submit(s.client, [number, 2], 30) for number in range(8)]
        for number, submission in enumerate(several):
            assert tokens_of(collect(submission)) == expected([number, 2], 30, count)


def test_the_sum_may_be_a_group_s() -> None:
    with ranks(2, "torch") as s:
        wait_until(lambda: s.state() == EngineState.READY, 60.0)
        assert answered(s) == expected(PROMPT, 20, 2)


def test_one_rank_starts_no_other() -> None:
    told = encode(EngineConfig(model_dir="."))
    with started("good", told) as s:
        ready(s)
        assert s.page.read().ranks == 1
        assert followers_of(s.process.pid) == []


def test_it_is_ready_only_when_the_slowest_rank_is_and_beats_meanwhile() -> None:
    with ranks(2, "slow:1") as s:
        began = time.monotonic()
        beats = set()
        while s.state() != EngineState.READY:
            page = s.page.read()
            if page.load_phase == LoadPhase.WEIGHTS:
                beats.add(page.beat_ns)
            assert time.monotonic() - began < 20
            time.sleep(0.01)
        assert time.monotonic() - began > 1.5
        assert len(beats) >= 4, "rank 0 waited in silence"
        assert answered(s) == expected(PROMPT, 20, 2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_takes_all_down_at_once(rank: int) -> None:
    with ranks() as s:
        ready(s)
        pids = [s.process.pid, *followers_of(s.process.pid)]
        submission = submit(s.client, PROMPT, 4000)
        submission.next(5.0)
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineGone):
            collect(submission)
        assert time.monotonic() - began < 1.0
        status, stderr = s.end()
        if rank:
            assert status == 1
            lost = f"engine stopped serving: rank_lost: rank {rank} ended by SIGKILL\n"
            assert lost in stderr
            page = s.page.read()
            assert (page.state, page.fault) == (EngineState.FAILED, StartFault.RANK_LOST)
        wait_until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_a_follower_killed_while_nobody_asks_is_noticed_too() -> None:
    with ranks() as s:
        ready(s)
        os.kill(followers_of(s.process.pid)[1], signal.SIGKILL)
        assert s.end() == (1, "engine stopped serving: rank_lost: rank 2 ended by SIGKILL\n")


@pytest.mark.parametrize("busy", [True, False])
def test_a_stopped_follower_takes_all_down_and_does_not_stay(busy: bool) -> None:
    with ranks() as s:
        ready(s)
        pids = followers_of(s.process.pid)
        if busy:
            submit(s.client, PROMPT, 4000).next(5.0)
        os.kill(pids[0], signal.SIGSTOP)
        status, stderr = s.end()
        assert (status, stderr) == (1, "engine stopped serving: rank_lost: rank 1 was stopped\n")
        wait_until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_stopped_followers_die_with_a_killed_rank_0() -> None:
    with ranks() as s:
        ready(s)
        pids = followers_of(s.process.pid)
        os.kill(s.process.pid, signal.SIGSTOP)  # so that it cannot see the others stop
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        s.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_a_follower_that_hangs_makes_the_step_exceed_the_supervisor_s_deadline() -> None:
    limits = HealthLimits(step_s=1.0, first_step_s=1.0)
    with ranks() as s:
        ready(s)
        submit(s.client, [HANG + 1], 4)
        wait_until(
            lambda: health(s.page.read(), time.monotonic_ns(), limits) in (Verdict.SILENT, Verdict.STUCK), 5.0
        )
        pids = followers_of(s.process.pid)
        s.process.send_signal(signal.SIGABRT)
        s.process.wait(2.0)
        wait_until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_a_rank_that_keeps_the_others_waiting_is_given_up_by_them_too() -> None:
    with ranks(rank_wait_s=0.5) as s:
        ready(s)
        submission = submit(s.client, [HANG + 1], 4)
        with pytest.raises(EngineGone):
            collect(submission)
        status, stderr = s.end()
        assert status == 1
        assert "rank_lost" in stderr
        assert "did not answer within 0.5 s" in stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_any_rank_ends_all_and_shows_no_content(rank: int) -> None:
    with ranks() as s:
        ready(s)
        submission = submit(s.client, [RAISE + rank, 2], 4)
        with pytest.raises(EngineGone):
            collect(submission)
        status, stderr = s.end()
        assert status == 1
        assert CANARY not in stderr
        assert "internal" in stderr
        page = s.page.read()
        assert (page.state, page.fault) == (EngineState.FAILED, StartFault.INTERNAL)


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        ("refused:1", StartFault.MODEL_REFUSED),
        ("refused:0", StartFault.MODEL_REFUSED),
        ("raises:2", StartFault.INTERNAL),
        ("dies:1", StartFault.RANK_LOST),
    ],
)
def test_a_rank_that_cannot_start_ends_the_start_with_its_cause(mode: str, fault: StartFault) -> None:
    with ranks(3, mode) as s:
        status, stderr = s.end()
        assert status == 2
        assert f"engine cannot start: {fault.name.lower()}" in stderr
        assert CANARY not in stderr
        page = s.page.read()
        assert (page.state, page.fault) == (EngineState.FAILED, fault)


def test_a_drain_ends_all_ranks_in_order() -> None:
    with ranks() as s:
        ready(s)
        pids = followers_of(s.process.pid)
        submission = submit(s.client, PROMPT, 50)
        submission.next(5.0)
        s.process.send_signal(signal.SIGTERM)
        assert collect(submission)[-1].finish == "length"
        assert s.end() == (0, "")
        assert not any(alive(pid) for pid in pids)
        assert s.state() == EngineState.STOPPED


def test_a_follower_that_never_loads_and_never_leaves_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(followers, "LOAD_WAIT_S", 0.2)
    config = EngineConfig(model_dir=".", tensor_parallel=3)
    lost: list[str] = []
    sleeps = (sys.executable, "-c", "import time; time.sleep(60)")
    group = followers.Followers(config, 2, lambda _, text: lost.append(text), lambda: None, sleeps)
    pids = [process.pid for process in group._processes]
    with pytest.raises(followers.RankLost, match="did not load in time"):
        group.lead(CountingRunner("good"))
    began = time.monotonic()
    group.close()
    assert time.monotonic() - began < 2.0
    assert not any(alive(pid) for pid in pids)
    assert lost == []


def test_followers_are_hardened_as_rank_0_is() -> None:
    with ranks(2) as s:
        ready(s)
        (pid,) = followers_of(s.process.pid)
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        assert next(row for row in limits if row.startswith("Max core file size")).split()[4:6] == ["0", "0"]
        nice = os.getpriority(os.PRIO_PROCESS, s.process.pid)
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice, "a follower must not be slower than rank 0"
        assert Path(f"/proc/{pid}").stat().st_uid == 0 or not os.access(f"/proc/{pid}/mem", os.R_OK)


def test_nothing_of_the_ranks_has_a_name_or_a_port() -> None:
    before = set(os.listdir("/dev/shm"))
    with ranks() as s:
        ready(s)
        for pid in (s.process.pid, *followers_of(s.process.pid)):
            held = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [name for name in held if name.startswith("/dev/shm")]
            sockets = [name for name in held if name.startswith("socket:")]
            assert len(sockets) <= (2 if pid == s.process.pid else 0), "a follower holds a socket"
        assert set(os.listdir("/dev/shm")) <= before
