"""Models of other sizes and architectures than the demo's, with seeded weights: speed without a download.

Owns: their shapes, writing one once. Must not know: engines.
Invariant: the same name gives the same weights; a checkpoint that is there is whole.
What such a model says soon repeats itself: whoever guesses ahead from repetition must not be judged by it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

# Published shapes, but for the vocabulary: that of the demo model's tokenizer, which goes with them.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "llama-160m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SEED = 11


def ensure(name: str, tokenizer_of: Path, cache: Path) -> Path:
    """Return the checkpoint `name` (see SHAPES) under `cache`, written the first time, in float32."""
    target = cache / f"seeded-{name}"
    if not target.exists():
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        _write(SHAPES[name], tokenizer_of, part)
        part.rename(target)
    return target


def _write(shape: dict[str, Any], tokenizer_of: Path, folder: Path) -> None:
    import json

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8"))
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {key: given[key] for key in names if key in given}
    config = AutoConfig.for_model(**shape, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).exists():
            shutil.copyfile(tokenizer_of / name, folder / name)
