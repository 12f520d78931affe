"""The walk: what is replaced, what is left, what is freed, and that a saved state comes back bit for bit."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from container.model import quantize as walk
from container.model.quantize import PackedMismatch, Report, empty, load_packed, quantize
from container.model.quantize_blocks import Int8Block
from container.model.quantize_choose import Scheme
from container.model.quantize_format import Obstacle, format_for
from container.model.quantize_modules import PackedExperts, PackedLinear, plain_activations
from tests.model.tiny import reference_model

PACKED = [scheme for scheme in Scheme if scheme is not Scheme.NONE]
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
TOKENS = torch.tensor([[5, 9, 11, 4, 8, 70, 33]])


def quantized(kind: str, scheme: Scheme) -> tuple[Any, Report]:
    model = copy.deepcopy(reference_model(kind))
    return model, quantize(model, scheme)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        rows: Tensor = model(input_ids=TOKENS, use_cache=False).logits[0]
    return rows


def rounded(kind: str, scheme: Scheme) -> Any:
    """Return the model as transformers computes it, with weights that went through the format and back."""
    form, model = format_for(scheme), copy.deepcopy(reference_model(kind))

    def there_and_back(weight: Tensor) -> Tensor:
        if form.obstacle(weight.shape[0], weight.shape[1]) is not None:
            return weight
        return form.unpack(form.pack(weight.contiguous()))

    for name, module in model.named_modules():
        if "lm_head" in name:
            if scheme in walk.HEADS:  # not the embedding, which may be the same parameter
                held = format_for(walk.HEADS[scheme])
                rounded_head = held.unpack(held.pack(module.weight.contiguous()))
                module.weight = nn.Parameter(rounded_head, requires_grad=False)
        elif type(module) is nn.Linear and not name.endswith(".gate"):
            module.weight.copy_(there_and_back(module.weight))
        elif type(module) is Conv1D:
            module.weight.copy_(there_and_back(module.weight.t()).t())
        for stack_name in ("gate_up_proj", "down_proj"):
            stack = module._parameters.get(stack_name)
            if stack is not None and stack.dim() == 3:
                for expert in range(stack.shape[0]):
                    matrix = stack[expert].t() if module.is_transposed else stack[expert]
                    matrix.copy_(there_and_back(matrix))
    return model


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(kind, scheme) for kind in ("qwen2", "deepseek_v3", "gpt_oss") for scheme in PACKED]
    + [(kind, Scheme.INT8_BLOCK) for kind in ("llama", "gpt2", "mixtral", "qwen3_moe", "olmoe")],
)
def test_a_quantized_model_computes_with_the_rounded_weights(kind: str, scheme: Scheme) -> None:
    model, report = quantized(kind, scheme)
    assert report.linears > 0
    expected = logits(rounded(kind, scheme))
    with plain_activations():
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=2e-4)
    error = (logits(model) - expected).norm() / expected.norm()
    assert error < 0.25  # quantized activations, in a model of random weights


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_quantized_and_routers_are_not(kind: str) -> None:
    model, report = quantized(kind, Scheme.INT8_BLOCK)
    mixtures = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert report.expert_weights == 2 * len(mixtures) > 0
    before = dict(reference_model(kind).named_parameters())
    routers = {name: p for name, p in model.named_parameters() if "router" in name or ".gate." in name}
    assert routers
    assert all(torch.equal(parameter, before[name]) for name, parameter in routers.items())


@pytest.mark.parametrize("scheme", PACKED)
def test_embeddings_and_norms_stay_as_they_are_and_most_heads(scheme: Scheme) -> None:
    model, report = quantized("llama", scheme)
    with_head = scheme in walk.HEADS
    assert type(model.lm_head) is (PackedLinear if with_head else nn.Linear)
    assert not with_head or type(model.lm_head.form) is Int8Block  # never in fewer bits
    kept = {name.split(".")[-2] for name, _ in model.named_parameters()}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert kept == {"embed_tokens", *norms} | (set() if with_head else {"lm_head"})
    assert report.left == ({} if with_head else {Obstacle.OUTPUT: 1})
    assert report.linears == 2 * 7 + with_head


def test_none_does_nothing() -> None:
    model, report = quantized("llama", Scheme.NONE)
    assert report.nothing_done
    assert torch.equal(logits(model), logits(reference_model("llama")))


def test_a_width_the_blocks_do_not_divide_is_left_and_counted() -> None:
    net = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    report = quantize(net, Scheme.INT8_BLOCK)
    assert isinstance(net[0], PackedLinear)
    assert type(net[1]) is nn.Linear
    assert report.left == {Obstacle.WIDTH: 1}
    assert "1 left (width)" in report.describe()


def test_one_weight_of_experts_may_stay_while_the_other_is_packed() -> None:
    model = copy.deepcopy(reference_model("mixtral"))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[..., :80].contiguous())
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, : 2 * 80].contiguous())
    x, chosen, weights = torch.randn(3, 64), torch.tensor([[0, 2], [1, 3], [2, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        expected = experts(x, chosen, weights)
        report = quantize(model, Scheme.INT8_BLOCK)
        y = model.model.layers[0].mlp.experts(x, chosen, weights)
    assert report.left[Obstacle.WIDTH] == 1
    assert report.expert_weights == 3
    assert (y - expected).norm() / expected.norm() < 0.02


def test_experts_of_an_unknown_layout_are_left_and_counted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 64, 64))

    report = quantize(nn.Sequential(Odd()), Scheme.INT8_BLOCK)
    assert report.left == {Obstacle.LAYOUT: 1}
    assert report.nothing_done


def test_an_expert_that_is_not_there_adds_nothing() -> None:
    model, _ = quantized("mixtral", Scheme.INT8_BLOCK)
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(2, 64), torch.ones(2, 2)
    nobody = torch.full((2, 2), 4)
    assert experts(x, nobody, weights).abs().max() == 0
    some = torch.tensor([[1, 4], [4, 4]])
    assert (experts(x, some, weights)[1] == 0).all()


class RowParallel(nn.Module):
    """Stands for whatever wraps a linear layer of a shard."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def test_a_linear_inside_a_wrapper_is_replaced_there() -> None:
    net = nn.ModuleDict({"down_proj": RowParallel(nn.Linear(64, 32))})
    assert quantize(net, Scheme.INT8_BLOCK).linears == 1
    wrapper: Any = net["down_proj"]
    assert isinstance(wrapper.linear, PackedLinear)
    assert wrapper(torch.randn(2, 3, 64)).shape == (2, 3, 32)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    net = nn.Sequential(Special(64, 64))
    assert quantize(net, Scheme.INT8_BLOCK).nothing_done


