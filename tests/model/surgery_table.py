"""What surgery replaces in each tiny architecture, and how far its logits move.

`python -m tests.model.surgery_table` writes surgery.md anew; a test compares it byte for byte.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from container.model import attention
from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits
from container.model.packed import PackedModel
from container.model.probe import STEPS, measure, probe_sequences
from container.model.rows import PackedRow
from container.model.surgery import ALL_PARTS, Fused, Part, fuse
from tests.model.tiny import ARCHITECTURES, BASE, MOE, SLIDING_AND_FULL

TABLE = Path(__file__).with_name("surgery.md")
HEAD = """# Surgery

Tiny seeded models, one per row: how many groups of attention projections, gated MLPs and norms were found to
compute the same as their fused forms, and replaced. What differs, or is not there, stays as it is. Generated:
run `python -m tests.model.surgery_table` after a change.

| model type | class | projections | gate and up | norms |
|---|---|---|---|---|
"""
COMPAT = ("qwen3_next", "falcon_h1", "lfm2", "bloom", "mpt")  # not run natively, so never operated on
WINDOWED = {"sliding_window": 8, "layer_types": SLIDING_AND_FULL}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
ROUTED = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# Model type -> what differs from BASE: more than the other tests run, since fusing is cheap to judge.
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {**MOE, "head_dim": 16},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cwm": {"head_dim": 16, **WINDOWED},
    "deepseek_v2": {**LATENT, **ROUTED, "q_lora_rank": None, "head_dim": 8, "n_shared_experts": 1},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0,
        **WINDOWED,
    },
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 32},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "jais2": {},
    "minimax_m2": {**LOCAL, "head_dim": 16, "rotary_dim": 8},
    "ministral": {"head_dim": 16, **WINDOWED},
    "nemotron": {},
    "olmo": {},
    "olmo3": WINDOWED,
    "persimmon": {},
    "phi": {},
    "phimoe": LOCAL,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "seed_oss": {"head_dim": 16},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOWED},
    "youtu": LATENT,
}
KINDS = tuple(sorted({*ARCHITECTURES, *MORE} - {*COMPAT}))


@dataclass(frozen=True)
class Outcome:
    """A model operated on, what was replaced, and its packed logits before and after."""

    model: Any
    fused: Fused
    before: Tensor
    after: Tensor

    @property
    def error(self) -> float:
        return float((self.after - self.before).norm() / self.before.norm())


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of `kind` that attends through the hook; no bias or norm weight is trivial."""
    attention.register()
    config = AutoConfig.for_model(kind, **{**BASE, **(ARCHITECTURES.get(kind) or MORE.get(kind) or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(29)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15) if parameter.dim() >= 2 else parameter.add_(noise * 0.3)
    model.set_attn_implementation(attention.HOOK)
    return model


def packed_logits(model: Any) -> Tensor:
    """Return the logits of two sequences in the probe's three packed, interleaved steps."""
    sequences = probe_sequences(model.config.get_text_config().vocab_size)
    measured = measure(model, model.config.get_text_config().num_hidden_layers)
    limits = KVLimits(len(sequences), max(map(len, sequences)), 16, 1)
    packed = PackedModel(model, KVCache(measured.layers, next(model.parameters()).dtype, limits))
    steps = [
        [
            PackedRow(which, first, sequences[which][first:last], range(last - first))
            for which, first, last in rows
        ]
        for rows in STEPS
    ]
    return torch.cat([packed.logits(rows) for rows in steps])


def operate(kind: str, dtype: torch.dtype = torch.float32, parts: frozenset[Part] = ALL_PARTS) -> Outcome:
    model = tiny_model(kind, dtype)
    before = packed_logits(deepcopy(model))
    layers = model.config.get_text_config().num_hidden_layers
    fused = fuse(model, parts, trial=lambda: measure(model, layers))
    return Outcome(model, fused, before, packed_logits(model))


@cache
def outcome(kind: str) -> Outcome:
    """Return the tiny fp32 model of `kind` with every part replaced that can be; tests leave it as it is."""
    return operate(kind)


def render() -> str:
    """Return the page as markdown."""
    rows = []
    for kind in KINDS:
        result = outcome(kind)
        counts = " | ".join(str(result.fused.counts[part] or "") for part in Part)
        rows.append(f"| {kind} | {type(result.model).__name__} | {counts} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    TABLE.write_text(render(), encoding="utf-8")
