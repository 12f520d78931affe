"""fp8 (e4m3) weights per output channel, activations per token: tensor cores where there are, else emulated.

Owns: the format and its arithmetic, the rowwise scaled GEMM, the emulation that defines it.
Must not know: modules, models, whether the hardware was asked about (quantize_choose refuses it at start).
Invariant: the emulation rounds where the hardware does: operands to e4m3, sums in fp32, the result once.

    weight        (out, in) float8_e4m3fn      w / scale, rounded
    weight_scale  (out,) fp32                  max|w| of the row / 448
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from container.model.quantize_format import Format, Obstacle, Part

LARGEST: Final = 448.0  # of e4m3
MULTIPLE: Final = 16  # of both widths, by the tensor cores
SMALLEST_ROW: Final = 2.0**-100  # a smaller row counts as zeros


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` (rows, width) as e4m3 and its scales (rows,) fp32: max|x| / 448 of each row, 1 for zeros."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest < SMALLEST_ROW, torch.ones_like(largest), largest / LARGEST)
    values = (wide / scale.unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale


class Fp8(Format):
    """y = (x8 w8^T) * scale of the token * scale of the output, in fp32, rounded once; bf16 on the GPU."""

    aligned_width = 1

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        return Obstacle.WIDTH if in_features % MULTIPLE or out_features % MULTIPLE else None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {
            "weight": Part((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": Part((out_features,), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        values, scale = to_fp8(weight)
        return {"weight": values, "weight_scale": scale}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].float() * parts["weight_scale"].unsqueeze(-1)

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        values, scale = to_fp8(x)
        if x.is_cuda:
            y: Tensor = torch._scaled_mm(  # the only way to the rowwise GEMM in this torch
                values,
                parts["weight"].t(),  # column-major, as the GEMM wants it
                scale_a=scale.unsqueeze(1),
                scale_b=parts["weight_scale"].unsqueeze(0),
                out_dtype=torch.bfloat16,
            )
            return y.to(x.dtype)
        sums = functional.linear(values.float(), parts["weight"].float())
        return (sums * scale.unsqueeze(1) * parts["weight_scale"]).to(x.dtype)
