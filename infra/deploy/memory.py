"""Whether the accelerators of each instance type hold the model, and how many whole contexts beside it.

Owns: the sum. Must not know: AWS, how the engine divides its memory.
Invariant: what is not known is said to be; a model is refused only where not even its smallest form fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from infra.deploy.choices import Choices
from infra.deploy.findings import Finding
from infra.report import CommandError, ExitCode
from infra.templates.instances import ENDPOINT

GIB: Final = 1024**3
USABLE: Final = 0.9  # assumed, said in the finding: the driver, the runtime and activations have the rest
SMALLEST: Final = 4  # a model stored in 16 bits takes a quarter in 4 bits
KV_BYTES: Final = 2  # bf16


@dataclass(frozen=True, slots=True)
class Need:
    """What a context takes; `kv_token_bytes` is None where the model's shape is not known."""

    context_tokens: int
    kv_token_bytes: int | None = None
    model_bytes: int | None = None


def read(config: Path | None, context_tokens: int, model_gib: float | None) -> Need:
    """Return the need of a model with this `config.json`; raises CommandError where it is none."""
    model_bytes = None if model_gib is None else int(model_gib * GIB)
    return Need(context_tokens, None if config is None else _kv_token_bytes(config), model_bytes)


def _kv_token_bytes(config: Path) -> int:
    """Return the bytes of keys and values of one token, over all layers."""
    try:
        loaded: Any = json.loads(config.read_text(encoding="utf-8"))
        held = loaded.get("text_config", loaded)
        heads = int(held["num_attention_heads"])
        size = int(held.get("head_dim") or int(held["hidden_size"]) // heads)
        kv_heads = int(held.get("num_key_value_heads") or heads)
        layers = int(held["num_hidden_layers"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        hint = "give the model's config.json, with layers, heads and sizes"
        raise CommandError(
            ExitCode.USAGE, "bad_argument", f"`{config.name}` is no model configuration", hint
        ) from error
    return 2 * layers * kv_heads * size * KV_BYTES


def fits(choices: Choices, stored_bytes: int | None) -> Iterator[Finding]:
    """Tell for each instance type what fits; `stored_bytes` is what lies in S3, None where nobody knows."""
    need: Need = choices.need or Need(0)
    model_bytes = need.model_bytes or stored_bytes
    if not model_bytes:
        hint = "give --model-gib and --model-config"
        yield Finding("memory", "unchecked", "the model's size is not known", hint)
        return
    ranks = choices.number("TensorParallel") or 1
    for name in choices.instance_types:
        kind = ENDPOINT.get(name)
        if kind is not None:
            room = int(kind.gpu_memory_gib / kind.gpus * min(ranks, kind.gpus) * USABLE * GIB)
            yield _fit(name, room, model_bytes, need)


def _fit(name: str, room_bytes: int, model_bytes: int, need: Need) -> Finding:
    sizes = f"{model_bytes / GIB:.1f} GiB of model, {room_bytes / GIB:.1f} GiB usable (90 %, assumed)"
    if model_bytes > SMALLEST * room_bytes:
        hint = "choose a larger type, or raise `TensorParallel`"
        return Finding("memory", "refused", f"{name}: {sizes}; not even 4-bit weights fit", hint)
    if model_bytes >= room_bytes:
        hint = "it must be quantized at loading; or choose a larger type, or raise `TensorParallel`"
        return Finding("memory", "warn", f"{name}: {sizes}; it does not fit as it is stored", hint)
    if need.kv_token_bytes is None:
        return Finding("memory", "note", f"{name}: {sizes}", "give --model-config to count contexts")
    context_bytes = need.kv_token_bytes * need.context_tokens
    contexts = (room_bytes - model_bytes) // max(context_bytes, 1)
    detail = f"{name}: {contexts} contexts of {need.context_tokens:,} tokens beside {sizes}"
    if contexts == 0:
        return Finding("memory", "refused", detail, "choose a larger type, or shorter contexts")
    return Finding("memory", "ok", detail)
