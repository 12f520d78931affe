"""A start with a device in reach: what fits it is served from it, what does not goes on as without one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from container.model import device_format, device_start, ready, shape
from container.model.build import assemble
from container.model.device import Fp8, Int4, Weight
from container.model.device_cpu import CpuDevice, PlainOperators
from container.model.device_runner import DeviceRunner
from container.model.device_triton import TritonOperators
from container.model.quantize_choose import QuantizeRefused, Scheme
from container.model.shape import SizingError
from container.model.start import build_runner
from tests.model.devices import continued, prompts
from tests.model.driving import CONFIG, greedy
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import reference_model, tiny_source


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


def formed_continuation(scheme: Scheme, prompt: list[int], count: int) -> list[int]:
    """Continue `prompt` by transformers' own forward over weights in the device's form."""
    model = copy.deepcopy(reference_model("llama"))
    assert device_format.form(model, device_format.PACKS[scheme]) == 7 * len(model.model.layers)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("scheme", "kind", "interpreted"),
    [(Scheme.FP8, Fp8, False), (Scheme.INT4_BLOCK, Int4, False), (Scheme.INT4_BLOCK, Int4, True)],
)
def test_a_quantized_model_is_served_from_the_device(
    scheme: Scheme, kind: type, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SmallDevice(TritonOperators() if interpreted else None, capability=(9, 0))
    runner, facts = start("llama", monkeypatch, device, quantize=scheme.value)
    assert isinstance(runner, DeviceRunner) and facts.operators == "device"
    assert (facts.quantize, facts.quantize_reason) == (scheme.value, "asked for")
    for layer in runner._model.weights.layers:
        for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert isinstance(weight, kind)
    given = prompts(9, 4)
    found = greedy(runner, given, 4, 8)
    assert found == [formed_continuation(scheme, prompt, 4) for prompt in given]
    assert runner._model.weight_bytes < sum(p.nbytes for p in reference_model("llama").parameters())
    runner.close()


def test_a_device_that_multiplies_fewer_bits_wrongly_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(WrongOperators(), capability=(9, 0))
    runner, facts = start("llama", monkeypatch, device, quantize="int4-block")
    assert not isinstance(runner, DeviceRunner) and facts.operators != "device"
    assert facts.quantize == "int4-block"


def test_fp8_is_refused_by_a_device_that_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuantizeRefused, match=r"8\.9"):
        start("llama", monkeypatch, SmallDevice(capability=(8, 0)), quantize="fp8")


def test_unasked_a_hopper_device_takes_8_bits_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tight(CpuDevice):
        def free_bytes(self) -> int:
            held = sum(p.nbytes for p in reference_model("llama").parameters())
            return held * 2 // 3  # in bfloat16 half of that: three quarters of the memory

    for device, scheme in ((Tight(capability=(9, 0)), "fp8"), (SmallDevice(capability=(9, 0)), "none")):
        runner, facts = start("llama", monkeypatch, device, quantize="auto")
        assert isinstance(runner, DeviceRunner) and facts.quantize == scheme


def test_what_a_device_does_not_hold_is_served_as_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, facts = start("llama", monkeypatch, SmallDevice(capability=(9, 0)), quantize="int8-block")
    assert not isinstance(runner, DeviceRunner)
    assert (facts.quantize, facts.dtype) == ("int8-block", "float32")


def test_a_decoder_made_ready_for_a_cpu_is_passed_by_where_there_is_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shows, asked = shape.accelerated, list[object]()
    monkeypatch.setattr(ready, "find", lambda config, source: asked.append(source))
    monkeypatch.setattr(device_start, "found", lambda: None)
    for there in (True, False):
        monkeypatch.setattr(shape, "accelerated", lambda there=there: there)
        build_runner(CONFIG, tiny_source("llama"), lambda phase: None)
        assert len(asked) == (0 if there else 1)
    assert shows(tmp_path) and not shows(tmp_path / "nothing")


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
