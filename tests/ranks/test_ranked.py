"""Rank 0's runner and a follower's loop in one process: the same orders in order, and what a failure
costs.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from dataclasses import replace

import pytest

from container.engine.engine import Engine
from container.engine.request import EngineRequest, ErrorCode, RequestKey, SamplingParams
from container.engine.step import Capacity, StepPlan, StepResult, ints
from container.model import division, shape
from container.model.group import GroupBroken
from container.model.shape import RunnerConfig
from container.ranks.assembly import StartFailed, runner_config
from container.ranks.config import EngineConfig
from container.ranks.exchange import ExchangeBroken
from container.ranks.faults import diagnose
from container.ranks.follower import FDS, follow
from container.ranks.followers import RankLost
from container.ranks.heartbeat import StartFault
from container.ranks.memory import Memory, NoSharedWords, make, reached
from container.ranks.plans import BadCommand, Order, encode
from container.ranks.ranked import RankedRunner, RanksBroken
from container.ranks.ring import RingBroken
from container.ranks.status import RankStatus, Stage, create
from tests.engine.fake_runner import FakeRunner
from tests.ranks.model_process import CAPACITY


class Tape:
    """Both ends of a ring, without a ring: keeps what was sent until it is received."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self.full = False

    def send(self, message: bytes) -> None:
        if self.full:
            raise RingBroken("a rank takes no more plans")
        self.sent.append(message)

    def receive(self) -> bytes:
        return self.sent.popleft()


class Recorder:
    """A runner that notes what it is told, and fails when told to."""

    def __init__(self, tape: Tape | None = None) -> None:
        self.told: list[object] = []
        self.fails = self.ahead = False
        self._tape = tape

    def capacity(self) -> Capacity:
        return replace(CAPACITY, runs_ahead=self.ahead)

    def run(self, plan: StepPlan) -> StepResult:
        assert self._tape is None or self._tape.sent, "the followers were not told first"
        self.told.append(plan.number)
        if self.fails:
            raise GroupBroken("rank 1 did not answer within 1.0 s")
        return StepResult(plan.number)

    def reset(self) -> None:
        self.told.append("reset")

    def close(self) -> None:
        self.told.append("close")


def plan(number: int) -> StepPlan:
    return StepPlan(
        number, slots=ints([0]), starts=ints([0]), counts=ints([1]), flags=ints([1]), tokens=ints([5])
    )


def test_followers_are_told_everything_first_and_in_order() -> None:
    tape = Tape()
    own, other = Recorder(tape), Recorder()
    runner = RankedRunner(own, tape)
    assert runner.capacity() == CAPACITY
    own.ahead = True
    assert not runner.capacity().runs_ahead, "followers cannot be a step behind"
    own.ahead = False
    runner.run(plan(1))
    runner.reset()
    assert runner.run(plan(2)).number == 2
    runner.close()
    follow(other, tape)
    assert own.told == other.told == [1, "reset", 2, "close"]
    assert not tape.sent


def test_after_a_failed_step_nothing_is_run_any_more() -> None:
    tape = Tape()
    own = Recorder(tape)
    runner = RankedRunner(own, tape)
    own.fails = True
    with pytest.raises(GroupBroken):
        runner.run(plan(1))
    told = len(tape.sent)
    own.fails = False
    with pytest.raises(RanksBroken):
        runner.run(plan(2))
    with pytest.raises(RanksBroken):
        runner.reset()
    runner.close()  # wipes its own
    assert own.told == [1, "close"]
    assert len(tape.sent) == told, "followers of a broken group were told to go on"


def test_a_ring_that_takes_nothing_breaks_the_ranks_before_the_own_step() -> None:
    tape = Tape()
    own = Recorder(tape)
    runner = RankedRunner(own, tape)
    tape.full = True
    with pytest.raises(RingBroken):
        runner.run(plan(1))
    tape.full = False
    with pytest.raises(RanksBroken):
        runner.run(plan(1))
    assert own.told == []


def test_a_failed_step_ends_the_engine_and_names_the_lost_rank() -> None:
    tape = Tape()
    own = Recorder(tape)
    engine = Engine(RankedRunner(own, tape))
    greedy = SamplingParams(temperature=0.0)
    engine.submit(EngineRequest(RequestKey(1, 1), ints([3]), max_tokens=4, sampling=greedy))
    own.fails = True
    with pytest.raises(RanksBroken) as broken:
        engine.step()
    assert diagnose(broken.value) == (StartFault.RANK_LOST, "rank 1 did not answer within 1.0 s")


