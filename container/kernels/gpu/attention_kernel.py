"""Paged attention of packed rows as Triton compiles it: one kernel for prefill and decode, one for splits.

Owns: the arithmetic and every address it computes. Must not know: who owns pages, how many programs pay.
Invariant: no key or value outside of [first visible, last visible] of the program's queries is read, and
nothing but `out` (or the partial sums) of the program's own tokens and heads is written.

    program (b, h, s)     query block b, kv head h, split s of the keys it sees
    row of the block      query token * group + head of the group; spare rows of odd groups are masked
    block -> row          row r owns blocks from starts[r] // BLOCK_Q + r on: an upper bound that needs no
                          length on the host, so that a captured launch serves any mixture of rows
    split                 leaves sum(e^(s - m) v), m and l = sum(e^(s - m)); `_combine` adds them up

Scores are kept in units of log2, so that the softmax is exp2 alone. Shape of the idea: one program per query
block and kv head with the group packed into rows (vLLM, Triton unified attention, 2026).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_of(block, starts, rows, BLOCK_Q: tl.constexpr):
    """Return the last row whose first block is at most `block`."""
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _scored(scores, scale, SOFTCAP: tl.constexpr):
    """Return q k scaled, capped, in units of log2."""
    if SOFTCAP > 0:
        # tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|), which never overflows.
        fallen = tl.exp(tl.abs(scores * scale) * (-2.0 / SOFTCAP))
        bent = (1.0 - fallen) / (1.0 + fallen) * (SOFTCAP * LOG2E)
        scaled = tl.where(scores * scale < 0, -bent, bent)
    else:
        scaled = scores * (scale * LOG2E)
    return scaled


@triton.jit
def _pages(table, at, inside, head, PAGE: tl.constexpr, KV_HEADS: tl.constexpr):
    """Return the pages that hold positions `at`, and which head's vector in them is theirs."""
    page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
    return page, (at % PAGE) * KV_HEADS + head


@triton.jit
def _weighed(scores, seen, peak, total):
    """Return weights e^(s - m) of one tile, the new m, how far older sums fade, and the new sum."""
    scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    return weights, new_peak, fade, total * fade + tl.sum(weights, 1)


# fmt: off
@triton.jit
def _summed(
    q, position, live, heads, keys, values, table, sinks, head, split, low, high, scale,
    page_stride, value_page_stride,
    KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr,
    V_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):
    """Return sum(e^(s - m) v), m and sum(e^(s - m)) over this split's tiles of positions [low, high)."""
    # fmt: on
    key_dims, value_dims = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS and split == 0:  # a logit that takes weight and gives no value
        peak = tl.load(sinks + heads, mask=live, other=0.0) * LOG2E
        total = total + 1.0
    gathered = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    low_tile = low // TILE
    tiles = tl.cdiv(high, TILE) - low_tile
    share = tl.cdiv(tiles, SPLITS)
    for tile in range(low_tile + split * share, low_tile + tl.minimum((split + 1) * share, tiles)):
        at = tile * TILE + tl.arange(0, TILE)
        inside = (at >= low) & (at < high)
        page, place = _pages(table, at, inside, head, PAGE, KV_HEADS)
        k = tl.load(
            keys + page[None, :] * page_stride + place[None, :] * K_DIM + key_dims[:, None],
            mask=inside[None, :] & (key_dims < K_DIM)[:, None],
            other=0.0,
        ).to(q.dtype)
        scores = _scored(tl.dot(q, k, input_precision="ieee"), scale, SOFTCAP)
        seen = inside[None, :] & (at[None, :] <= position[:, None]) & live[:, None]
        if WINDOW > 0:
            seen = seen & (position[:, None] - at[None, :] < WINDOW)
        weights, peak, fade, total = _weighed(scores, seen, peak, total)
        v = tl.load(
            values + page[:, None] * value_page_stride + place[:, None] * V_DIM + value_dims[None, :],
            mask=inside[:, None] & (value_dims < V_DIM)[None, :],
            other=0.0,
        ).to(q.dtype)
        gathered = gathered * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return gathered, peak, total


