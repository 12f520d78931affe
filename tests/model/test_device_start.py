"""A start with a device in reach: what fits it is served from it, what does not goes on as without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from container.model import device_start
from container.model.build import assemble
from container.model.device import Weight
from container.model.device_cpu import CpuDevice, PlainOperators
from container.model.device_runner import DeviceRunner
from container.model.shape import SizingError
from tests.model.devices import continued, prompts
from tests.model.driving import CONFIG, greedy
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import tiny_source


class SmallDevice(CpuDevice):
    def free_bytes(self) -> int:
        return 8 << 20


class WrongOperators(PlainOperators):
    """Off by little in one product of many."""

    def linear(self, hidden: Tensor, weight: Weight) -> Tensor:
        return super().linear(hidden, weight) * 1.01


def start(kind: str, monkeypatch: pytest.MonkeyPatch, device: CpuDevice | None, **changes: object):
    monkeypatch.setattr(device_start, "found", lambda: device)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return assemble(config, tiny_source(kind), lambda phase: None, GreedySampler, score)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_a_model_of_the_common_form_is_served_from_the_device(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, facts = start(kind, monkeypatch, SmallDevice())
    assert isinstance(runner, DeviceRunner) and (facts.runner, facts.operators) == ("native", "device")
    given = prompts(9, 4)
    assert greedy(runner, given, 4, 8) == [continued(kind, prompt, 4) for prompt in given]
    runner.close()


def test_a_device_that_computes_wrongly_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, facts = start("llama", monkeypatch, SmallDevice(WrongOperators()))
    assert not isinstance(runner, DeviceRunner) and facts.operators != "device"
    given = prompts(9)
    assert greedy(runner, given, 4, 8) == [continued("llama", given[0], 4)]


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "qwen3_moe"])
def test_a_model_of_another_form_is_served_as_without_a_device(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, facts = start(kind, monkeypatch, SmallDevice())
    assert not isinstance(runner, DeviceRunner) and facts.operators != "device"


def test_a_device_computes_in_bfloat16_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, facts = start("llama", monkeypatch, SmallDevice(), dtype="auto")
    assert facts.dtype == "bfloat16"


def test_sizes_follow_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = start("llama", monkeypatch, SmallDevice(), kv_mib=None, running_limit=None, step_tokens=None)
    capacity = runner.capacity()
    token_bytes = 2 * 2 * 16 * 4 * 2  # keys and values, heads, dim, float32, layers
    assert capacity.blocks * capacity.block_tokens * token_bytes <= 0.9 * (8 << 20)
    assert (capacity.slots, capacity.step_tokens) == (device_start.RUNNING, device_start.STEP_TOKENS)


def test_a_sequence_that_the_device_cannot_hold_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(CpuDevice):
        def free_bytes(self) -> int:
            return 4096

    with pytest.raises(SizingError, match="memory for keys and values"):
        start("llama", monkeypatch, Full(), kv_mib=None)


def test_without_an_accelerator_none_is_found() -> None:
    assert torch.accelerator.is_available() or device_start.found() is None