def test_a_follower_s_runner_keeps_the_same_state_as_rank_0_s() -> None:
    tape = Tape()
    capacity = Capacity(blocks=40, block_tokens=4, slots=4, step_tokens=16, sequence_tokens=64, vocabulary=50)
    own = FakeRunner(capacity)
    engine = Engine(RankedRunner(own, tape))
    errors: list[ErrorCode | None] = []
    for number in range(1, 9):
        prompt = ints([number % 3] * (3 + number * 2))
        sampling = SamplingParams(seed=number)
        engine.submit(EngineRequest(RequestKey(1, number), prompt, max_tokens=9, sampling=sampling))
        engine.step()
    while engine.has_work:
        errors += [delta.error for delta in engine.step()]
    assert not any(errors)
    tape.send(encode(Order.CLOSE))
    seen: list[StepPlan] = []

    class Watched(Recorder):
        def run(self, plan: StepPlan) -> StepResult:
            seen.append(plan)
            return super().run(plan)

    follow(Watched(), tape)
    assert [p.number for p in seen] == list(range(1, len(seen) + 1))
    assert any(p.saves for p in seen) and any(p.releases for p in seen)
    assert any(a.cached_tokens for p in seen for a in p.assigns)
    assert all(not a.history for p in seen for a in p.assigns)


def test_an_exception_ends_the_loop_of_a_follower() -> None:
    tape = Tape()
    tape.send(encode(Order.RUN, plan(1)))
    tape.send(encode(Order.RUN, plan(2)))
    runner = Recorder()
    runner.fails = True
    with pytest.raises(GroupBroken):
        follow(runner, tape)
    assert runner.told == [1]
    tape.sent[0] = b"no order"
    with pytest.raises(BadCommand):
        follow(runner, tape)


@pytest.mark.parametrize(
    ("error", "fault", "text"),
    [
        (StartFailed(StartFault.MODEL_REFUSED, "not this one"), StartFault.MODEL_REFUSED, "not this one"),
        (ExchangeBroken("rank 2 did not answer"), StartFault.RANK_LOST, "rank 2 did not answer"),
        (RankLost("a rank did not load in time"), StartFault.RANK_LOST, "a rank did not load in time"),
        (GroupBroken("the ranks do not agree"), StartFault.RANK_LOST, "the ranks do not agree"),
        (
            NoSharedWords(38, "several ranks need Linux on x86-64"),
            StartFault.BAD_CONFIG,
            "`tensor_parallel` above 1: several ranks need Linux on x86-64",
        ),
        (MemoryError("canary"), StartFault.OUT_OF_MEMORY, "MemoryError at unknown"),
        (RuntimeError("CUDA out of memory: canary"), StartFault.OUT_OF_MEMORY, "RuntimeError at unknown"),
        (RuntimeError("canary"), StartFault.INTERNAL, "RuntimeError at unknown"),
    ],
)
def test_every_end_has_a_closed_cause_and_shows_no_foreign_text(
    error: Exception, fault: StartFault, text: str
) -> None:
    assert diagnose(error) == (fault, text)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    told = runner_config(
        EngineConfig(model_dir=".", threads=8, kv_mib=100, quantize="int8-block", surgery="on")
    )
    assert (told.threads, told.kv_mib, told.quantize, told.surgery) == (8, 100, "int8-block", "on")
    assert [division.threads(told, size) for size in (1, 3, 4, 64)] == [8, 2, 2, 1]
    monkeypatch.setattr(shape, "physical_cores", lambda: 4)
    assert [division.threads(RunnerConfig(), size) for size in (1, 2, 64)] == [4, 2, 1]


def test_a_follower_without_its_parent_does_not_start() -> None:
    numbers = [part for name in FDS for part in (name, "0")]
    command = [sys.executable, "-m", "container.ranks.follower", "--rank", "1", "--parent", "1", *numbers]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_rank_s_words_are_its_own() -> None:
    fd = create(3)
    ours, theirs = RankStatus(fd), RankStatus(fd)
    before = theirs.signs(3)
    ours.progress(1, Stage.LOADING)
    ours.progress(2, Stage.READY)
    ours.fail(2, StartFault.OUT_OF_MEMORY)
    assert [theirs.stage(rank) for rank in range(3)] == [Stage.STARTING, Stage.LOADING, Stage.READY]
    assert [theirs.fault(rank) for rank in range(3)] == [*[StartFault.NONE] * 2, StartFault.OUT_OF_MEMORY]
    assert [now != was for now, was in zip(theirs.signs(3), before, strict=True)] == [False, True, True]
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("counter", "wanted", "is_reached"),
    [(0, 0, True), (0, 1, False), (5, 3, True), (0, 2**32 - 1, True), (2**32 - 1, 0, False), (3, -60, True)],
)
def test_a_counter_that_wrapped_is_still_past_what_it_passed(
    counter: int, wanted: int, is_reached: bool
) -> None:
    assert reached(counter, wanted) is is_reached


def test_other_processors_are_refused_and_not_hoped_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(NoSharedWords, match="x86-64"):
        make("ring", 64)


def test_a_wait_ends_with_its_time_and_a_bad_one_is_an_error() -> None:
    memory = Memory(make("words", 64))
    memory.wait(0, 0, 0.01)
    memory.wait(0, 1, 5.0)  # it is not 1 any more: returns at once
    assert not memory.wait_beyond(0, 1, 0.0, 0.0)
    with pytest.raises(AssertionError, match="inside the memory"):
        memory.wake(99)
    memory.close()
