"""Products of few rows with a weight of 4 bits, as Triton compiles them, and the weight written out in full.

Owns: how two numbers lie in a byte. Must not know: modules, who chose 4 bits.
Invariant: sums in float32, a group's scale applied once to its own sum.

    byte j of a group of G inputs   | input j, low half | input j + G / 2, high half |   each number + 8

The halves of a byte lie half a group apart, so that a group is two products over neighbouring inputs and no
number has to change places.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,  # (rows, INPUTS)
    packed,  # (OUTPUTS, INPUTS / 2) uint8
    scales,  # (OUTPUTS, INPUTS / GROUP) float16
    out,  # (rows, OUTPUTS); with splits (SPLITS, rows, OUTPUTS) float32
    rows,
    x_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32: the interpreter computes bfloat16 ones wrongly
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    HALF: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = INPUTS // GROUP
    SHARE: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    near = tl.arange(0, HALF)
    row_inside, output_inside = row < rows, output < OUTPUTS
    line = x + row.to(tl.int64)[:, None] * x_stride + near[None, :]
    bytes_line = packed + output.to(tl.int64)[None, :] * (INPUTS // 2) + near[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(split * SHARE, tl.minimum((split + 1) * SHARE, GROUPS)):
        low_x = tl.load(line + group * GROUP, mask=row_inside[:, None], other=0.0)
        high_x = tl.load(line + group * GROUP + HALF, mask=row_inside[:, None], other=0.0)
        both = tl.load(bytes_line + group * HALF, mask=output_inside[None, :], other=0).to(tl.int32)
        low = ((both & 15) - 8).to(tl.float32)
        high = ((both >> 4) - 8).to(tl.float32)
        if WIDE:
            low_x, high_x = low_x.to(tl.float32), high_x.to(tl.float32)
        part = tl.dot(low_x, low.to(low_x.dtype), input_precision="ieee")
        part += tl.dot(high_x, high.to(high_x.dtype), input_precision="ieee")
        scale = tl.load(scales + output.to(tl.int64) * GROUPS + group, mask=output_inside, other=0.0)
        total += part * scale.to(tl.float32)[None, :]
    place = (split * rows + row).to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & output_inside[None, :])


@triton.jit
def write_out(packed, scales, out, INPUTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Fill one row of `out` (OUTPUTS, INPUTS) by bytes [block * BLOCK, ...)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < INPUTS // 2
    HALF: tl.constexpr = GROUP // 2
    both = tl.load(packed + row * (INPUTS // 2) + at, mask=inside, other=0).to(tl.int32)
    group = at // HALF
    scale = tl.load(scales + row * (INPUTS // GROUP) + group, mask=inside, other=0.0).to(tl.float32)
    place = out + row * INPUTS + group * GROUP + at % HALF
    tl.store(place, (((both & 15) - 8).to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (((both >> 4) - 8).to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)
