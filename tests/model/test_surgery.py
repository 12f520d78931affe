"""Parallel linear layers become one, held once, only where nothing changes, and can be taken apart again."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from container.model.shape import SizingError
from container.model.surgery import ALL_PARTS, CPU_PARTS, Part, fuse, parts
from container.model.surgery_check import agree
from tests.model.surgery_layers import (
    MLP,
    WIDTH,
    Attention,
    BackwardsAttention,
    CopyingAttention,
    Downless,
    DownTwice,
    NormalizedBetween,
    OtherLinear,
    Residual,
    Scaled,
    SumOverRanks,
    Swapped,
    TwoArguments,
    hidden_states,
    seeded,
)


def storages(module: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage that the module's parameters lie in, by address."""
    each = [parameter.untyped_storage() for parameter in module.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in each}


@pytest.mark.parametrize("rows", [(24, 8, 8), (8, 24, 3), (5, 5, 5)])
@pytest.mark.parametrize(
    "biases", [(False, False, False), (True, True, True), (True, False, True), (False, True, False)]
)
def test_projections_computed_as_one_give_the_same(
    rows: tuple[int, int, int], biases: tuple[bool, bool, bool]
) -> None:
    model = seeded(lambda: Attention(rows, biases))
    expected = [model(hidden_states(*shape)) for shape in ((1, 1), (1, 7), (2, 3))]
    fused = fuse(model)
    assert dict(fused.counts) == {Part.QKV: 1}
    joined = model[0].q_proj.qkv
    assert type(joined) is nn.Linear
    assert (joined.in_features, joined.out_features) == (WIDTH, sum(rows))
    assert (joined.bias is not None) == any(biases)
    for shape, want in zip(((1, 1), (1, 7), (2, 3)), expected, strict=True):
        torch.testing.assert_close(model(hidden_states(*shape)), want)


def test_sizes_come_from_the_weights_not_from_what_a_layer_says_of_itself() -> None:
    model = seeded(Attention)
    for linear, rows in ((model[0].q_proj, 12), (model[0].k_proj, 4), (model[0].v_proj, 4)):
        linear.weight = nn.Parameter(linear.weight[:rows].clone(), requires_grad=False)  # a rank's slice
    expected = model(hidden_states(1, 5))
    fuse(model)
    assert model[0].q_proj.qkv.out_features == 20
    torch.testing.assert_close(model(hidden_states(1, 5)), expected)


def test_a_layer_alone_can_be_given_as_the_root() -> None:
    layer = seeded(Attention)[0]
    expected = layer(hidden_states(1, 2))
    assert fuse(layer).counts[Part.QKV] == 1
    torch.testing.assert_close(layer(hidden_states(1, 2)), expected)


def test_originals_are_views_of_the_joined_weight_and_nothing_is_held_twice() -> None:
    model = seeded(lambda: nn.Sequential(Attention(biases=(True, False, True)), MLP()))
    originals = [m for m in model.modules() if type(m) is nn.Linear]
    before = {id(linear): linear.weight.clone() for linear in originals}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    fused = fuse(model)
    held = storages(model)
    for linear in originals:
        assert linear.weight.untyped_storage().data_ptr() in held
        assert torch.equal(linear.weight, before[id(linear)])
    zeros = (8 + 40) * 4  # the biases that `k_proj` and `gate_proj` lacked
    assert sum(held.values()) == weights + zeros
    fused.undo()
    assert sum(storages(model).values()) == weights + zeros
    assert set(storages(model)) == set(held)


