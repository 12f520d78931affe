"""Tiny seeded random models of many architectures, as sources that need no disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from container.model.source import StoredTensor

VOCABULARY = 96
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}

# Model type -> what differs from BASE. Windows are short, so that the tests cross them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "layer_types": SLIDING_AND_FULL,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "layer_types": SLIDING_AND_FULL},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 8, "layer_types": SLIDING_AND_FULL, "logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "exaone4": {"sliding_window": 8, "layer_types": SLIDING_AND_FULL},
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "head_dim": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": SLIDING_AND_FULL,
    },
    "qwen3_next": {
        **MOE,
        **LINEAR,
        "head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
}


class TinySource:
    """A model's files and tensors, held in memory."""

    def __init__(self, files: dict[str, bytes], tensors: dict[str, Tensor]) -> None:
        self._files = files
        self._tensors = tensors

    def file(self, name: str) -> bytes | None:
        return self._files.get(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def weights_sha256(self) -> str | None:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest() if self._tensors else None

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, tensor in self._tensors.items():
            yield name, StoredTensor(tuple(tensor.shape), lambda tensor=tensor: tensor)


def tiny_config(kind: str) -> Any:
    return AutoConfig.for_model(kind, **{**BASE, **ARCHITECTURES[kind]})


@cache
def reference_model(kind: str) -> Any:
    """Return the tiny model of `kind` as transformers computes it, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager")
        model.eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
            elif name.endswith("sinks"):
                parameter.normal_(0.0, 1.0)
    return model


def tiny_source(kind: str, **changes: Any) -> TinySource:
    """Return the tiny model of `kind` as a source; `changes` go into its configuration."""
    model = reference_model(kind)
    config = {**model.config.to_dict(), **changes}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return TinySource({"config.json": json.dumps(config).encode()}, tensors)
