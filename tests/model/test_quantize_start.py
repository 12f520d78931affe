"""Starting with a quantized model: native runners, what facts tell, what stops the start."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from container.model import build, fused, surgery
from container.model.grammar import over
from container.model.preparation import Preparation, facts_of
from container.model.quantize_choose import Choice, Facts, QuantizeRefused, Scheme
from container.model.quantize_modules import PackedLinear
from tests.model.driving import CONFIG, greedy
from tests.model.test_build import start
from tests.model.tiny import VOCABULARY, TinySource, reference_model, tiny_config, tiny_source

WEIGHTS_ONLY = (Scheme.NONE, Scheme.BNB_NF4, Scheme.INT4_BLOCK)
SERVED = [scheme for scheme in Scheme if scheme is not Scheme.FP8]


def prepared(scheme: str) -> Preparation:
    return Preparation(scheme, facts_of(tiny_config("llama"), torch.float32), frozenset())


def overflowing(scheme: str, model: Any) -> None:
    made = prepared(scheme)
    made.complete(model)
    made.check_finite(model, VOCABULARY)


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
    assert "15 linear layers" in facts.quantized  # the head among them
    _, facts = start(replace(CONFIG, quantize="int4-block"), tiny_source("llama"))
    assert "15 linear layers" in facts.quantized and facts.operators == "fused"
    _, facts = start(replace(CONFIG, quantize="bnb-nf4"), tiny_source("llama"))
    assert "14 linear layers" in facts.quantized
    assert "1 left (output)" in facts.quantized
    _, facts = start(replace(CONFIG, quantize="auto"), tiny_source("llama"))
    assert facts.quantize == "int8-block"
    assert facts.quantize_reason == "native int8 blocks on this CPU"


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
        overflowing("bnb-int8", copy.deepcopy(model))
    made = prepared("int8-block")
    made.complete(model)
    made.check_finite(model, VOCABULARY)
    assert made.choice == Choice(Scheme.INT8_BLOCK, "asked for")


def test_the_probe_sees_a_fault_in_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized activations would hide it: two correct ways already differ by percents."""
    monkeypatch.setattr(fused, "fuse", lambda *_: None)  # which would leave the modules
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
        memory = facts.model_bytes
        return replace(facts, flags=frozenset({"avx2"}), memory_bytes=memory, block_kernel=False)

    monkeypatch.setattr(build, "facts_of", cramped)
    _, facts = start(replace(CONFIG, quantize="auto"), tiny_source("llama"))
    assert facts.quantize == "int8-block"
    assert "does not fit" in facts.quantize_reason


def test_layers_are_fused_before_they_are_quantized() -> None:
    _, facts = start(replace(CONFIG, quantize="int8-block", surgery="on"), tiny_source("llama"))
    assert (facts.runner, facts.quantize) == ("native", "int8-block")
    assert facts.fused == {"qkv": 2, "gate_up": 2, "norm": 5 - 1}  # the last norm is in no layer
    assert "9 linear layers" in facts.quantized


def test_surgery_that_breaks_a_quantized_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("not the tensor the head was given")

    def spoil(layer: Any, parts: object) -> surgery.Fused:
        fused = surgery.Fused()
        if parts:
            fused.replace(layer.self_attn, "q_proj", Broken())
            fused.counts[surgery.Part.QKV] += 1
        return fused

    monkeypatch.setattr(surgery, "fuse", spoil_or(spoil))
    _, facts = start(replace(CONFIG, quantize="int8-block", surgery="on"), tiny_source("llama"))
    assert (facts.runner, facts.quantize, facts.fused) == ("native", "int8-block", {})


def spoil_or(spoil: Any) -> Any:
    """Return `fuse` that spoils single layers and leaves whole models to the real one."""
    real = surgery.fuse
    return lambda module, parts, *trial: (real if trial else spoil)(module, parts, *trial)


def test_grammars_are_served_for_a_checkpoint_that_comes_quantized() -> None:
    config = {"model_type": "llama", "eos_token_id": 2}
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    assert over(TinySource(files, {})) is not None
