"""Tiny models to be divided among ranks, with every parameter drawn at random, and what dividing them gives.

`python -m tests.model.divided` writes divided.md anew; a test compares it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from container.model import attention
from container.model.errors import ShardRefused
from container.model.load import load
from container.model.parallel import arm
from tests.model.ranks import ThreadGroup, together
from tests.model.tiny import ARCHITECTURES, BASE, TinySource

TABLE = Path(__file__).with_name("divided.md")
LIMIT = 2e-6  # relative, float32: sums of some hundred products in another order; measured below 8e-7
SIZES = (2, 3, 4)
# Query and K/V heads by ranks: divided evenly by 2 and 3, fewer K/V heads than ranks by 4. A head is 16 wide.
HEADS = {1: (4, 2), 2: (4, 2), 3: (6, 3), 4: (8, 2)}
EVERY_HEAD_KV = {"deepseek_v3"}  # as many K/V heads as query heads by definition
VARIANTS = {
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "cohere_normed": ("cohere", {"use_qk_norm": True}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "mistral_odd_widths": ("mistral", {"vocab_size": 97, "intermediate_size": 101}),
}
COMPAT_ONLY = {"qwen3_next", "falcon_h1", "lfm2", "mpt"}  # `bloom` stands for them
KINDS = (*(kind for kind in ARCHITECTURES if kind not in COMPAT_ONLY), *VARIANTS)
HEAD_LINES = """# Divided models

Tiny seeded models, every parameter random, divided among ranks in fp32: relative error of the logits of 20
tokens against the whole model, or why the model is refused. Generated: run `python -m tests.model.divided`.

| model | tp 2 | tp 3 | tp 4 |
|---|---|---|---|
"""


def divided_config(name: str, size: int) -> Any:
    kind, changes = VARIANTS.get(name, (name, {}))
    heads, kv_heads = HEADS[size]
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kind in EVERY_HEAD_KV else kv_heads,
        "hidden_size": 16 * heads,
        "n_embd": 16 * heads,
        "d_model": 16 * heads,
        "n_head": heads,
        "n_heads": heads,
        "word_embed_proj_dim": 16 * heads,
    }
    values = {**BASE, **ARCHITECTURES[kind]}
    values |= {key: value for key, value in sizes.items() if key in values}
    return AutoConfig.for_model(kind, **(values | changes))


@cache
def whole_model(name: str, size: int) -> Any:
    """Return the model to be divided among `size`, as transformers computes it; norms, biases random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        model = AutoModelForCausalLM.from_config(divided_config(name, size), attn_implementation="eager")
        model.eval().requires_grad_(False)
        for leaf, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and leaf.endswith("weight")
            parameter.normal_(float(norm), 0.15)
    return model


def divided_source(name: str, size: int) -> TinySource:
    model = whole_model(name, size)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return TinySource({"config.json": json.dumps(model.config.to_dict()).encode()}, tensors)


def divided_logits(name: str, size: int, tokens: list[int]) -> Tensor:
    """Return (tokens, vocabulary) logits, computed by `size` ranks with transformers' own attention."""

    source = divided_source(name, size)

    def forward(group: ThreadGroup) -> Tensor | None:
        loaded = load(source, torch.float32, lambda _: 64, lambda _: None, rank=group.rank, size=size)
        arm(loaded.model, group)
        with torch.inference_mode():
            return group.gather_columns(
                loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            )

    whole = together(size, forward)[0]
    assert whole is not None
    return whole


def error(name: str, size: int) -> float:
    """Return the relative error of the divided model's logits; raises ShardRefused."""
    tokens = [(7 * at) % 90 for at in range(20)]
    found = divided_logits(name, size, tokens)
    with torch.inference_mode():
        wanted = whole_model(name, size)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return float((found - wanted).norm() / wanted.norm())


def cell(name: str, size: int) -> str:
    try:
        found = error(name, size)
    except ShardRefused as refused:
        return str(refused).partition("\n")[0]
    assert found <= LIMIT, f"{name} differs by {found} on {size} ranks"
    return f"<= {LIMIT:g}"


def render() -> str:
    """Return the page as markdown; raises AssertionError where a divided model differs."""
    attention.register()
    lines = [
        f"| {name} | " + " | ".join(cell(name, size) for size in SIZES) + " |\n" for name in sorted(KINDS)
    ]
    return HEAD_LINES + "".join(lines)


if __name__ == "__main__":
    TABLE.write_text(render(), encoding="utf-8")
