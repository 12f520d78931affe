"""Causal attention of one packed step over per-sequence KV slabs, called from inside transformers' models.

Owns: the hook registered as "strongroom", the step it computes for, the arithmetic.
Must not know: slots' owners, sampling, plans, which model calls it.
Invariant: tokens of different sequences never meet; every row attends to its own slab up to its own end.

    packed   |d0|d1|d2|d3|p0 p1 p2 p3|r0 r1|     decode runs first (one token per sequence), then spans
    run      sequences in consecutive rows of one shelf: one batched call, lengths masked
    span     several tokens of one sequence: one causal call
    ring     a layer with a window keeps position p at p % length of its slab; `kv_cache` says how long

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
SCORES: Final = 1 << 24  # elements of a score matrix written out at once (64 MiB), where no kernel avoids it


class Slab(Protocol):
    """K and V of the sequences of one shelf: per layer (rows, Hk, length, D)."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a run touches in layers of one window and slab length: it writes `at`, reads [low, high)."""

    at: Tensor  # (count,) int64
    low: int
    high: int
    mask: Tensor | None  # additive, (count, 1, 1, high - low); None: everything is seen


@dataclass(slots=True)
class Run:
    """Decode tokens [first, first + count) of the packed row; sequence i sits in shelf row `row + i`."""

    slab: Slab
    row: int
    first: int
    ends: list[int]  # tokens of each sequence after this step
    rows: Tensor  # (count,) int64 shelf rows
    positions: Tensor  # (count,) int64, ends - 1
    reaches: dict[tuple[int | None, int], Reach] = field(default_factory=dict)  # by window and length


@dataclass(slots=True)
class Span:
    """Packed tokens [first, first + count) are positions [start, start + count) of one sequence."""

    slab: Slab
    row: int
    first: int
    count: int
    start: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window


@dataclass(slots=True)
class Call:
    """What one call of the hook looked like; gathered by the load-time probe only."""

    layer: int
    mask_seen: bool
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None


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
        step.calls.append(Call(layer, seen, key.shape[1], key.shape[-1], value.shape[-1], sliding_window))
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
    reach = _reach(run, shape.window, keys.shape[2], q)
    if count == 1:
        position = (run.ends[0] - 1) % keys.shape[2]
        keys[row, :, position] = k[:, first]
        values[row, :, position] = v[:, first]
    else:
        keys[run.rows, :, reach.at] = k[:, first : first + count].transpose(0, 1)
        values[run.rows, :, reach.at] = v[:, first : first + count].transpose(0, 1)
    packed = q[:, first : first + count].transpose(0, 1).reshape(count, kv_heads, -1, q.shape[-1])
    result = _attend(
        packed,
        keys[row : row + count, :, reach.low : reach.high],
        values[row : row + count, :, reach.low : reach.high],
        reach.mask,
        1,
        shape,
    )
    out[first : first + count] = result.reshape(count, q.shape[0], -1)


def _reach(run: Run, window: int | None, length: int, like: Tensor) -> Reach:
    """Return what `run` touches in layers of `window` whose slabs are `length` long, made once a step."""
    reach = run.reaches.get((window, length))
    if reach is None:
        seen = [end if window is None else min(end, window) for end in run.ends]
        firsts = [(end - count) % length for end, count in zip(run.ends, seen, strict=True)]
        lasts = [first + count for first, count in zip(firsts, seen, strict=True)]
        whole = max(lasts) > length  # what some row sees wraps around the ring
        low, high = (0, length) if whole else (min(firsts), max(lasts))
        mask = None
        if min(seen) < high - low:
            # The age of what lies at index i is (last - i) mod length; the unwritten is older than all seen.
            age = (run.positions[:, None] - torch.arange(low, high)) % length
            mask = _additive(age < torch.tensor(seen)[:, None], like)[:, None, None]
        reach = run.reaches[window, length] = Reach(run.positions % length, low, high, mask)
    return reach


def _prefill(span: Span, layer: int, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Several tokens of one sequence, after those already in its slab."""
    first, last = span.first, span.first + span.count
    low = 0 if shape.window is None else max(0, span.start + 1 - shape.window)
    keys = _extended(span, span.slab.keys[layer][span.row], k[:, first:last], low)[None]
    values = _extended(span, span.slab.values[layer][span.row], v[:, first:last], low)[None]
    kernel = shape.fused and k.shape[-1] == v.shape[-1]  # torch's kernel that never writes scores out
    if kernel and span.start == 0 and (shape.window is None or span.count <= shape.window):
        # Fused and aligned: with no earlier tokens the top-left alignment of `is_causal` is the right one.
        result = F.scaled_dot_product_attention(
            q[None, :, first:last], keys, values, is_causal=True, scale=shape.scaling, enable_gqa=True
        )
        out[first:last] = result[0].transpose(0, 1)
        return
    mask = _causal_mask(span, shape.window, keys.shape[2], q)
    backwards = q[:, first:last].flip(1)
    rows = span.count if kernel else max(1, SCORES // (q.shape[0] * keys.shape[2]))
    for begin in range(0, span.count, rows):
        end = min(begin + rows, span.count)
        result = _masked(backwards[:, begin:end], keys, values, mask[begin:end], shape)
        out[last - end : last - begin] = result.flip(1).transpose(0, 1)


def _extended(span: Span, slab: Tensor, own: Tensor, low: int) -> Tensor:
    """Store `own` (Hk, count, D) in `slab` (Hk, length, D); return positions [low, end) of both."""
    length, end = slab.shape[1], span.start + span.count
    if end <= length:
        slab[:, span.start : end] = own
        return slab[:, low:end]
    assert span.count <= length, "a ring is shorter than what one step writes"
    at = low % length
    earlier = slab[:, at : at + span.start - low]
    wrapped = slab[:, : span.start - low - earlier.shape[1]]
    extended = torch.cat((earlier, wrapped, own), dim=1)  # before it is written: a ring overwrites its tail
    at = span.start % length
    fitting = min(span.count, length - at)
    slab[:, at : at + fitting] = own[:, :fitting]
    slab[:, : span.count - fitting] = own[:, fitting:]
    return extended


def _causal_mask(span: Span, window: int | None, length: int, like: Tensor) -> Tensor:
    """Return the additive mask (count, length) of the span's queries, the last one first.

    Its row r + 1 is row r moved by one, so that all rows are views into one line of length + count - 1: a
    written-out mask of a long prompt would cost more than its keys.

        line    | too old: -inf | seen: 0 | to come: -inf |        row 0 begins at 0, row 1 at 1, ...
    """
    mask = span.masks.get(window)
    if mask is None:
        line = torch.full((length + span.count - 1,), float("-inf"), dtype=like.dtype)
        line[0 if window is None else max(0, length - window) : length] = 0.0
        mask = span.masks[window] = line.as_strided((span.count, length), (1, 1))
    return mask


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """Return (Hq, rows, Dv) for q (Hq, rows, D) over k, v (1, Hk, L, D) under mask (rows, L)."""
    if shape.fused:
        result = F.scaled_dot_product_attention(q[None], k, v, mask, scale=shape.scaling, enable_gqa=True)
        return result[0]
    heads, rows, dim = q.shape
    packed = q.reshape(1, k.shape[1], -1, dim)
    return _attend(packed, k, v, mask, rows, shape).reshape(heads, rows, -1)


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
