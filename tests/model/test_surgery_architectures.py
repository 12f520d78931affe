"""Every architecture gives its own logits after surgery, and what was replaced is on record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from container.model.surgery import Part
from tests.model.surgery_table import KINDS, TABLE, operate, outcome, packed_logits, render, tiny_model

TOLERANCE = 1e-5  # relative, fp32; sums in another order give up to about 1e-6


def test_the_list_holds_at_least_thirty_architectures() -> None:
    assert len(KINDS) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_stay_the_same(kind: str) -> None:
    assert outcome(kind).error <= TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2", "qwen3_moe", "deepseek_v3", "gemma4_text"])
def test_packed_logits_stay_within_rounding_in_bfloat16(kind: str) -> None:
    result = operate(kind, torch.bfloat16)
    assert result.fused.counts == outcome(kind).fused.counts
    assert result.error <= 0.005


@pytest.mark.parametrize("part", Part)
def test_each_part_can_be_replaced_alone(part: Part) -> None:
    result = operate("llama", parts=frozenset({part}))
    assert set(result.fused.counts) == {part}
    assert result.error <= TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3", "gemma3_text", "phi"])
def test_undone_surgery_leaves_the_model_as_it_was(kind: str) -> None:
    result = operate(kind)
    untouched = tiny_model(kind)
    result.fused.undo()
    assert not result.fused.counts
    assert list(result.model.state_dict()) == list(untouched.state_dict())
    assert all(
        torch.equal(tensor, untouched.state_dict()[name])
        for name, tensor in result.model.state_dict().items()
    )
    assert [type(m) for m in result.model.modules()] == [type(m) for m in untouched.modules()]
    assert torch.equal(packed_logits(result.model), result.before)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "deepseek_v3"])
def test_every_weight_is_found_once_in_a_plain_linear_layer(kind: str) -> None:
    model, untouched = outcome(kind).model, tiny_model(kind)

    def elements(root: nn.Module) -> int:
        linears = [m for m in root.modules() if type(m) is nn.Linear]
        return sum(linear.weight.numel() for linear in linears)

    assert elements(model) == elements(untouched)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert any(name.endswith(".qkv") for name in names)
    assert not any(name.endswith(("k_proj", "v_proj", "gate_proj")) for name in names)


def test_a_gated_layer_that_normalizes_in_between_keeps_its_own_form() -> None:
    assert outcome("bitnet").fused.counts == {Part.QKV: 2, Part.NORM: 9}


def test_the_table_of_surgery_is_current() -> None:
    assert TABLE.read_text(encoding="utf-8") == render()
