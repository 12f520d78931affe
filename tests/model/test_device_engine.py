"""The serving engine on a device's runner: one step ahead, tokens of step by step, no gap by a fake clock."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import replace

import pytest

from container.engine.engine import Engine, EngineLimits
from container.engine.request import EngineRequest, FinishReason, Grammar, RequestKey, SamplingParams
from container.engine.step import ROW_FED, Capacity, SlotAssignment, StepPlan, StepResult
from container.model.device_cpu import CpuDevice
from container.model.device_runner import DeviceRunner, Ticket
from container.model.masks import Verdict
from container.model.sampler import Sampler
from tests.engine.fake_grammars import FakeGrammars, grammar
from tests.model import devices
from tests.model.devices import SMALL_CAPTURES, VOCABULARY, continued, prompts
from tests.model.test_device_order import COPY_S, HOST_S, STEP_S, FakeDevice

HELD_TOKENS = 3  # after so many the grammar of these tests is complete
GREEDY = SamplingParams(temperature=0.0)


class CountingSampler(Sampler):
    """Draws as it would without a grammar, and says that a grammar is complete after HELD_TOKENS."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.drawn: dict[int, int] = {}  # by slot that is held to a grammar

    @property
    def holds_grammars(self) -> bool:
        return True

    def assign(self, assignment: SlotAssignment) -> None:
        self.drawn.pop(assignment.slot, None)
        if assignment.sampling.grammar is not None:
            self.drawn[assignment.slot] = len(assignment.history) - assignment.prompt_tokens
        super().assign(replace(assignment, sampling=replace(assignment.sampling, grammar=None)))

    def sample(self, logits, slots, positions, hold_stops):  # type: ignore[no-untyped-def]
        for slot in slots:
            if slot in self.drawn:
                self.drawn[slot] += 1
        return super().sample(logits, slots, positions, hold_stops)

    def verdict(self, slot: int) -> Verdict | None:
        if slot not in self.drawn:
            return None
        return Verdict.COMPLETE if self.drawn[slot] == HELD_TOKENS else Verdict.OPEN