# fmt: off
@triton.jit
def attend(
    query,  # (tokens, heads, K_DIM)
    keys, values,  # (pages, PAGE, kv_heads, K_DIM), (pages, PAGE, kv_heads, V_DIM)
    out,  # (tokens, heads, V_DIM); with splits the partial sums (tokens, heads, SPLITS, V_DIM) float32
    peaks, sums,  # (tokens, heads, SPLITS) float32
    starts,  # (rows + 1,) int32: first token of each row
    lengths,  # (rows,) int32: positions of each row's sequence after this step
    slots,  # (rows,) int32: each row's line in the table
    table,  # (slots, pages of a sequence) int32
    sinks,  # (heads,) float32
    key_scales, value_scales,  # (kv_heads,) float32
    scale, rows, query_stride, out_stride, page_stride, value_page_stride, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: all earlier positions
    SOFTCAP: tl.constexpr,  # 0: none
    HAS_SINKS: tl.constexpr,
    SCALED: tl.constexpr,  # keys and values are multiplied by their scales
    WIDE: tl.constexpr,  # products in float32: the interpreter computes bfloat16 ones wrongly
):
    """One query block, kv head and split; see the top of this file."""
    # fmt: on
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = _row_of(block, starts, rows, BLOCK_Q)
    first = tl.load(starts + row)
    count = tl.load(starts + row + 1) - first
    begin = (block - (first // BLOCK_Q + row)) * BLOCK_Q  # of this block among the row's tokens
    if begin >= count:
        return
    earlier = tl.load(lengths + row) - count
    line = table + tl.load(slots + row).to(tl.int64) * table_stride
    members = tl.arange(0, BLOCK_M)
    token = begin + members // GROUP
    heads = head * GROUP + members % GROUP
    live = (members < BLOCK_Q * GROUP) & (token < count)
    token_row = (first + token).to(tl.int64)
    key_dims, value_dims = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    q = tl.load(
        query + token_row[:, None] * query_stride + heads[:, None] * K_DIM + key_dims[None, :],
        mask=live[:, None] & (key_dims < K_DIM)[None, :],
        other=0.0,
    )
    if WIDE:
        q = q.to(tl.float32)
    if SCALED:
        scale = scale * tl.load(key_scales + head)
    # What any query of the block sees: positions [low, high).
    high = earlier + tl.minimum(begin + BLOCK_Q, count)
    low = tl.maximum(earlier + begin - WINDOW + 1, 0) if WINDOW > 0 else 0
    gathered, peak, total = _summed(
        q, earlier + token, live, heads, keys, values, line, sinks, head, split, low, high, scale,
        page_stride, value_page_stride, KV_HEADS, K_DIM, V_DIM, K_PAD, V_PAD, PAGE, BLOCK_M, TILE, SPLITS,
        WINDOW, SOFTCAP, HAS_SINKS,
    )  # fmt: skip
    if SCALED:
        gathered = gathered * tl.load(value_scales + head)
    kept = live[:, None] & (value_dims < V_DIM)[None, :]
    if SPLITS == 1:
        result = gathered / tl.where(live, total, 1.0)[:, None]
        place = token_row[:, None] * out_stride + heads[:, None] * V_DIM + value_dims[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=kept)
    else:
        part = (token_row * (GROUP * KV_HEADS) + heads) * SPLITS + split
        tl.store(peaks + part, peak, mask=live)
        tl.store(sums + part, total, mask=live)
        tl.store(out + part[:, None] * V_DIM + value_dims[None, :], gathered, mask=kept)


@triton.jit
def combine(
    parts,  # (tokens, heads, SPLITS, V_DIM) float32
    peaks,
    sums,
    out,  # (tokens, heads, V_DIM)
    starts,
    rows,
    out_stride,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Add up the splits of one token and head; tokens of no row are left alone."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(starts + rows):
        return
    splits = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, V_PAD)
    part = (token * HEADS + head) * SPLITS
    peak = tl.load(peaks + part + splits, mask=splits < SPLITS, other=float("-inf"))
    total = tl.load(sums + part + splits, mask=splits < SPLITS, other=0.0)
    factor = tl.exp2(peak - tl.max(peak, 0))
    gathered = tl.load(
        parts + (part + splits[:, None]) * V_DIM + dims[None, :],
        mask=(splits < SPLITS)[:, None] & (dims < V_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(gathered * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(
        out + token * out_stride + head * V_DIM + dims, result.to(out.dtype.element_ty), mask=dims < V_DIM
    )
