"""Checkpoints that come quantized: unpacked exactly, in any order, or refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from container.model.quantize_checkpoint import CheckpointRefused, full_precision
from container.model.source import SourceError, read_json
from tests.model.driving import CONFIG, greedy
from tests.model.test_build import start
from tests.model.tiny import TinySource, tiny_source

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"}


def compressed(kind: str = "int-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def source_of(settings: object, tensors: dict[str, Tensor]) -> TinySource:
    config = {"model_type": "llama", "quantization_config": settings}
    return TinySource({"config.json": json.dumps(config).encode()}, tensors)


def unpacked(settings: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the source yields, the same whatever order the tensors come in."""
    results = []
    names = sorted(tensors)
    for seed in range(4):
        random.Random(seed).shuffle(names)
        plain = full_precision(source_of(settings, {name: tensors[name] for name in names}), torch.float32)
        pairs = [(name, stored.read()) for name, stored in plain.stored()]
        assert len({name for name, _ in pairs}) == len(pairs)
        results.append(dict(pairs))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())
    return results[0]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype is torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) + 0.01


def test_a_checkpoint_in_full_precision_is_left_alone() -> None:
    source = tiny_source("llama")
    assert full_precision(source, torch.float32) is source


@pytest.mark.parametrize("shape", [(64, 48), (70, 40), (20, 10)])
def test_fp8_blocks_are_multiplied_by_their_scale(shape: tuple[int, int]) -> None:
    rows, columns = -(-shape[0] // 32), -(-shape[1] // 16)
    weight, scale = values(shape, torch.float8_e4m3fn), scales(rows, columns)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "norm.weight": torch.ones(4)}
    result = unpacked(FP8, tensors)
    assert set(result) == {"a.weight", "norm.weight"}
    for row in range(shape[0]):
        for column in (0, shape[1] // 2, shape[1] - 1):
            expected = weight[row, column].float() * scale[row // 32, column // 16]
            assert result["a.weight"][row, column] == expected


def test_fp8_with_one_scale_per_tensor_drops_what_activations_needed() -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    weight = values((8, 8), torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale": torch.tensor(0.5), "a.input_scale": torch.tensor(3.0)}
    result = unpacked(settings, tensors)
    assert set(result) == {"a.weight"}
    assert torch.equal(result["a.weight"], weight.float() * 0.5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (6, 1), (6,), (6, 4)])
def test_compressed_tensors_have_one_scale_or_one_per_channel_or_group(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight, scale = values((6, 16), dtype), scales(*shape)
    wide = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(6, -1).repeat_interleave(16 // 4, 1)
    wide = wide if wide.shape[1] == 16 else wide[:, :1]
    kind = "int-quantized" if dtype is torch.int8 else "float-quantized"
    result = unpacked(compressed(kind), {"a.weight": weight, "a.weight_scale": scale})
    assert torch.equal(result["a.weight"], weight.float() * wide)


def test_a_zero_point_is_subtracted_even_when_it_comes_last() -> None:
    weight, scale = values((6, 16), torch.int8), scales(6, 1)
    offset = torch.arange(-3, 3, dtype=torch.int8).unsqueeze(1)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.weight_zero_point": offset}
    tensors |= {"b.weight": weight, "b.weight_scale": scale}  # a layer without one among those with
    result = unpacked(compressed(symmetric=False), tensors)
    assert torch.equal(result["a.weight"], (weight.float() - offset.float()) * scale)
    assert torch.equal(result["b.weight"], weight.float() * scale)


def test_compressed_tensors_in_blocks_use_their_block() -> None:
    weight, scale = values((64, 48), torch.float8_e4m3fn), scales(2, 3)
    settings = compressed("float-quantized", strategy="block", block_structure=[32, 16])
    result = unpacked(settings, {"a.weight": weight, "a.weight_scale": scale})
    wide = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)
    assert torch.equal(result["a.weight"], weight.float() * wide)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "hqq", "torchao", "fbgemm_fp8"])
def test_other_methods_are_refused_by_name_with_a_hint(method: str) -> None:
    with pytest.raises(CheckpointRefused, match=rf"(?s)`{method}`.*hint:"):
        full_precision(source_of({"quant_method": method}, {}), torch.float32)


@pytest.mark.parametrize("method", ["sk-secret", None, 7, ["gptq"]])
def test_a_method_nobody_knows_is_refused_and_not_repeated(method: Any) -> None:
    with pytest.raises(CheckpointRefused, match="not known here") as caught:
        full_precision(source_of({"quant_method": method, "bits": 4}, {}), torch.float32)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (compressed("pack-quantized"), "`pack-quantized`"),
        (compressed("sk-secret"), "a format not known here"),
        ({**compressed(), "format": ["int-quantized"]}, "a format not known here"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ({**compressed(), "transform_config": {"R1": {}}}, "transforms"),
    ],
)
def test_what_compressed_tensors_cannot_undo_exactly_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(CheckpointRefused, match=words) as caught:
        full_precision(source_of(settings, {}), torch.float32)
    assert "secret" not in str(caught.value)