class Watched(DeviceRunner):
    """Notes what was launched, and how many steps were under way."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.fed = self.launched = self.deepest = 0

    def launch(self, plan: StepPlan) -> Ticket:
        ticket = super().launch(plan)
        self.launched += 1
        self.fed += sum(flags & ROW_FED > 0 for flags in plan.flags)
        self.deepest = max(self.deepest, len(self._under_way))
        return ticket


class StepByStep:
    """The same runner for an engine that is not told that it runs ahead."""

    def __init__(self, own: DeviceRunner) -> None:
        self._own = own

    def capacity(self) -> Capacity:
        return replace(self._own.capacity(), runs_ahead=False)

    def run(self, plan: StepPlan) -> StepResult:
        return self._own.run(plan)

    def reset(self) -> None:
        self._own.reset()

    def close(self) -> None:
        self._own.close()


def runner(device: CpuDevice) -> Watched:
    held = devices.weights("llama")
    model = devices.DeviceModel(device, held, devices.SIZES.limits(), captures=SMALL_CAPTURES)
    return Watched(
        model, CountingSampler(VOCABULARY), devices.score, devices.SIZES, devices.SIZES.capacity(VOCABULARY)
    )


def engine(own: DeviceRunner | StepByStep) -> Engine:
    grammars = FakeGrammars()
    grammars.at_once = True
    return Engine(own, EngineLimits(), boot_key=bytes(32), grammars=grammars)


def request(id: int, prompt: list[int], most: int, sampling: SamplingParams = GREEDY, **more: object):  # type: ignore[no-untyped-def]
    return EngineRequest(RequestKey(0, id), array("i", prompt), most, sampling=sampling, **more)  # type: ignore[arg-type]


def held_to(text: str) -> Grammar:
    return grammar(text)


def mixed(served: Engine) -> dict[int, tuple[list[int], FinishReason | None]]:
    """Joins, leaves, a cancel, a shared preamble, a stop token, a grammar, a seeded draw; what each said."""
    said: defaultdict[int, list[int]] = defaultdict(list)
    ends: dict[int, FinishReason | None] = {}

    def step() -> None:
        for delta in served.step():
            said[delta.key.id] += [sampled.token for sampled in delta.tokens]
            assert delta.error is None and delta.key.id not in ends
            if delta.finish is not None:
                ends[delta.key.id] = delta.finish
        served.check()

    first, second, preamble = prompts(9, 5, 16)
    stop = continued("llama", first, 4)[-1]
    served.submit(request(1, first, 20, stop_token_ids=frozenset({stop})))
    served.submit(request(2, [*preamble, 7], 9))
    for _ in range(3):
        step()
    served.submit(request(3, [*preamble, 8], 6))
    served.submit(request(4, second, 30))
    for _ in range(4):
        step()
    served.cancel(RequestKey(0, 4))
    served.submit(request(5, first, 8, replace(GREEDY, grammar=held_to("counts 3 0"))))
    served.submit(request(6, second, 5, SamplingParams(temperature=0.7, seed=5)))
    while served.has_work:
        step()
    assert len(said.pop(4)) >= 1 and ends.pop(4) is FinishReason.CANCELLED
    return {id: (tokens, ends[id]) for id, tokens in said.items()}


def test_tokens_are_those_of_step_by_step_over_a_mixed_load() -> None:
    ahead, beside = runner(CpuDevice()), runner(CpuDevice())
    found, want = mixed(engine(ahead)), mixed(engine(StepByStep(beside)))
    assert found == want and set(found) == {1, 2, 3, 5, 6}
    first = prompts(9, 5, 16)[0]
    stop = continued("llama", first, 4)[-1]
    assert found[1][0] == continued("llama", first, 4)[: continued("llama", first, 4).index(stop) + 1]
    assert found[1][1] is FinishReason.STOP_TOKEN
    assert found[5] == (continued("llama", first, HELD_TOKENS), FinishReason.GRAMMAR)
    assert ahead.fed > 10 and ahead.deepest == 2 and beside.fed == 0
    ahead.close()
    beside.close()


def test_what_a_cancelled_request_left_is_wiped_and_taken_again() -> None:
    own = runner(CpuDevice())
    served = engine(own)
    for id in range(1, 9):
        served.submit(request(id, prompts(20, seed=id)[0], 30))
    said: defaultdict[int, list[int]] = defaultdict(list)
    for turn in range(200):
        for delta in served.step():
            said[delta.key.id] += [sampled.token for sampled in delta.tokens]
        if turn % 3 == 2:
            served.cancel(RequestKey(0, 1 + turn // 3))
        served.check()
        if not served.has_work:
            break
    for id, tokens in said.items():
        assert tokens == continued("llama", prompts(20, seed=id)[0], len(tokens))
    assert served.stats().cancelled == 8 and served.stats().kv_blocks_used == 0
    own.close()


def decode(own: DeviceRunner | StepByStep, device: FakeDevice, count: int) -> list[int]:
    """Serve one request of `count` tokens; the host takes HOST_S around each step, half of it before."""
    served = engine(own)
    prompt = prompts(9)[0]
    served.submit(request(1, prompt, count))
    made: list[int] = []
    while served.has_work:
        device.clock.host_s += HOST_S / 2
        for delta in served.step():
            made += [sampled.token for sampled in delta.tokens]
        device.clock.host_s += HOST_S / 2
    assert made == continued("llama", prompt, count)
    return made


def test_a_device_is_never_idle_between_the_engines_steps() -> None:
    device = FakeDevice()
    own = runner(device)
    decode(own, device, 12)
    gaps = device.clock.gaps_s
    assert len(gaps) == 12 and own.launched == 12
    assert sum(gaps[2:]) == 0.0, "the device waited for the host"


def test_step_by_step_every_gap_is_the_hosts_work() -> None:
    """The guard of the test above."""
    device = FakeDevice()
    decode(StepByStep(runner(device)), device, 12)
    assert device.clock.gaps_s[2:] == [pytest.approx(HOST_S + COPY_S)] * 10


def test_a_host_slower_than_the_device_costs_what_it_is_slower_by() -> None:
    device = FakeDevice()
    slow = 2 * STEP_S / HOST_S
    served = engine(runner(device))
    served.submit(request(1, prompts(9)[0], 12))
    while served.has_work:
        device.clock.host_s += slow * HOST_S
        served.step()
    assert all(gap <= slow * HOST_S - STEP_S + COPY_S for gap in device.clock.gaps_s[2:])
