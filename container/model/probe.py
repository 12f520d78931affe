"""Does this model give its own logits when it attends through our hook? Asked once, at load.

Owns: probe A (structure, on a shrunk copy with random weights), probe B (the real weights), reason codes.
Must not know: the runner, sampling, requests.
Invariant: a model is native only after packed, chunked, interleaved steps gave the reference's logits, and
the hook ran exactly once per layer per step. Comparing logits alone is not enough: a configuration without
a layer's odd path would pass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from container.model import attention
from container.model.attention import Call, Step, attending
from container.model.group import Group, GroupBroken, Solo
from container.model.kv_cache import KVCache, KVLimits, LayerShape
from container.model.load import BUILDING
from container.model.packed import PackedModel, PackedRow
from container.model.shrink import CannotShrink, shrink

LENGTHS: Final = (13, 9)  # tokens of the two probe sequences; both longer than the shrunk window
# (sequence, first, last) rows of three packed steps: they mix prefill with decode and swap the order.
STEPS: Final = (((0, 0, 7), (1, 0, 8)), ((1, 8, 9), (0, 7, 12)), ((0, 12, 13),))
WEIGHT_STD: Final = 0.15  # large enough that a wrong key changes the logits
LIMIT_FP32: Final = 1e-3  # relative error; the hook itself measures about 5e-7
LIMIT_BF16: Final = 0.03  # rounding alone gave 0.011
CLEAR_MARGIN: Final = 0.1  # logits: where the reference's best two are further apart, the best must agree
# A rounded logit is off by up to an eps of its size, and two of them are compared: below twice that, the
# order of the best two is noise. In bf16 the demo model's logits of 32 come in steps of 0.25.
CLEAR_EPS: Final = 2.0


class ProbeReason(enum.StrEnum):
    """Why a model does not run natively. Closed: it is exported in metrics."""

    PROBE_DIFF = "probe_diff"  # the logits differ
    HOOK_COUNT = "hook_count"  # not exactly one call per layer and step
    NO_HOOK = "no_hook"  # the model never calls the attention interface
    MASK_SEEN = "mask_seen"  # the model builds a mask of its own, which the hook cannot honour
    BUILD_ERROR = "build_error"  # it raised


class ProbeFailed(Exception):
    """The model must not run natively."""

    def __init__(self, reason: ProbeReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Measured:
    """What a forward through the hook told about the model."""

    layers: list[LayerShape]
    vocabulary: int  # width of a row of logits


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


def probe_sequences(vocabulary: int) -> list[list[int]]:
    """Return the two seeded probe sequences."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


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
    same = all(agree(torch.cat(parts), reference, dtype) for parts, reference in pairs)
    if not group.minimum(int(same)):
        raise ProbeFailed(ProbeReason.PROBE_DIFF)
    return measured


def replay(
    step: Callable[[list[PackedRow]], Tensor], sequences: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Return the logits of every token of the `sequences`, in parts, from the probe's packed steps."""
    results: list[list[Tensor]] = [[] for _ in sequences]
    for rows in STEPS:
        logits = step(
            [PackedRow(at, first, sequences[at][first:last], range(last - first)) for at, first, last in rows]
        )
        parts = torch.split(logits, [last - first for _, first, last in rows])
        for (at, _, _), part in zip(rows, parts, strict=True):
            results[at].append(part)
    return results


def agree(logits: Tensor, reference: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the error is within what `dtype` rounds off and clear winners agree; NaN never does."""
    limit = LIMIT_BF16 if dtype == torch.bfloat16 else LIMIT_FP32
    error = (logits - reference).norm() / reference.norm()
    best = reference.topk(2, dim=-1)
    rounding = CLEAR_EPS * torch.finfo(dtype).eps * reference.abs().amax(-1)
    clear = best.values[:, 0] - best.values[:, 1] > rounding.clamp(min=CLEAR_MARGIN)
    same = logits.argmax(-1) == best.indices[:, 0]
    return bool(error <= limit) and bool(same[clear].all())


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