def test_the_peak_while_fusing_stays_within_a_tenth_of_the_weights() -> None:
    """In a process of its own, so that nothing else allocates: 24 layers of 12 MB."""
    program = """
import resource, torch
from torch import nn
from container.model.surgery import fuse
torch.set_num_threads(1)

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(512, 2048, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(2048, 512, bias=False), nn.SiLU()
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

fuse(nn.Sequential(MLP()).requires_grad_(False))  # what torch allocates once
model = nn.Sequential(*(MLP() for _ in range(24))).requires_grad_(False)
weights = sum(p.nbytes for p in model.parameters())
before = peak()
fused = fuse(model)
assert fused.counts.total() == 24
assert weights > 280 * 2**20
print((peak() - before) / weights)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) <= 0.1


def test_a_tail_refuses_any_tensor_but_the_one_its_head_got() -> None:
    attention = seeded(Attention)[0]
    fuse(attention)
    hidden = hidden_states(1, 3)
    with pytest.raises(AssertionError, match="different inputs"):
        attention.k_proj(hidden)
    attention.q_proj(hidden)
    with pytest.raises(AssertionError, match="different inputs"):
        attention.k_proj(hidden.clone())
    attention.k_proj(hidden)
    with pytest.raises(AssertionError, match="different inputs"):
        attention.k_proj(hidden)
    attention.v_proj(hidden)
    with pytest.raises(AssertionError, match="different inputs"):
        attention.v_proj(hidden)


def test_nothing_of_a_request_is_kept_after_the_forward() -> None:
    model = seeded(Attention)
    fuse(model)
    hidden = hidden_states(1, 3)
    gone = weakref.ref(hidden)
    model(hidden)
    del hidden
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("owner", [CopyingAttention, BackwardsAttention])
def test_projections_that_a_trial_shows_to_differ_in_input_or_order_are_left(owner: type[Attention]) -> None:
    model = seeded(owner)
    members = list(model[0].children())
    hidden = hidden_states(1, 3)
    expected = model(hidden)
    fused = fuse(model, trial=lambda: model(hidden))
    assert not fused.counts
    assert list(model[0].children()) == members
    assert not any(member._forward_pre_hooks for member in members)
    assert torch.equal(model(hidden), expected)


@pytest.mark.parametrize("owner", [CopyingAttention, BackwardsAttention])
def test_without_a_trial_different_inputs_fail_loudly_at_the_first_forward(owner: type[Attention]) -> None:
    model = seeded(owner)
    fused = fuse(model)
    with pytest.raises(AssertionError, match="different inputs"):
        model(hidden_states(1, 3))
    fused.undo()
    model(hidden_states(1, 3))


def test_a_trial_that_raises_leaves_the_model_as_it_was() -> None:
    model = seeded(Attention)

    def trial() -> None:
        raise RuntimeError("the model cannot run")

    with pytest.raises(RuntimeError, match="cannot run"):
        fuse(model, trial=trial)
    assert type(model[0].q_proj) is nn.Linear
    assert not model[0].q_proj._forward_pre_hooks


def spoiled(how: str) -> nn.Module:
    model = seeded(lambda: nn.Sequential(Attention(), Attention()))
    attention = model[0][0]
    if how == "subclass":
        attention.k_proj = OtherLinear(WIDTH, 8).requires_grad_(False)
    elif how == "width":
        attention.k_proj = nn.Linear(WIDTH + 1, 8).requires_grad_(False)
    elif how == "dtype":
        attention.k_proj.bfloat16()
    elif how == "bias dtype":
        attention.k_proj.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16), requires_grad=False)
    elif how == "hook":
        attention.v_proj.register_forward_hook(lambda module, arguments, result: result * 2)
    elif how == "tied":
        attention.v_proj.weight = attention.k_proj.weight
    elif how == "absent":
        attention.v_proj = None
    else:
        attention.q_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("how", ["subclass", "width", "dtype", "bias dtype", "hook", "tied", "absent", "nan"])
def test_projections_that_cannot_be_judged_are_left_and_others_are_not(how: str) -> None:
    model = spoiled(how)
    members = list(model[0][0].children())
    assert fuse(model).counts == {Part.QKV: 1}
    assert list(model[0][0].children()) == members
    assert type(model[0][1].q_proj) is not nn.Linear


def test_a_layer_that_two_places_share_is_left() -> None:
    shared = MLP()
    model = seeded(lambda: nn.Sequential(shared, nn.Sequential(shared)))
    assert not fuse(model).counts


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_layer_computed_with_one_product_gives_the_same(bias: bool) -> None:
    model = seeded(lambda: MLP(bias))
    down = model[0].down_proj
    expected = model(hidden_states(1, 6))
    assert dict(fuse(model).counts) == {Part.GATE_UP: 1}
    assert type(model[0].gate_up) is nn.Linear
    assert model[0].down_proj is down
    torch.testing.assert_close(model(hidden_states(1, 6)), expected)


@pytest.mark.parametrize(
    "layer", [Scaled, Swapped, Residual, NormalizedBetween, DownTwice, Downless, TwoArguments]
)
def test_a_gated_layer_that_computes_anything_else_keeps_its_own_form(layer: type[MLP]) -> None:
    model = seeded(layer)
    before = list(model[0].children())
    assert not fuse(model).counts
    assert type(model[0]) is layer
    assert list(model[0].children()) == before


def test_a_down_projection_of_another_kind_is_kept_and_not_called() -> None:
    model = seeded(MLP)
    model[0].down_proj = SumOverRanks().requires_grad_(False)
    down = model[0].down_proj
    expected = model(hidden_states(1, 2))
    down.calls = 0
    assert fuse(model).counts[Part.GATE_UP] == 1
    assert down.calls == 0
    torch.testing.assert_close(model(hidden_states(1, 2)), expected)


def test_modules_of_our_own_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(MLP)
    monkeypatch.setattr(MLP, "__module__", "container.model.other")
    assert not fuse(model).counts
    monkeypatch.undo()
    assert fuse(model).counts
    assert not fuse(model).counts, "what was fused is not fused again"


def test_after_a_commit_a_joined_weight_can_be_replaced_and_is_freed() -> None:
    model = seeded(Attention)
    fused = fuse(model)
    joined = model[0].q_proj.qkv
    weight = weakref.ref(joined.weight)
    views = [weakref.ref(original) for _, _, original in fused._undo]
    expected = model(hidden_states(1, 3))
    fused.commit()
    assert fused.counts[Part.QKV] == 1
    model[0].q_proj.qkv = nn.Sequential(joined)  # as a quantizer puts something else there
    torch.testing.assert_close(model(hidden_states(1, 3)), expected)
    model[0].q_proj.qkv = nn.Identity()
    del joined
    gc.collect()
    assert weight() is None
    assert all(view() is None for view in views)


def test_only_the_parts_asked_for_are_replaced() -> None:
    model = seeded(lambda: nn.Sequential(Attention(), MLP()))
    assert not fuse(model, frozenset()).counts
    assert dict(fuse(model, frozenset({Part.GATE_UP})).counts) == {Part.GATE_UP: 1}
    assert dict(fuse(model, frozenset({Part.QKV})).counts) == {Part.QKV: 1}


def test_the_setting_chooses_the_parts() -> None:
    assert parts("on") == parts("auto", "cuda") == ALL_PARTS
    assert parts("auto") == CPU_PARTS
    assert parts("off") == frozenset()
    with pytest.raises(SizingError, match="choose one of auto, on, off"):
        parts("all")


def test_agreement_is_of_every_element_and_never_with_nan() -> None:
    want = hidden_states(1, 5)
    assert agree(want * (1 + 1e-7), want)
    one_off = want.clone()
    one_off[0, 2, 7] += 1e-3
    assert not agree(one_off, want)
    assert not agree(want * float("nan"), want * float("nan"))
    assert not agree(want[:, :4], want)
    assert not agree(want.bfloat16(), want)
    assert not agree(want.to(torch.int32), want.to(torch.int32))
    assert not agree(None, want)
    assert not agree(want[:0], want[:0])
