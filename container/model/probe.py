"""Does this model give its own logits when it attends through our hook? Asked once, at load.

Owns: probe A (structure, on a shrunk copy with random weights), probe B (the real weights), reason codes.
Must not know: the runner, sampling, requests.
Invariant: a model is native only after packed, chunked, interleaved steps gave the reference's logits, and
the hook ran exactly once per layer per step. Comparing logits alone is not enough: a configuration without
a layer's odd path would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from container.model import attention
from container.model.attention import Call, Step, attending
from container.model.group import Group, GroupBroken, Solo
from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits, LayerShape
from container.model.load import BUILDING
from container.model.packed import PackedModel
from container.model.replay import STEPS, Measured, ProbeFailed, ProbeReason, agree, probe_sequences
from container.model.rows import PackedRow
from container.model.shrink import CannotShrink, shrink

WEIGHT_STD: Final = 0.15  # large enough that a wrong key changes the logits


def probe_structure(config: Any) -> bool:
    """Probe A: return True when a shrunk, random copy of the model agrees with eager attention.

    False: the configuration cannot be shrunk or built small, and probe B decides. Raises ProbeFailed.
    """
    try:
        small = shrink(config)
        with BUILDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            model = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=torch.float32)
            model.eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, WEIGHT_STD)
        sequences = probe_sequences(small.vocab_size)
        references = reference_logits(model, sequences)
    except CannotShrink:
        return False
    except Exception:  # noqa: BLE001 - a copy that cannot run says nothing about the model
        return False
    hooked(lambda: _hook(model))
    compare(model, sequences, references, small.num_hidden_layers)
    return True


def _hook(model: Any) -> None:
    attention.register()
    model.set_attn_implementation(attention.HOOK)


def reference_logits(
    model: Any, sequences: Sequence[Sequence[int]], group: Group | None = None
) -> list[Tensor]:
    """Return (tokens, vocabulary) logits of each sequence alone, with the model's present attention.

    With a group of several ranks the list is empty on all but rank 0.
    """
    group = group or Solo()
    whole = []
    for tokens in sequences:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
        logits = group.gather_columns(output.logits[0].float())
        if logits is not None:
            whole.append(logits)
    return whole


def hooked(act: Callable[[], None]) -> None:
    """Run `act`, which makes a model use the hook; raises ProbeFailed where it cannot."""
    try:
        act()
    except (AttributeError, KeyError, ValueError, ImportError):
        raise ProbeFailed(ProbeReason.NO_HOOK) from None


def measure(model: Any, layers: int) -> Measured:
    """Return K and V shapes and the vocabulary from a forward with void attention; raises ProbeFailed."""
    calls: list[Call] = []
    tokens = torch.tensor([[0, 1]])
    try:
        with torch.inference_mode(), attending(Step([], [], calls)):
            output = model(
                input_ids=tokens,
                position_ids=tokens,
                use_cache=False,
                logits_to_keep=torch.tensor([1]),
            )
        vocabulary = output.logits.shape[-1]
    except GroupBroken:
        raise
    except Exception:  # noqa: BLE001 - whatever it raised, it cannot run natively
        raise ProbeFailed(ProbeReason.BUILD_ERROR) from None
    _check_calls(calls, layers)
    shapes = [_layer_shape(call) for call in _by_layer(calls)]
    return Measured(shapes, vocabulary)


def compare(
    model: Any,
    sequences: Sequence[Sequence[int]],
    references: Sequence[Tensor],
    layers: int,
    group: Group | None = None,
) -> Measured:
    """Return what was measured; raises ProbeFailed unless three packed steps give the `references`.

    With a group of several ranks, rank 0 compares and all raise or none; `measured.vocabulary` is then this
    rank's columns. Raises GroupBroken.
    """
    group = group or Solo()
    measured = measure(model, layers)
    dtype = next(model.parameters()).dtype
    longest, step = max(map(len, sequences)), max(last - first for rows in STEPS for _, first, last in rows)
    limits = KVLimits(len(sequences), longest, 1, 1, step_tokens=step)  # short rings: they turn over
    packed = PackedModel(model, KVCache(measured.layers, dtype, limits), group)
    results: list[list[Tensor]] = [[] for _ in sequences]
    for rows in STEPS:
        calls: list[Call] = []
        packed_rows = [
            PackedRow(which, first, sequences[which][first:last], range(last - first))
            for which, first, last in rows
        ]
        try:
            logits = packed.logits(packed_rows, calls)
        except GroupBroken:
            raise
        except Exception:  # noqa: BLE001 - as above
            raise ProbeFailed(ProbeReason.BUILD_ERROR) from None
        _check_calls(calls, layers)
        shapes = [_layer_shape(call) for call in _by_layer(calls)]
        if shapes != measured.layers:
            raise ProbeFailed(ProbeReason.HOOK_COUNT)
        if logits is not None:
            counts = [last - first for _, first, last in rows]
            for (which, _, _), part in zip(rows, torch.split(logits, counts), strict=True):
                results[which].append(part)
    packed.kv.close()
    pairs = list(zip(results, references, strict=True)) if group.rank == 0 else []
    rounded = dtype == torch.bfloat16
    same = all(
        agree(torch.cat(parts).numpy(force=True), reference.numpy(force=True), bfloat16=rounded)
        for parts, reference in pairs
    )
    if not group.minimum(int(same)):
        raise ProbeFailed(ProbeReason.PROBE_DIFF)
    return measured


def _layer_shape(call: Call) -> LayerShape:
    return LayerShape(call.kv_heads, call.key_dim, call.value_dim, call.window)


def _by_layer(calls: Sequence[Call]) -> list[Call]:
    return sorted(calls, key=lambda call: call.layer)


def _check_calls(calls: Sequence[Call], layers: int) -> None:
    if not calls:
        raise ProbeFailed(ProbeReason.NO_HOOK)
    if [call.layer for call in _by_layer(calls)] != list(range(layers)):
        raise ProbeFailed(ProbeReason.HOOK_COUNT)
    if any(call.mask_seen for call in calls):
        raise ProbeFailed(ProbeReason.MASK_SEEN)
