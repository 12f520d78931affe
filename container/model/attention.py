"""Causal attention of one packed step over per-sequence KV slabs, called from inside transformers' models.

Owns: the hook registered as "strongroom", the step it computes for, the arithmetic.
Must not know: slots' owners, sampling, plans, which model calls it.
Invariant: tokens of different sequences never meet; every row attends to its own slab up to its own end.

    packed   |d0|d1|d2|d3|p0 p1 p2 p3|r0 r1|     decode runs first (one token per sequence), then spans
    run      sequences in consecutive rows of one shelf: one batched call, lengths masked
    span     several tokens of one sequence: one causal call

Heads of a group share one K/V head, so decode views q as (Hk, Hq/Hk, D): 10-24 times faster than repeating
K and V, and faster than `enable_gqa` (measured on 2 AVX2 cores, fp32).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOK: Final = "strongroom"


class Slab(Protocol):
    """K and V of the sequences of one shelf: per layer (rows, Hk, capacity, D)."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(slots=True)
class Run:
    """Decode tokens [first, first + count) of the packed row; sequence i sits in shelf row `row + i`."""

    slab: Slab
    row: int
    first: int
    ends: list[int]  # tokens of each sequence after this step
    rows: Tensor  # (count,) int64 shelf rows
    positions: Tensor  # (count,) int64, ends - 1
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """Packed tokens [first, first + count) are positions [start, start + count) of one sequence."""

    slab: Slab
    row: int
    first: int
    count: int
    start: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class Call:
    """What one call of the hook looked like; gathered by the load-time probe only."""

    layer: int
    mask_seen: bool
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class Step:
    """The borders of one packed forward. With `calls` set, every hook call is noted there."""

    runs: list[Run]
    spans: list[Span]
    calls: list[Call] | None = None


class _Current(threading.local):
    """Holds the step of the forward in progress; one forward at a time per thread."""

    step: Step | None = None


_current: Final = _Current()


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Make `step` the one that hook calls compute for, until the block ends."""
    assert _current.step is None, "a forward is already in progress"
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def register() -> None:
    """Make the hook known to transformers. No mask function goes with it, so that no mask is built."""
    ALL_ATTENTION_FUNCTIONS.register(HOOK, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - part of the interface; inference has none
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store K and V of the packed tokens and return their attention, (1, T, Hq, Dv).

    `query` is (1, Hq, T, D), `key` (1, Hk, T, D), `value` (1, Hk, T, Dv); `scaling` None means D ** -0.5;
    `s_aux` holds one sink logit per query head.
    """
    step = _current.step
    assert step is not None, "the hook was called outside a step"
    layer = _layer_of(module)
    if step.calls is not None:
        seen = attention_mask is not None
        step.calls.append(Call(layer, seen, key.shape[1], key.shape[-1], value.shape[-1]))
    tokens, heads = query.shape[2], query.shape[1]
    shape = Shape(scaling, sliding_window, softcap, s_aux)
    # Runs and spans cover every token; only the probe's void step covers none.
    make = query.new_empty if step.runs or step.spans else query.new_zeros
    out = make((tokens, heads, value.shape[-1]))
    for run in step.runs:
        _decode(run, layer, shape, query[0], key[0], value[0], out)
    for span in step.spans:
        _prefill(span, layer, shape, query[0], key[0], value[0], out)
    return out.unsqueeze(0), None


@dataclass(slots=True)
class Shape:
    """The variant of attention a layer asks for."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def fused(self) -> bool:
        """True when torch's fused kernel computes this variant."""
        return self.softcap is None and self.sinks is None


def _layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    assert isinstance(layer, int), "the attention module has no layer number"
    return layer


