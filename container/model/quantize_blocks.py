"""Integer blocks of 32 weights: `int8-block` and `int4-block`, and activations in blocks of int8.

Owns: both formats' arithmetic in plain torch; the exact definition a native kernel is held to.
Must not know: modules, models, which scheme was asked for.
Invariant: rows are independent: slicing the packed parts by rows equals packing the sliced weight, and
slicing columns at a multiple of 32 does too. So shards equal the whole, bit for bit.

    int8-block, 8.5 bits per weight
    weight        |<- 32 int8 ->|<- 32 int8 ->| ...     (out, in)
    weight_scale  |     d0      |     d1      | ...     (out, in / 32) fp16

    int4-block, 5 bits per weight: w = scale * q + low, q in 0..15, the even column in the low half byte
    weight        |<- 16 uint8 ->|<- 16 uint8 ->| ...   (out, in / 2)
    weight_scale  |     d0       |     d1       | ...   (out, in / 32) fp16
    weight_low    |     m0       |     m1       | ...   (out, in / 32) fp16

int4-block is asymmetric by measurement. Relative error of normal weights: 0.078, symmetric 0.086 (signed
largest at -8) or 0.081 (best of 26 scales), both at 4.5 bits; of Student-t weights with 4 degrees of freedom:
0.093 against 0.115 and 0.110. The demo model is no judge: it was made from such blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from container.model.quantize_format import Format, Obstacle, Part

BLOCK: Final = 32
INT8_LIMIT: Final = 127  # never -128: two products of 127 x 127 then stay below what 16 bits hold
SMALLEST_BLOCK: Final = 2.0**-100  # a block of smaller activations counts as zeros; 127 / it would overflow
# Weights unpacked at a time: 1 MiB of fp32 stays in the second-level cache and below the size from which the
# allocator maps fresh pages at every call. 2048 x 2048 at one token, one core: 2.5 ms against 24 ms at once;
# fp32 takes 0.7 ms.
TILE_WEIGHTS: Final = 2**18

Unpack = Callable[[Mapping[str, Tensor]], Tensor]


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (tokens, in / 32, 32), held as fp32, and scales (tokens, in / 32, 1) fp32 of `x`.

    Per block, all in fp32: a = max|x|; q = round-half-even(x * (127 / a)); scale = a / 127.
    """
    blocks = _in_blocks(x.float().contiguous())
    largest = blocks.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < SMALLEST_BLOCK, torch.zeros_like(largest), largest)
    # Not `INT8_LIMIT / largest`: torch computes that as a product with the reciprocal, which rounds twice.
    inverse = torch.where(
        largest > 0, torch.full_like(largest, INT8_LIMIT) / largest, torch.zeros_like(largest)
    )
    return (blocks * inverse).round_(), largest / INT8_LIMIT


