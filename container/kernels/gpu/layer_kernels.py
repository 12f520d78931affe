"""What lies between a layer's products, as Triton compiles it: norm, rotation, cache write, gate, rounding.

Owns: the arithmetic, float32 throughout, rounded once. Must not know: models, pages' owners.
Invariant: one program owns one row (or one token and head) and writes nothing else; no program waits for
another. A place of -1 in `places` is a padding token: nothing of it is written to the pages.

    QUANT   0: as the output's dtype   1: float8 e4m3, largest 448   2: int8, largest 127; one scale a row
"""

import triton
import triton.language as tl

# A row smaller than this counts as zeros: its scale would not be a normal float32.
SMALLEST = tl.constexpr(2.0**-100)


@triton.jit
def _store_row(row, numbers, at, inside, out, scales, out_stride, QUANT: tl.constexpr):
    """Write one row of float32 `numbers`, quantized with a scale of its own where asked."""
    place = out + row.to(tl.int64) * out_stride + at
    if QUANT == 0:
        tl.store(place, numbers.to(out.dtype.element_ty), mask=inside)
    else:
        LARGEST: tl.constexpr = 448.0 if QUANT == 1 else 127.0
        most = tl.max(tl.where(inside, tl.abs(numbers), 0.0), 0)
        scale = tl.where(most < SMALLEST, 1.0, most / LARGEST)
        scaled = numbers / scale
        if QUANT == 2:  # to the nearest, halves away from zero
            scaled = tl.where(scaled >= 0, tl.floor(scaled + 0.5), -tl.floor(0.5 - scaled))
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        tl.store(place, scaled.to(out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)


@triton.jit
def rms_norm(
    hidden,  # (rows, WIDTH)
    residual,  # (rows, WIDTH): hidden is added to it, rounded, before the norm
    weight,  # (WIDTH,)
    out,  # (rows, WIDTH)
    scales,  # (rows,) float32
    epsilon,
    hidden_stride,
    residual_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OFFSET: tl.constexpr,  # what is added to the weight: 1 for models that store it less one
    QUANT: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(hidden + row.to(tl.int64) * hidden_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        place = residual + row.to(tl.int64) * residual_stride + at
        rounded = (x + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + epsilon)
    x = x * (tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    _store_row(row, x, at, inside, out, scales, out_stride, QUANT)


@triton.jit
def gated(
    gate_up,  # (rows, 2 * WIDTH): gate, then up
    out,  # (rows, WIDTH)
    scales,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,  # False: SiLU
    QUANT: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    line = gate_up + row.to(tl.int64) * gate_up_stride
    gate = tl.load(line + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # the tanh form; tanh(x) = 2 sigmoid(2 x) - 1
        steep = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(tl.minimum(tl.maximum(steep, -80.0), 80.0))  # beyond, it is 0 or 1
    else:
        gate = gate * tl.sigmoid(gate)
    _store_row(row, gate * up, at, inside, out, scales, out_stride, QUANT)


@triton.jit
def quantize_rows(
    hidden,
    out,
    scales,
    hidden_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANT: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(hidden + row.to(tl.int64) * hidden_stride + at, mask=inside, other=0.0).to(tl.float32)
    _store_row(row, x, at, inside, out, scales, out_stride, QUANT)


@triton.jit
def _part(vector, at, weight, shrink, mask, NORMED: tl.constexpr):
    """Return what a head's vector holds at `at`, normed and rounded as a norm of its own would."""
    x = tl.load(vector + at, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        x = x * shrink * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(vector.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _rotated(
    vector, cosines, sines, weight, epsilon,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK,) float32: element i < HALF is paired with i + HALF, those from 2 HALF on stay."""
    at = tl.arange(0, BLOCK)
    shrink = 1.0
    if NORMED:
        x = tl.load(vector + at, mask=at < DIM, other=0.0).to(tl.float32)
        shrink = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + epsilon)
    own = _part(vector, at, weight, shrink, at < DIM, NORMED)
    if HALF > 0:
        turned = at < 2 * HALF
        pair = tl.where(at < HALF, at + HALF, at - HALF)
        other = _part(vector, pair, weight, shrink, turned, NORMED)
        cosine = tl.load(cosines + at % HALF, mask=turned, other=1.0)
        sine = tl.load(sines + at % HALF, mask=turned, other=0.0)
        own = own * cosine + tl.where(at < HALF, -other, other) * sine
    return own


@triton.jit
def rotate_and_store(
    qkv,  # (tokens, HEADS + 2 * KV_HEADS, DIM)
    queries,  # (tokens, HEADS, DIM): queries with their rotation
    cosines,  # (positions, HALF) float32
    sines,
    positions,  # (tokens,) int32
    places,  # (tokens,) int32: page * PAGE + offset, or -1
    keys,  # (pages, PAGE, KV_HEADS, DIM)
    values,
    key_scales,  # (KV_HEADS,) float32: stored keys are divided by them
    value_scales,
    query_norm,  # (DIM,)
    key_norm,
    epsilon,
    qkv_stride,
    page_stride,
    value_page_stride,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,  # rotated dimensions / 2, 0: none
    SCALED: tl.constexpr,
    NORMED: tl.constexpr,  # queries and keys are normed per head first
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    line = qkv + token * qkv_stride + head * DIM
    angles = tl.load(positions + token).to(tl.int64) * HALF
    if head < HEADS:
        query = _rotated(
            line, cosines + angles, sines + angles, query_norm, epsilon, DIM, BLOCK, HALF, NORMED
        )
        tl.store(queries + (token * HEADS + head) * DIM + at, query.to(queries.dtype.element_ty), mask=inside)
    else:
        place = tl.load(places + token).to(tl.int64)
        if place >= 0:
            kv_head = head - HEADS
            page, stored = place // PAGE, (place % PAGE * KV_HEADS + kv_head) * DIM + at
            key = _rotated(
                line, cosines + angles, sines + angles, key_norm, epsilon, DIM, BLOCK, HALF, NORMED
            )
            value = tl.load(line + KV_HEADS * DIM + at, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                key = tl.minimum(tl.maximum(key / tl.load(key_scales + kv_head), -448.0), 448.0)
                value = tl.minimum(tl.maximum(value / tl.load(value_scales + kv_head), -448.0), 448.0)
            tl.store(keys + page * page_stride + stored, key.to(keys.dtype.element_ty), mask=inside)
            tl.store(
                values + page * value_page_stride + stored, value.to(values.dtype.element_ty), mask=inside
            )
