"""Models of some hundred MB, written in seconds: for measurements of memory, not of what they compute.

Owns: the configurations and the checkpoint, tensor by tensor as models of that kind are published.
Invariant: seeded, and no more than one tensor in memory while it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

COMMON = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "intermediate_size": 8192},
    "mixtral": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def write(directory: Path, kind: str, layers: int, vocabulary: int = 4096) -> Path:
    """Write a bfloat16 checkpoint of `layers` layers into `directory`, a file per layer; return it."""
    config = {
        **COMMON,
        **KINDS[kind],
        "model_type": kind,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(23)
    noise = (torch.randn(1 << 20, generator=generator) * 0.02).bfloat16()

    def made(*shape: int) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    files: dict[str, str] = {}
    hidden = config["hidden_size"]
    parts: list[dict[str, tuple[int, ...]]] = [dict(_layer(config, index)) for index in range(layers)]
    rows = (vocabulary, hidden)
    parts.append({"model.embed_tokens.weight": rows, "model.norm.weight": (hidden,), "lm_head.weight": rows})
    for number, shapes in enumerate(parts):
        name = f"model-{number:05d}.safetensors"
        save_file({tensor: made(*shape) for tensor, shape in shapes.items()}, directory / name)
        files |= dict.fromkeys(shapes, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def _layer(config: dict[str, Any], index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    at, hidden, inner = f"model.layers.{index}", config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    for name, out in (("q_proj", hidden), ("k_proj", narrow), ("v_proj", narrow), ("o_proj", hidden)):
        yield f"{at}.self_attn.{name}.weight", (out, hidden)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", (hidden,)
    if config["model_type"] == "llama":
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        return
    experts = f"{at}.block_sparse_moe"
    yield f"{experts}.gate.weight", (config["num_local_experts"], hidden)
    for expert in range(config["num_local_experts"]):
        yield f"{experts}.experts.{expert}.w1.weight", (inner, hidden)
        yield f"{experts}.experts.{expert}.w2.weight", (hidden, inner)
        yield f"{experts}.experts.{expert}.w3.weight", (inner, hidden)