def test_a_layer_that_hangs_in_two_places_is_packed_once() -> None:
    shared = nn.Linear(64, 64)
    net = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(64, 64))
    report = quantize(net, Scheme.INT8_BLOCK)
    assert report.linears == 2
    inner: Any = net[1]
    assert net[0] is inner[0]


def test_a_single_decoder_layer_can_be_quantized_by_itself_and_reports_add_up() -> None:
    model = copy.deepcopy(reference_model("mixtral"))
    total = Report(Scheme.BNB_NF4)
    for layer in model.model.layers:
        total.add(quantize(layer, Scheme.BNB_NF4))
    _, whole = quantized("mixtral", Scheme.BNB_NF4)
    whole.left[Obstacle.OUTPUT] -= 1
    assert (total.linears, total.expert_weights) == (whole.linears, whole.expert_weights)
    assert (total.bytes_before, total.bytes_after) == (whole.bytes_before, whole.bytes_after)
    assert total.bytes_after < total.bytes_before / 5


def test_biases_are_added_as_they_were() -> None:
    linear = nn.Linear(64, 32)
    net = nn.Sequential(linear)
    bias = linear.bias.detach().clone()
    quantize(net, Scheme.INT8_BLOCK)
    assert torch.equal(net(torch.zeros(1, 64))[0], bias)


def test_nf4_tells_of_blocks_that_differ_from_the_usual_without_a_name() -> None:
    net = nn.ModuleDict({"secret_proj": nn.Linear(96, 32), "other": nn.Linear(128, 32)})
    report = quantize(net, Scheme.BNB_NF4)
    assert (report.linears, report.misaligned) == (2, 1)
    assert "1 in smaller blocks than usual" in report.describe()
    assert "secret" not in report.describe()
    assert "smaller" not in quantize(nn.Sequential(nn.Linear(128, 8)), Scheme.BNB_NF4).describe()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, alive: list[weakref.ref[Any]]) -> Iterator[list[int]]:
    """Count, whenever a weight is packed, how many of the full-precision weights still exist."""
    counts: list[int] = []
    form = format_for(Scheme.INT8_BLOCK)
    honest = type(form).pack

    def counting(self: Any, weight: Tensor) -> dict[str, Tensor]:
        counts.append(sum(reference() is not None for reference in alive))
        return honest(self, weight)

    monkeypatch.setattr(type(form), "pack", counting)
    yield counts
    monkeypatch.undo()


