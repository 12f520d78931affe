"""Kernels that are missing, fail or are wrong never serve: torch's own operators do, and one line says so."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from container.kernels.gpu import attention_reference
from container.model import device_start
from container.model.device import Activation, HeadShape, LayerPages, Operators, StepRows, Weight
from container.model.device_cpu import CpuDevice, PlainOperators
from container.model.device_cuda import CudaDevice
from container.model.device_operators import CACHE, chosen, keep_compiled, right
from container.model.device_torch import TorchOperators
from container.model.device_triton import TritonOperators
from tests.kernels.gpu.attention_cases import make, random_case
from tests.model import devices
from tests.model.devices import SMALL_CAPTURES, continued, prompts
from tests.model.driving import greedy

CPU = torch.device("cpu")


class WrongNorm(PlainOperators):
    def rms_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        return super().rms_norm(hidden, weight, epsilon, residual) * 1.2


class WrongGate(PlainOperators):
    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return super().gated(gate_up, activation) + 0.1


class WrongAttention(PlainOperators):
    def attend(self, query: Tensor, shape: HeadShape, rows: StepRows, pages: LayerPages) -> Tensor:
        return super().attend(query, shape, rows, pages).roll(1, 0)


class WrongPlaces(PlainOperators):
    def rotate_and_store(self, qkv, shape, angles, norms, epsilon, rows, pages):  # type: ignore[no-untyped-def]
        pages.keys[0, 0] += 1  # page 0 is nobody's
        return super().rotate_and_store(qkv, shape, angles, norms, epsilon, rows, pages)


class WrongProduct(PlainOperators):
    def linear(self, hidden: Tensor, weight: Weight) -> Tensor:
        return super().linear(hidden, weight).nan_to_num() * float("nan")


@pytest.mark.parametrize("operators", [TritonOperators(), TorchOperators(), PlainOperators()])
def test_operators_that_are_right_pass_their_trial(operators: Operators) -> None:
    assert right(operators, CPU, torch.float32)


@pytest.mark.parametrize("wrong", [WrongNorm, WrongGate, WrongAttention, WrongPlaces, WrongProduct])
def test_an_operator_that_is_wrong_fails_the_trial(wrong: type[PlainOperators]) -> None:
    assert not right(wrong(), CPU, torch.float32)


def missing() -> Operators:
    raise ImportError


def broken() -> Operators:
    raise RuntimeError("no compiler at /somewhere")


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [(missing, "Triton is missing"), (broken, "fail (RuntimeError)"), (WrongNorm, "something else")],
)
def test_torch_s_own_operators_serve_instead_and_one_line_says_so(
    kernels: Callable[[], Operators], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(chosen(kernels, CPU, torch.float32), TorchOperators)
    (line,) = (record.getMessage() for record in caplog.records)
    assert reason in line and "scaled_dot_product_attention" in line and "/" not in line


def test_kernels_that_are_right_serve_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(chosen(TritonOperators, CPU, torch.float32), TritonOperators)
    assert not caplog.records


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device_start.kernels(), TritonOperators)
    monkeypatch.setitem(sys.modules, "container.model.device_triton", None)
    with pytest.raises(ImportError):
        device_start.kernels()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_tokens_of_torch_s_operators_are_those_of_the_reference(kind: str) -> None:
    given = prompts(13, 1, 22)
    runner = devices.runner(kind, CpuDevice(TorchOperators()), SMALL_CAPTURES)
    assert greedy(runner, given, 5, 8) == [continued(kind, prompt, 5) for prompt in given]


@pytest.mark.parametrize("seed", range(40))
def test_attention_by_torch_is_that_of_the_reference_on_random_shapes(seed: int) -> None:
    """The cases of the kernels, in poisoned pages, without what a layer here has not."""
    drawn = random_case(seed)
    shaped = replace(drawn.shape, softcap=None, value_dim=drawn.shape.key_dim)
    case = replace(drawn, shape=shaped, fp8=False, sinks=False, dtype=torch.float32)
    made = make(case)
    rows = made.rows
    shape = HeadShape(
        case.shape.heads, case.shape.kv_heads, case.shape.key_dim, case.shape.scale, case.shape.window
    )
    step = StepRows(rows.starts, rows.lengths, rows.slots, rows.table, rows.starts, rows.starts, False)
    query = made.query.float()
    pages = LayerPages(made.keys.float(), made.values.float())
    found = TorchOperators().attend(query, shape, step, pages).view(query.shape)
    want = torch.zeros(query.shape, dtype=torch.float64)
    attention_reference.attend(
        query, pages.keys, pages.values, want, rows.starts, rows.lengths, rows.slots, rows.table,
        scale=shape.scale, window=shape.window,
    )  # fmt: skip
    assert torch.allclose(found.double(), want, atol=5e-5, rtol=5e-5)


def test_operators_that_read_on_the_host_are_launched_rather_than_captured() -> None:
    device = object.__new__(CudaDevice)
    device._captures = False
    launched: list[int] = []
    device.capture(lambda: launched.append(1))()
    assert launched == [1, 1]


def test_compiled_kernels_are_kept_where_they_can_be_written(tmp_path: Path) -> None:
    given = {CACHE: "/proc/nowhere", "HOME": str(tmp_path)}
    assert keep_compiled(given) == Path("/proc/nowhere"), "what is set is not judged"
    home = {"HOME": str(tmp_path)}
    assert keep_compiled(home) == tmp_path / ".triton" / "cache" == Path(home[CACHE])
    for bare in ({"HOME": "/proc/nowhere"}, {}):
        folder = keep_compiled(bare)
        assert folder.is_dir() and bare[CACHE] == str(folder)
        folder.rmdir()
