"""A layer's small operators in plain torch: what the kernels are judged by, and what runs without Triton.

Owns: the same arithmetic, written to be read. Must not know: Triton. Invariant: float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 2.0**-100  # a row of nothing larger counts as zeros


def rms_norm(
    hidden: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """Return the norm of `hidden`, float32; with `residual`, which becomes the sum, of both."""
    if residual is not None:
        residual.copy_((hidden.float() + residual.float()).to(residual.dtype))
    x = (hidden if residual is None else residual).float()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight.float() + offset)


def gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    """Return gate(first half) * second half, float32."""
    gate, up = gate_up.float().chunk(2, -1)
    act = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    return act * up


def quantized(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `rows` (rows, width) in fp8 e4m3 or int8 with a scale each; halves round away from zero."""
    largest = 127.0 if dtype is torch.int8 else 448.0
    most = rows.float().abs().amax(-1)
    scales = torch.where(most < SMALLEST, torch.ones_like(most), most / largest)
    scaled = rows.float() / scales[:, None]
    if dtype is torch.int8:
        scaled = torch.where(scaled >= 0, (scaled + 0.5).floor(), -(0.5 - scaled).floor())
    return scaled.clamp(-largest, largest).to(dtype), scales


def rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return `heads` (tokens, heads, dim) rotated by (tokens, half) angles, float32."""
    half = cosines.shape[1]
    x = heads.float()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cosine, sine = cosines[:, None], sines[:, None]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1)


def rotate_and_store(
    qkv: Tensor,
    queries: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """As container.kernels.gpu.layer.rotate_and_store."""
    heads, kv_heads = queries.shape[1], keys.shape[2]
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    if norms is not None:
        q, k = (
            rms_norm(each, weight, norms[2]).to(each.dtype)
            for each, weight in zip((q, k), norms[:2], strict=True)
        )
    angles = cosines[positions.long()], sines[positions.long()]
    queries.copy_(rotated(q, *angles).to(queries.dtype))
    real = places >= 0
    at = places[real].long()
    stored = [rotated(k, *angles)[real], v.float()[real]]
    if scales is not None:
        stored = [(x / s[:, None]).clamp(-448.0, 448.0) for x, s in zip(stored, scales, strict=True)]
    for pool, rows in zip((keys, values), stored, strict=True):
        pool[at // pool.shape[1], at % pool.shape[1]] = rows.to(pool.dtype)
