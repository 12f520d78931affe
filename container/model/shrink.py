"""A small copy of a model's configuration: the same class and kinds of layers, tiny sizes.

Owns: which configuration fields are sizes, and what they shrink to.
Must not know: weights, attention, the probe that runs the copy.
Invariant: head grouping, kinds of layers and every switch stay as they are; only sizes change.
"""

from __future__ import annotations

from typing import Any, Final

HEAD_DIM: Final = 16
VOCABULARY: Final = 128
WINDOW: Final = 6  # shorter than the probe's sequences, so that they cross it
EXPERTS: Final = 4
ACTIVE_EXPERTS: Final = 2
KV_HEADS: Final = 2
GROUP: Final = 4  # query heads per K/V head at most

LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS: Final = ("num_attention_heads", "n_head", "n_heads")
WIDTHS: Final = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
FIXED: Final = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "head_dim": HEAD_DIM,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 32,
    "n_inner": 32,
    "sliding_window": WINDOW,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": ACTIVE_EXPERTS,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": HEAD_DIM,
}
TOKEN_IDS: Final = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "image_token_id")
ROPE_FACTORS: Final = ("short_factor", "long_factor")


class CannotShrink(Exception):
    """The configuration has no plain list of layers and heads; says nothing about the model."""


def shrink(config: Any, ranks: int = 1) -> Any:
    """Return a small configuration of the same class with heads for `ranks`; raises CannotShrink."""
    values: dict[str, Any] = config.to_dict()
    if any(isinstance(values.get(name), dict) for name in ("text_config", "vision_config", "audio_config")):
        raise CannotShrink
    layers = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    heads = next((values[name] for name in HEADS if isinstance(values.get(name), int)), None)
    if layers is None or heads is None:
        raise CannotShrink
    _shrink_layers(values, layers)
    _shrink_heads(values, heads, ranks)
    for name, value in FIXED.items():
        if isinstance(values.get(name), int) and not isinstance(values[name], bool):
            values[name] = value
    if isinstance(values.get("qk_rope_head_dim"), int) and isinstance(values.get("head_dim"), int):
        values["head_dim"] = values["qk_rope_head_dim"]  # MLA: `head_dim` is what the rotary encoding turns
    for name in TOKEN_IDS:
        if values.get(name) is not None:
            values[name] = None if name == "pad_token_id" else 1
    for rope in _rope_settings(values):
        for name in ROPE_FACTORS:
            if isinstance(rope.get(name), list):
                rope[name] = rope[name][: HEAD_DIM // 2]
    try:
        return type(config).from_dict(values)
    except Exception:  # noqa: BLE001 - each class validates in its own way; all mean the same here
        raise CannotShrink from None


def _shrink_layers(values: dict[str, Any], layers: int) -> None:
    """Keep the first layer of every kind, at least two layers, in all lists that have one entry per layer."""
    lists = [name for name, value in values.items() if isinstance(value, list) and len(value) == layers]
    kinds = [tuple(str(values[name][layer]) for name in lists) for layer in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) < 2:
        kept = list(range(min(2, layers)))
    for name in lists:
        values[name] = [values[name][layer] for layer in kept]
    for name in LAYER_COUNTS:
        if isinstance(values.get(name), int):
            values[name] = len(kept)


def _shrink_heads(values: dict[str, Any], heads: int, ranks: int) -> None:
    kv_heads = values.get("num_key_value_heads")
    if not isinstance(kv_heads, int):
        kv_heads = heads
    group = max(1, heads // kv_heads)
    if ranks == 1:
        small_kv = min(kv_heads, KV_HEADS)
        small = small_kv * min(group, GROUP)
        if small == 1:
            small, small_kv = 2, 1
    elif kv_heads % ranks == 0:
        small_kv = ranks
        small = ranks * min(group, GROUP)
    else:
        small_kv = kv_heads  # fewer than ranks: several ranks hold the same one
        small = heads if heads <= GROUP * ranks else ranks * min(heads // ranks, GROUP)
    for name in HEADS:
        if isinstance(values.get(name), int):
            values[name] = small
    if isinstance(values.get("num_key_value_heads"), int):
        values["num_key_value_heads"] = small_kv if kv_heads != heads else small
    for name in WIDTHS:
        if isinstance(values.get(name), int):
            values[name] = small * HEAD_DIM


def _rope_settings(values: dict[str, Any]) -> list[dict[str, Any]]:
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if not isinstance(rope, dict):
        return []
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]
