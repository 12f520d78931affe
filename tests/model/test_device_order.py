"""What overlaps on a device: order and gaps between steps, by a clock that nothing but the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from container.engine.step import ROW_FED, ROW_SAMPLES, StepPlan
from container.model.device_cpu import CpuDevice
from container.model.device_runner import DeviceRunner
from tests.model import devices
from tests.model.devices import SMALL_CAPTURES, continued, prompts
from tests.model.driving import Driven, Driver

STEP_S = 5.0  # what the device takes for a forward
COPY_S = 0.125
HOST_S = 3.0  # what planning and answering take on the host


@dataclass
class FakeClock:
    """Time on the host, and until when the device is busy."""

    host_s: float = 0.0
    device_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # idle time of the device before each forward

    def enqueue(self, seconds: float, *, forward: bool = False) -> float:
        begin = max(self.host_s, self.device_s)
        if forward:
            self.gaps_s.append(begin - self.device_s)
        self.device_s = begin + seconds
        return self.device_s


@dataclass
class FakeMarker:
    clock: FakeClock
    at_s: float

    def wait(self) -> None:
        self.clock.host_s = max(self.clock.host_s, self.at_s)


class FakeDevice(CpuDevice):
    """The CPU with a device's sense of time: launches return at once, waiting costs what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.uploads = 0

    def upload(self, source: Tensor, to: Tensor) -> FakeMarker:  # type: ignore[override]
        super().upload(source, to)
        self.uploads += 1
        return FakeMarker(self.clock, self.clock.host_s)

    def download(self, source: Tensor, to: Tensor) -> FakeMarker:  # type: ignore[override]
        super().download(source, to)
        return FakeMarker(self.clock, max(self.clock.host_s, self.clock.device_s) + COPY_S)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.clock.enqueue(STEP_S, forward=True)
            launch()

        return replay


def decoding(steps: int, *, ahead: bool) -> tuple[FakeDevice, list[int], list[int]]:
    """Decode one sequence; return the device, its tokens, and what the reference says."""
    device = FakeDevice()
    runner = devices.runner("llama", device, SMALL_CAPTURES)
    driver = Driver(runner)
    prompt = prompts(9)[0]
    sequence = driver.start(0, prompt)
    driver.row(sequence, 9)
    produced: list[int] = []
    run = pipelined if ahead else waited
    run(runner, driver, sequence, produced, steps)
    return device, produced, continued("llama", prompt, steps)


def pipelined(
    runner: DeviceRunner, driver: Driver, sequence: Driven, produced: list[int], steps: int
) -> None:
    """Launch a step before the one before it was collected."""
    clock = runner._model.device.clock  # type: ignore[attr-defined]
    under_way = runner.launch(driver._plan)
    for number in range(1, steps + 1):
        following = None
        if number < steps:
            driver._plan = StepPlan(number)
            sequence.tokens.append(0)
            driver.row(sequence, 1, ROW_SAMPLES | ROW_FED)
            clock.host_s += HOST_S / 2
            following = runner.launch(driver._plan)
        produced.append(runner.collect(under_way).rows[0].sampled.token)  # type: ignore[union-attr]
        clock.host_s += HOST_S / 2
        if following is not None:
            under_way = following


def waited(runner: DeviceRunner, driver: Driver, sequence: Driven, produced: list[int], steps: int) -> None:
    """Collect each step before the next one is planned."""
    clock = runner._model.device.clock  # type: ignore[attr-defined]
    for _ in range(steps):
        row = driver.step().rows[0]
        sequence.tokens.append(row.sampled.token)  # type: ignore[union-attr]
        produced.append(sequence.tokens[-1])
        driver.row(sequence, 1)
        clock.host_s += HOST_S


def test_a_device_never_waits_for_a_host_that_is_faster() -> None:
    device, produced, want = decoding(8, ahead=True)
    assert produced == want
    assert sum(device.clock.gaps_s[2:]) == 0.0
    assert len(device.clock.gaps_s) == 8


def test_without_running_ahead_every_gap_is_the_hosts_work() -> None:
    """The guard of the test above: the clock does see gaps."""
    device, produced, want = decoding(8, ahead=False)
    assert produced == want
    assert device.clock.gaps_s[2:] == [pytest.approx(HOST_S + COPY_S)] * 6


def test_a_step_is_one_copy_to_the_device() -> None:
    device, _, _ = decoding(8, ahead=True)
    assert device.uploads == 8 + len(SMALL_CAPTURES)


def test_sampling_on_the_host_waits_before_the_next_launch() -> None:
    """Its logits lie where the next step of the same size writes."""
    device = FakeDevice()
    runner = devices.runner("llama", device, SMALL_CAPTURES)
    driver = Driver(runner)
    sequence = driver.start(0, prompts(5)[0], devices.SamplingParams(temperature=0.5, seed=1))
    driver.row(sequence, 5)
    ticket = runner.launch(driver._plan)
    assert ticket.result is not None and runner.collect(ticket) is ticket.result


def test_a_staging_buffer_is_written_again_after_its_copy_only() -> None:
    runner = devices.runner("llama")
    model = runner._model
    order: list[str] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            order.append(self.name)

    driver = Driver(runner)
    sequence = driver.start(0, prompts(9)[0])
    for turn in range(4):
        driver.row(sequence, 2, 0)
        driver.step()
        model._copied[turn % 2] = Watched(f"copy {turn}")
    assert order == ["copy 0", "copy 1"]
    assert model._staging[0].data_ptr() != model._staging[1].data_ptr()
    assert torch.equal(model._inbox[:2], model._staging[1][:2])