def test_each_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    holders = [weakref.ref(layer.weight) for layer in net]
    aliens = list(net)  # somebody else, say a fusion, still holds the old layers
    with watched(monkeypatch, holders) as counts:
        quantize(net, Scheme.INT8_BLOCK)
    assert counts == [6, 5, 4, 3, 2, 1]
    assert not any(reference() is not None for reference in holders)
    assert len(aliens) == 6


def test_each_stack_of_experts_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(reference_model("mixtral"))
    stacks = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 3]
    with watched(monkeypatch, stacks) as counts:
        quantize(model, Scheme.INT8_BLOCK)
    assert counts[-5:] == [1, 1, 1, 1, 0]  # the head is last
    assert not any(reference() is not None for reference in stacks)


def hollow(kind: str) -> Any:
    """Return a model whose parameters lie on the meta device, as a loader would make it."""
    model = copy.deepcopy(reference_model(kind))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return model


@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss"])
def test_a_saved_state_comes_back_bit_for_bit_without_quantizing(
    kind: str, scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = quantized(kind, scheme)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "shard")
    monkeypatch.setattr(type(format_for(scheme)), "pack", None)  # calling it would fail
    skeleton = hollow(kind)
    assert quantize(skeleton, scheme).linears
    load_packed(skeleton, load_file(tmp_path / "shard"))
    for name, tensor in model.state_dict().items():
        restored = skeleton.state_dict()[name]
        assert restored.dtype == tensor.dtype
        assert torch.equal(restored.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert torch.equal(logits(skeleton), logits(model))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "dtype"])
def test_a_state_that_does_not_fit_is_refused_without_a_name(fault: str) -> None:
    net = nn.Sequential(nn.Linear(64, 32))
    quantize(net, Scheme.INT8_BLOCK)
    state = dict(net.state_dict())
    if fault == "missing":
        del state["0.weight_scale"]
    elif fault == "unknown":
        state["0.secret"] = torch.zeros(1)
    elif fault == "shape":
        state["0.weight"] = state["0.weight"][:16]
    else:
        state["0.weight_scale"] = state["0.weight_scale"].float()
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(64, 32))
    quantize(skeleton, Scheme.INT8_BLOCK)
    with pytest.raises(PackedMismatch, match=r"\b1 ") as caught:
        load_packed(skeleton, state)
    assert "weight" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_an_empty_layer_has_the_shapes_of_a_packed_one(scheme: Scheme, bias: torch.dtype | None) -> None:
    net = nn.Sequential(nn.Linear(128, 32, bias=bias is not None).to(torch.bfloat16))
    quantize(net, scheme)
    hollow = empty(scheme, 128, 32, bias)
    assert {name: (t.shape, t.dtype) for name, t in hollow.state_dict().items()} == {
        name.removeprefix("0."): (t.shape, t.dtype) for name, t in net.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())


@pytest.mark.parametrize("scheme", PACKED)
def test_converting_a_model_converts_no_scale(scheme: Scheme) -> None:
    model, _ = quantized("llama", scheme)
    before = {name: buffer.dtype for name, buffer in model.named_buffers() if "proj" in name}
    model.to(torch.bfloat16)
    assert {name: buffer.dtype for name, buffer in model.named_buffers() if "proj" in name} == before
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_the_heads_that_are_named_otherwise_are_left_too() -> None:
    for name in walk.HEAD_NAMES:
        assert quantize(nn.ModuleDict({name: nn.Linear(64, 64)}), Scheme.BNB_NF4).nothing_done
        for scheme in walk.HEADS:
            held = nn.ModuleDict({name: nn.Linear(64, 64)})
            assert quantize(held, scheme).linears == 1
            assert isinstance(held[name].form, Int8Block)
    for name in walk.ROUTER_NAMES:
        report = quantize(nn.ModuleDict({name: nn.Linear(64, 64)}), Scheme.INT8_BLOCK)
        assert report.left == {Obstacle.ROUTER: 1}


@pytest.mark.parametrize("scheme", PACKED)
def test_a_weight_packed_in_tiles_equals_the_weight_packed_at_once(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(80, 64, generator=torch.Generator().manual_seed(5))
    form = format_for(scheme)
    whole = form.pack(weight)
    rows: list[int] = []
    pack = form.pack

    def counted(tile: Tensor) -> dict[str, Tensor]:
        rows.append(len(tile))
        return pack(tile)

    monkeypatch.setattr(type(form), "pack", lambda _, tile: counted(tile))
    monkeypatch.setattr(walk, "TILE_WEIGHTS", 33 * 64)
    tiled = walk._pack(form, weight)
    assert rows == [32, 32, 16], "a tile is a multiple of 16 rows, the last one what is left"
    assert tiled.keys() == whole.keys()
    assert all(torch.equal(tiled[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)
