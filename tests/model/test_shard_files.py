"""Parts made beforehand: what is read is what was written, by whom it was written for, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from container.model.folders import PlainFolder
from container.model.load import LoadedModel, untouched
from container.model.parallel import arm
from container.model.shard_files import (
    MANIFEST,
    Recipe,
    ShardMismatch,
    file_name,
    load_shard,
    save_shards,
)
from container.model.source import file_sha256, source_sha256
from tests.model.divided import divided_logits, divided_source
from tests.model.ranks import ThreadGroup, together

TOKENS = [5, 9, 11, 4, 8, 70, 2]
PLAIN = Recipe()
ROUNDED = Recipe("eighths/rows", ("gate_up",))


class Rounded(nn.Module):
    """Stands for a quantized linear layer: integers and scales in buffers, laid out on meta as well."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("steps", (weight / self.scales).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.steps * self.scales, self.bias)


def quantize(layer: nn.Module) -> None:
    for name, child in list(layer.named_modules()):
        if isinstance(child, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, Rounded(child))


class Joined(nn.Module):
    """Stands for surgery: gate and up in one product, installed only where that gives the same."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        gate, up = mlp.gate_proj, mlp.up_proj
        self.gate_up = nn.Linear(gate.in_features, gate.out_features * 2, bias=False)
        self.gate_up.weight = nn.Parameter(torch.cat((gate.weight, up.weight)), requires_grad=False)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def fuse(layer: nn.Module) -> None:
    mlp: Any = layer.mlp
    joined = Joined(mlp)
    hidden = torch.randn(1, 3, mlp.gate_proj.in_features)
    torch.testing.assert_close(joined(hidden), mlp(hidden))
    layer.mlp = joined


def saved(path: Path, name: str, size: int, recipe: Recipe = PLAIN) -> Path:
    steps = (untouched, untouched) if recipe is PLAIN else (fuse, quantize)
    save_shards(divided_source(name, size), path, size, torch.float32, recipe, *steps, lambda _: None)
    return path


def loaded(
    path: Path, name: str, rank: int, size: int, recipe: Recipe = PLAIN, **options: Any
) -> LoadedModel:
    steps = (untouched, untouched) if recipe is PLAIN else (fuse, quantize)
    dtype = options.pop("dtype", torch.float32)
    return load_shard(
        divided_source(name, size),
        PlainFolder(path),
        rank,
        size,
        dtype,
        lambda _: 64,
        recipe,
        *steps,
        **options,
    )


def logits_of(path: Path, name: str, size: int, recipe: Recipe = PLAIN) -> torch.Tensor:
    def forward(group: ThreadGroup) -> torch.Tensor | None:
        model = loaded(path, name, group.rank, size, recipe).model
        arm(model, group)
        with torch.inference_mode():
            return group.gather_columns(model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0])

    whole = together(size, forward)[0]
    assert whole is not None
    return whole


@pytest.mark.parametrize("name", ["llama_tied", "olmo2", "gpt_oss", "phi3", "opt"])
@pytest.mark.parametrize("size", [1, 2])
def test_parts_read_from_files_give_the_bits_of_parts_cut_at_load(
    name: str, size: int, tmp_path: Path
) -> None:
    saved(tmp_path, name, size)
    assert torch.equal(logits_of(tmp_path, name, size), divided_logits(name, size, TOKENS))


@pytest.mark.parametrize("size", [1, 2])
def test_fused_and_quantized_parts_come_back_without_being_quantized_again(size: int, tmp_path: Path) -> None:
    saved(tmp_path, "llama", size, ROUNDED)
    tensors = load_file(tmp_path / file_name(0, size))
    assert any(tensor.dtype == torch.int8 for tensor in tensors.values())
    assert any("gate_up" in name for name in tensors)
    rounded = logits_of(tmp_path, "llama", size, ROUNDED)
    plain = divided_logits("llama", size, TOKENS)
    assert 1e-4 < float((rounded - plain).norm() / plain.norm()) < 0.2


def test_a_tied_head_is_not_stored_and_is_a_view_again(tmp_path: Path) -> None:
    saved(tmp_path, "llama_tied", 2)
    assert not any("lm_head" in name for name in load_file(tmp_path / file_name(1, 2)))
    model = loaded(tmp_path, "llama_tied", 1, 2).model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()


def test_a_rank_opens_no_part_but_its_own(tmp_path: Path) -> None:
    saved(tmp_path, "llama", 2)
    (tmp_path / file_name(0, 2)).unlink()
    loaded(tmp_path, "llama", 1, 2)
    with pytest.raises(ShardMismatch, match="missing"):
        loaded(tmp_path, "llama", 0, 2)


def test_parts_for_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", 2)
    with pytest.raises(ShardMismatch, match="`ranks`"):
        loaded(tmp_path, "llama", 0, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config_sha256", "0" * 64),
        ("transformers", "5.22.0"),
        ("architecture", "MistralForCausalLM"),
        ("dtype", "float16"),
        ("plan_sha256", "0" * 64),
        ("kv_copies", 2),
        ("vocabulary", 97),
        ("quantization", "nf4/64"),
        ("fused", ["qkv"]),
    ],
)
def test_any_other_fact_than_expected_is_refused_by_its_name(tmp_path: Path, key: str, value: object) -> None:
    saved(tmp_path, "llama", 2)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest[key] != value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(ShardMismatch, match=f"`{key}`"):
        loaded(tmp_path, "llama", 0, 2)


def test_parts_of_other_weights_are_refused_where_the_source_is_known(tmp_path: Path) -> None:
    saved(tmp_path, "llama", 2)
    right = source_sha256(divided_source("llama", 2))
    loaded(tmp_path, "llama", 0, 2, source_digest=right)
    with pytest.raises(ShardMismatch, match="source_sha256"):
        loaded(tmp_path, "llama", 0, 2, source_digest=source_sha256(divided_source("mistral", 2)))


@pytest.mark.parametrize("fault", ["lacking", "extra", "shape", "kind"])
def test_a_part_with_other_tensors_than_the_model_is_refused(fault: str, tmp_path: Path) -> None:

    saved(tmp_path, "llama", 2)
    path = tmp_path / file_name(0, 2)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if fault == "lacking":
        del tensors[name]
    elif fault == "extra":
        tensors["another"] = torch.zeros(1)
    elif fault == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, path)
    with pytest.raises(ShardMismatch, match="not the one"):
        loaded(tmp_path, "llama", 0, 2)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["files_sha256"][0] = file_sha256(path)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShardMismatch, match="a part holds") as caught:
        loaded(tmp_path, "llama", 0, 2)
    assert name not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "[" * 5000])
def test_a_broken_manifest_is_refused(text: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama", 2)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardMismatch, match="manifest"):
        loaded(tmp_path, "llama", 0, 2)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", 2)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(ShardMismatch, match="format"):
        loaded(tmp_path, "llama", 0, 2)