class Int8Block(Format):
    """Weights and activations in blocks of 32 along the input, as int8 with a scale each.

    The definition, for token t and output n, b the block, * and + rounded to fp32 each:

        dot[b] = sum of q_w * q_a over the block             exact: below 32 * 127 * 127
        y = sum over b, ascending, of dot[b] * (d_w[b] * d_a[b])
        result = y + bias, rounded once to the dtype of x

    q_w = round-half-even(w / d_w) clamped to +-127 with d_w = fp16(max|w| / 127); q_a as in
    quantize_activations. A kernel may add the blocks in another order: it must then stay within
    (blocks + 3) * 2**-23 * sum of |terms| of this. `multiply` is the plain form that serves without one:
    d_w * q_w is exact in fp32, d_a * q_a rounds once, and an fp32 GEMM adds all products, also inside a
    block, so that its bound is relative to the sum of |products|; measured below 1e-6 of the norm.
    """

    aligned_width = 1

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        return Obstacle.WIDTH if in_features % BLOCK or not out_features else None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {
            "weight": Part((out_features, in_features), torch.int8),
            "weight_scale": Part((out_features, in_features // BLOCK), torch.float16),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = _in_blocks(weight.float().contiguous())
        scale = (blocks.abs().amax(-1) / INT8_LIMIT).half()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
        values = (blocks / divisor).round_().clamp_(-INT8_LIMIT, INT8_LIMIT)
        return {"weight": values.flatten(-2).to(torch.int8), "weight_scale": scale}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        weight = parts["weight"].float()
        _in_blocks(weight).mul_(parts["weight_scale"].float().unsqueeze(-1))
        return weight

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        values, scales = quantize_activations(x)
        return _tiled(self.unpack, values.mul_(scales).flatten(-2), parts).to(x.dtype)


class Int4Block(Format):
    """Weights in blocks of 32 along the input, 4 bits each with a scale and a lowest value: w' = d * q + m.

    d = fp16((max - min) / 15), m = fp16(min), q = round-half-even((w - m) / d) clamped to 0..15.

    `multiply` leaves activations as they are: y = x W'^T, rounded to the dtype of x. A native kernel
    quantizes them as for int8-block. With q_a, d_a of quantize_activations, * and + rounded to fp32 each:

        dot[b] = sum of q_w * q_a over the block             exact: at most 32 * 15 * 127
        s[b] = d_a[b] * sum of q_a over the block            that sum exact: at most 32 * 127
        y = sum over b, ascending, of dot[b] * (d_w[b] * d_a[b]), then m[b] * s[b]
        result = y + bias, rounded once to the dtype of x

    which, rounding aside, is `multiply` of the activations q_a * d_a: the two differ by what int8-block loses
    on activations; a machine without a kernel loses nothing there. A kernel may add in another order: it must
    then stay within (2 * blocks + 3) * 2**-23 * sum of |terms| of this, dots and lows counted apart, for one
    may be far larger than what is left of both.
    """

    aligned_width = 1

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        return Obstacle.WIDTH if in_features % BLOCK or not out_features else None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        blocks = (out_features, in_features // BLOCK)
        return {
            "weight": Part((out_features, in_features // 2), torch.uint8),
            "weight_scale": Part(blocks, torch.float16),
            "weight_low": Part(blocks, torch.float16),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = _in_blocks(weight.float().contiguous())
        lowest = blocks.amin(-1)
        scale = ((blocks.amax(-1) - lowest) / 15).half()
        low = lowest.half()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
        values = ((blocks - low.float().unsqueeze(-1)) / divisor).round_().clamp_(0, 15)
        halves = values.flatten(-2).to(torch.uint8)
        packed = halves[..., ::2] | halves[..., 1::2] << 4
        return {"weight": packed, "weight_scale": scale, "weight_low": low}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        packed = parts["weight"]
        pairs = torch.empty((*packed.shape, 2), dtype=torch.float32, device=packed.device)
        pairs[..., 0] = packed & 15
        pairs[..., 1] = packed >> 4
        weight = pairs.flatten(-2)
        blocks = _in_blocks(weight)  # a view: multiplied and shifted in place
        blocks.mul_(parts["weight_scale"].float().unsqueeze(-1))
        blocks.add_(parts["weight_low"].float().unsqueeze(-1))
        return weight

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return _tiled(self.unpack, x, parts)


def _in_blocks(values: Tensor) -> Tensor:
    return values.view(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)  # no -1: there may be no rows


def _tiled(unpack: Unpack, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return x (tokens, in) times the unpacked weight transposed, unpacking some rows of it at a time."""
    outputs = parts["weight"].shape[0]
    rows = max(1, TILE_WEIGHTS // x.shape[-1])
    if rows >= outputs:
        return functional.linear(x, unpack(parts).to(x.dtype))
    y = x.new_empty(x.shape[0], outputs)
    for first in range(0, outputs, rows):
        tile = {name: part[first : first + rows] for name, part in parts.items()}
        y[:, first : first + rows] = functional.linear(x, unpack(tile).to(x.dtype))
    return y