def _decode(run: Run, layer: int, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Fill `out` (T, Hq, Dv) with one token of each sequence; q (Hq, T, D), k (Hk, T, D), v (Hk, T, Dv)."""
    first, count, row = run.first, len(run.ends), run.row
    keys, values = run.slab.keys[layer], run.slab.values[layer]
    kv_heads = k.shape[0]
    if count == 1:
        position = run.ends[0] - 1
        keys[row, :, position] = k[:, first]
        values[row, :, position] = v[:, first]
        low = 0 if shape.window is None else max(0, run.ends[0] - shape.window)
        mask = None
    else:
        keys[run.rows, :, run.positions] = k[:, first : first + count].transpose(0, 1)
        values[run.rows, :, run.positions] = v[:, first : first + count].transpose(0, 1)
        low = 0 if shape.window is None else max(0, min(run.ends) - shape.window)
        mask = _length_mask(run, shape.window, low, q)
    longest = max(run.ends)
    packed = q[:, first : first + count].transpose(0, 1).reshape(count, kv_heads, -1, q.shape[-1])
    result = _attend(
        packed,
        keys[row : row + count, :, low:longest],
        values[row : row + count, :, low:longest],
        mask,
        1,
        shape,
    )
    out[first : first + count] = result.reshape(count, q.shape[0], -1)


def _length_mask(run: Run, window: int | None, low: int, like: Tensor) -> Tensor | None:
    """Return the additive mask (count, 1, 1, longest - low) of a run, or None when all ends are equal."""
    if window not in run.masks:
        if min(run.ends) == max(run.ends):
            run.masks[window] = None
        else:
            at = torch.arange(low, max(run.ends))
            last = run.positions[:, None]
            allowed = at[None] <= last
            if window is not None:
                allowed &= at[None] > last - window
            run.masks[window] = _additive(allowed, like)[:, None, None]
    return run.masks[window]


def _prefill(span: Span, layer: int, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Several tokens of one sequence, after those already in its slab."""
    first, last = span.first, span.first + span.count
    start, end = span.start, span.start + span.count
    keys, values = span.slab.keys[layer], span.slab.values[layer]
    keys[span.row, :, start:end] = k[:, first:last]
    values[span.row, :, start:end] = v[:, first:last]
    low = 0 if shape.window is None else max(0, start + 1 - shape.window)
    kv_heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    own_keys, own_values = (
        keys[span.row : span.row + 1, :, low:end],
        values[span.row : span.row + 1, :, low:end],
    )
    plain = start == 0 and (shape.window is None or end <= shape.window)
    if shape.fused and plain:
        # Fused and aligned: with no earlier tokens the top-left alignment of `is_causal` is the right one.
        result = F.scaled_dot_product_attention(
            q[None, :, first:last], own_keys, own_values, is_causal=True, scale=shape.scaling, enable_gqa=True
        )
    else:
        mask = _causal_mask(span, shape.window, low, q)
        if shape.fused:
            result = F.scaled_dot_product_attention(
                q[None, :, first:last], own_keys, own_values, mask, scale=shape.scaling, enable_gqa=True
            )
        else:
            packed = q[:, first:last].reshape(1, kv_heads, groups * span.count, q.shape[-1])
            result = _attend(packed, own_keys, own_values, mask, span.count, shape)
            result = result.reshape(1, q.shape[0], span.count, -1)
    out[first:last] = result[0].transpose(0, 1)


def _causal_mask(span: Span, window: int | None, low: int, like: Tensor) -> Tensor:
    """Return the additive mask (count, end - low), aligned to the bottom right: the last query sees all."""
    mask = span.masks.get(window)
    if mask is None:
        query_at = torch.arange(span.start, span.start + span.count)[:, None]
        key_at = torch.arange(low, span.start + span.count)[None]
        allowed = key_at <= query_at
        if window is not None:
            allowed &= key_at > query_at - window
        mask = _additive(allowed, like)
        span.masks[window] = mask
    return mask


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=like.dtype)
    return mask.masked_fill_(~allowed, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, queries: int, shape: Shape) -> Tensor:
    """Return (B, Hk, G * queries, Dv) for q (B, Hk, G * queries, D), G the heads of a group.

    `mask` broadcasts to (B, 1, queries, L). Softcap and sinks take the plain path: softcap bends the scores
    before masking, a sink is one more logit per head that takes weight and gives no value.
    """
    if shape.fused:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=shape.scaling)
    scale = q.shape[-1] ** -0.5 if shape.scaling is None else shape.scaling
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    batch, kv_heads, rows, length = scores.shape
    scores = scores.view(batch, kv_heads, rows // queries, queries, length)
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if mask is not None:
        scores = scores + mask.view(-1, 1, 1, queries, length)
    if shape.sinks is not None:
        sinks = shape.sinks.float().view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, queries, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length].to(v.dtype)
    return torch.matmul(weights.reshape(batch, kv_heads, rows, length), v)
