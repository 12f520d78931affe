"""Starting with a quantized model: native runners, what facts tell, what stops the start."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from container.model import build
from container.model.preparation import Preparation, facts_of
from container.model.quantize_choose import Choice, Facts, QuantizeRefused, Scheme
from container.model.quantize_modules import PackedLinear
from tests.model.driving import CONFIG, greedy
from tests.model.test_build import start
from tests.model.tiny import VOCABULARY, reference_model, tiny_config, tiny_source

WEIGHTS_ONLY = (Scheme.NONE, Scheme.BNB_NF4, Scheme.INT4_BLOCK)
SERVED = [scheme for scheme in Scheme if scheme is not Scheme.FP8]


def prepared(scheme: str) -> Preparation:
    return Preparation(scheme, facts_of(tiny_config("llama"), torch.float32), frozenset())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("llama", scheme) for scheme in SERVED]
    + [(kind, Scheme.INT8_BLOCK) for kind in ("gemma2", "deepseek_v3", "gpt_oss", "gpt2")],
)
def test_a_quantized_model_runs_natively(kind: str, scheme: Scheme) -> None:
    runner, facts = start(replace(CONFIG, quantize=scheme.value), tiny_source(kind))
    assert (facts.runner, facts.reason, facts.quantize) == ("native", None, scheme.value)
    prompts = [[5, 9, 11, 4, 8], [7], [33, 2, 90]]
    together = greedy(runner, prompts, 5, 3)
    assert [len(answer) for answer in together] == [5, 5, 5]
    if scheme in WEIGHTS_ONLY:  # quantized activations may round otherwise when sums run in another order
        assert together == [greedy(runner, [prompt], 5, 8)[0] for prompt in prompts]


def test_facts_tell_the_scheme_the_reason_and_the_counts() -> None:
    _, facts = start(replace(CONFIG, quantize="int8-block"), tiny_source("llama"))
    assert facts.quantize_reason.startswith("asked for")
    assert "14 linear layers" in facts.quantized
    assert "1 left (output)" in facts.quantized
    _, facts = start(replace(CONFIG, quantize="auto"), tiny_source("llama"))
    assert facts.quantize == "none"
    assert facts.quantize_reason


def test_compat_serves_a_quantized_model_too() -> None:
    runner, facts = start(replace(CONFIG, quantize="int8-block"), tiny_source("bloom"))
    assert (facts.runner, facts.quantize) == ("compat", "int8-block")
    assert len(greedy(runner, [[5, 6, 7]], 4, 8)[0]) == 4


def test_fp8_stops_the_start_on_a_machine_without_it() -> None:
    with pytest.raises(QuantizeRefused, match="fp8"):
        start(replace(CONFIG, quantize="fp8"), tiny_source("llama"))


def test_a_scheme_that_fits_no_layer_stops_the_start() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 40))
    with pytest.raises(QuantizeRefused, match="fits no layer"):
        prepared("int8-block").complete(model)


def test_activations_that_overflow_stop_the_start() -> None:
    model: Any = copy.deepcopy(reference_model("llama"))
    model.model.layers[0].post_attention_layernorm.weight.mul_(1e6)  # beyond what fp16 holds
    with pytest.raises(QuantizeRefused, match="overflow under `bnb-int8`"):
        prepared("bnb-int8").check(copy.deepcopy(model), VOCABULARY)
    made = prepared("int8-block")
    made.check(model, VOCABULARY)
    assert made.choice == Choice(
        Scheme.INT8_BLOCK, "asked for; without a native kernel: saves memory, costs speed"
    )


def test_the_probe_sees_a_fault_in_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized activations would hide it: two correct ways already differ by percents."""
    honest = PackedLinear.forward
    calls = 0

    def faulty(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(self, x) * (1.0 if x.shape[1] in (9, 13) else 1.01)

    monkeypatch.setattr(PackedLinear, "forward", faulty)
    _, facts = start(replace(CONFIG, quantize="int8-block"), tiny_source("llama"))
    assert calls
    assert (facts.runner, str(facts.reason)) == ("compat", "probe_diff")


def test_facts_of_the_machine_count_what_no_scheme_touches() -> None:
    model = reference_model("llama")
    facts = facts_of(tiny_config("llama"), torch.float32)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert (facts.device, facts.capability, facts.weight_bytes) == ("cpu", None, 4)
    assert facts.model_bytes == total
    assert facts.kept_bytes == 2 * VOCABULARY * 64 * 4
    assert facts.memory_bytes > 0


def test_auto_quantizes_where_full_precision_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = facts_of

    def cramped(config: Any, dtype: torch.dtype) -> Facts:
        facts = honest(config, dtype)
        return replace(facts, flags=frozenset({"avx2"}), memory_bytes=facts.model_bytes)

    monkeypatch.setattr(build, "facts_of", cramped)
    _, facts = start(replace(CONFIG, quantize="auto"), tiny_source("llama"))
    assert facts.quantize == "int8-block"
    assert "does not fit" in facts.quantize_reason