def test_groups_of_several_block_sizes_are_refused() -> None:
    settings = compressed(block_structure=[32, 16])
    settings["config_groups"]["group_1"] = {"weights": {"block_structure": [16, 16]}}
    with pytest.raises(CheckpointRefused, match="several block sizes"):
        full_precision(source_of(settings, {}), torch.float32)


@pytest.mark.parametrize(
    "settings",
    ["fp8", {"quant_method": "fp8", "weight_block_size": [0, 128]}, {**compressed(), "config_groups": [1]}],
)
def test_malformed_settings_are_refused(settings: Any) -> None:
    with pytest.raises(SourceError):
        full_precision(source_of(settings, {}), torch.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": values((4, 4), torch.int8)},
        {"a.weight_scale": torch.ones(4, 1)},
        {"a.weight": values((4, 4), torch.int8), "b.weight_scale": torch.ones(4, 1)},
        {"a.weight": values((4, 4), torch.int8), "a.weight_scale": torch.ones(3, 1)},
        {"a.weight": values((4, 4), torch.int8), "a.weight_scale": torch.ones(4, 3)},
        {"a.weight": values((2, 4, 4), torch.int8), "a.weight_scale": torch.ones(2, 4)},
        {"experts.gate_up_proj": values((2, 4, 4), torch.float8_e4m3fn)},
        {"experts.down_proj": values((2, 4, 4), torch.int8)},
        {
            "a.weight": values((4, 4), torch.int8),
            "a.weight_scale": torch.ones(4, 2),
            "a.weight_g_idx": torch.tensor([0, 1, 0, 1]),
        },
    ],
)
def test_pieces_that_do_not_make_a_weight_are_refused_without_a_name(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(SourceError) as caught:
        for _, stored in full_precision(source_of(compressed(), tensors), torch.float32).stored():
            stored.read()
    assert "experts" not in str(caught.value)
    assert "a." not in str(caught.value).split()


def test_the_configuration_no_longer_says_quantized_and_other_files_pass() -> None:
    source = source_of(FP8, {})
    plain = full_precision(source, torch.bfloat16)
    assert read_json(plain, "config.json") == {"model_type": "llama"}
    assert plain.file("tokenizer.json") is None


def fp8_model(kind: str) -> tuple[TinySource, TinySource]:
    """Return a tiny model with weights in fp8 blocks, and the same model in full precision."""
    source = tiny_source(kind)
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        if "proj.weight" not in name:
            packed[name] = dense[name] = tensor
            continue
        blocks = tensor.reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        packed[name] = stored
        packed[name + "_scale_inv"] = scale
        wide = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)
        dense[name] = stored.float() * wide
    config = json.loads(source.file("config.json") or b"")
    plain = TinySource({"config.json": json.dumps(config).encode()}, dense)
    config["quantization_config"] = FP8
    return TinySource({"config.json": json.dumps(config).encode()}, packed), plain


def test_a_model_in_fp8_blocks_is_served_as_its_full_precision_twin() -> None:
    packed, plain = fp8_model("llama")
    runner, facts = start(CONFIG, packed)
    assert facts.runner == "native"
    prompts = [[5, 9, 11, 4, 8], [7]]
    assert greedy(runner, prompts, 6, 8) == greedy(start(CONFIG, plain)[0], prompts, 6, 8)
