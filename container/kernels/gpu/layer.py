"""A layer's small operators on an accelerator as Python calls them: layouts and every check the kernels omit.

Owns: norm, gate, rotation with cache write, rows rounded to 8 bits; the launches.
Must not know: models, sequences. Tensors belong to the caller. Invariant: nothing is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from container.kernels.gpu import layer_kernels


class Rounding(IntEnum):
    """How a row leaves a kernel: as the output's dtype, or in 8 bits with a scale of its own."""

    NONE = 0
    FP8 = 1
    INT8 = 2

    @property
    def dtype(self) -> torch.dtype | None:
        return (None, torch.float8_e4m3fn, torch.int8)[self]


class Gate(IntEnum):
    """What a gate goes through before it is multiplied."""

    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Rows (rows, width) in 8 bits; a row is its numbers times its scale, (rows,) float32."""

    numbers: Tensor
    scales: Tensor


def rms_norm(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    scales: Tensor | None = None,
) -> None:
    """Fill `out` (rows, width) with the norm of `hidden`, times `weight` + `offset`.

    With `residual`, hidden is added to it in place and the sum is what is normed. An `out` of 8 bits gets the
    rows' `scales` (rows,) float32.
    """
    rows, width = hidden.shape
    rounding = _rounding(out, hidden, scales, (rows, width))
    assert weight.shape == (width,) and hidden.stride(1) == 1, "a weight per column, columns side by side"
    assert residual is None or (residual.shape == hidden.shape and residual.stride(1) == 1), "another shape"
    if not rows:
        return
    kernel: Any = layer_kernels.rms_norm
    beside = hidden if residual is None else residual
    kernel[(rows,)](
        hidden,
        beside,
        weight,
        out,
        weight if scales is None else scales,
        epsilon,
        hidden.stride(0),
        beside.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=_power(width),
        ADDS=residual is not None,
        OFFSET=offset,
        QUANT=int(rounding),
        num_warps=_warps(width),
    )


def gated(gate_up: Tensor, out: Tensor, gate: Gate, *, scales: Tensor | None = None) -> None:
    """Fill `out` (rows, width) with gate(first half) * second half of `gate_up` (rows, 2 * width)."""
    rows, width = out.shape
    rounding = _rounding(out, gate_up, scales, (rows, width))
    assert gate_up.shape == (rows, 2 * width) and gate_up.stride(1) == 1, "two halves side by side"
    if not rows:
        return
    kernel: Any = layer_kernels.gated
    kernel[(rows,)](
        gate_up,
        out,
        gate_up if scales is None else scales,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=_power(width),
        GELU=gate is Gate.GELU_TANH,
        QUANT=int(rounding),
        num_warps=_warps(width),
    )


def quantize_rows(hidden: Tensor, rounding: Rounding) -> Quantized:
    """Return `hidden` (rows, width) in 8 bits: the largest magnitude of a row becomes 448 or 127."""
    assert rounding.dtype is not None, "a rounding to 8 bits"
    rows, width = hidden.shape
    assert hidden.stride(1) == 1, "columns lie side by side"
    numbers = torch.empty((rows, width), dtype=rounding.dtype, device=hidden.device)
    scales = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows:
        kernel: Any = layer_kernels.quantize_rows
        kernel[(rows,)](
            hidden,
            numbers,
            scales,
            hidden.stride(0),
            numbers.stride(0),
            WIDTH=width,
            BLOCK=_power(width),
            QUANT=int(rounding),
            num_warps=_warps(width),
        )
    return Quantized(numbers, scales)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Cosines and sines (positions, rotated / 2) float32; element i is paired with i + rotated / 2."""

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMS norms of each query and key head before their rotation; (dim,) each."""

    query: Tensor
    key: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """One layer's pages (pages, page_tokens, kv_heads, dim); scales (kv_heads,) float32 for fp8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def rotate_and_store(
    qkv: Tensor,
    queries: Tensor,
    rotation: Rotation,
    positions: Tensor,
    places: Tensor,
    pool: Pool,
    norms: HeadNorms | None = None,
) -> None:
    """Fill `queries` (tokens, heads, dim) and write keys and values of `qkv` to `pool`.

    `qkv` is (tokens, heads + 2 * kv_heads, dim); `places` (tokens,) int32 are page * page_tokens + offset, a
    negative one writes nothing. No two tokens have one place.
    """
    tokens, heads, dim = queries.shape
    kv_heads, half = pool.keys.shape[2], rotation.cosines.shape[1]
    assert qkv.shape == (tokens, heads + 2 * kv_heads, dim) and qkv[:1].is_contiguous(), "another shape"
    assert pool.keys.shape == pool.values.shape and pool.keys.shape[3] == dim, "pages of another shape"
    assert pool.keys[0].is_contiguous() and pool.values[0].is_contiguous(), "a page lies side by side"
    assert queries.is_contiguous() and 2 * half <= dim, "queries side by side, a rotation that fits"
    assert rotation.cosines.is_contiguous() and rotation.sines.shape == rotation.cosines.shape, "angles"
    assert positions.shape == places.shape == (tokens,), "a position and a place per token"
    assert positions.dtype is places.dtype is torch.int32, "positions and places are int32"
    if not tokens:
        return
    kernel: Any = layer_kernels.rotate_and_store
    unused = rotation.cosines
    kernel[(tokens, heads + kv_heads)](
        qkv,
        queries,
        rotation.cosines,
        rotation.sines,
        positions,
        places,
        pool.keys,
        pool.values,
        unused if pool.key_scales is None else pool.key_scales,
        unused if pool.value_scales is None else pool.value_scales,
        unused if norms is None else norms.query,
        unused if norms is None else norms.key,
        0.0 if norms is None else norms.epsilon,
        qkv.stride(0),
        pool.keys.stride(0),
        pool.values.stride(0),
        PAGE=pool.keys.shape[1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK=_power(dim),
        HALF=half,
        SCALED=pool.key_scales is not None,
        NORMED=norms is not None,
        num_warps=1,
    )


def _rounding(out: Tensor, like: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Rounding:
    assert out.shape == shape and out.stride(1) == 1, "an output of another shape"
    rounding = next((each for each in Rounding if each.dtype is out.dtype), Rounding.NONE)
    assert (rounding is Rounding.NONE) == (scales is None), "8 bits come with scales"
    assert rounding is not Rounding.NONE or out.dtype is like.dtype, "a dtype is kept or 8 bits"
    assert scales is None or (scales.shape == shape[:1] and scales.dtype is torch.float32), "a scale per row"
    return rounding


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _warps(width: int) -> int:
    return min(max(_power(width) // 1024, 1), 16)
