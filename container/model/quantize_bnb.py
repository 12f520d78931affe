"""The formats of bitsandbytes: 4-bit normal float (`bnb-nf4`) and LLM.int8 with threshold 0 (`bnb-int8`).

Owns: calling bitsandbytes' operators, with the same results as its `Linear4bit` and `Linear8bitLt`.
Must not know: modules, models.
Invariant: bitsandbytes is imported here only, on first use, silent and without its way to a network.

Its operators rather than its layers: their state lives in buffers under names of ours, so that it is saved,
restored and sliced like every other format's, and experts share the code.

    bnb-nf4, 4.5 bits per weight                       bnb-int8
    weight         (out, in / 2) uint8                 weight        (out, in) int8
    weight_absmax  (out, in / block) fp32              weight_scale  (out,) fp32, the largest |w| of the row

The absmax values are not quantized again (0.37 bits less): the second quantization is centred on a mean
over the tensor, so that a shard would differ from the whole.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from container.model.quantize_format import Format, Obstacle, Part

BLOCK: Final = 64
SMALL_BLOCK: Final = 32  # where 64 does not divide the width
# On CPUs with AVX512-BF16 bitsandbytes asks this package, when it is installed, for a kernel from a hub.
DOWNLOADER: Final = "kernels"


@cache
def library() -> Any:
    """Return bitsandbytes, imported with its logger quiet and the downloader of kernels out of reach.

    Its log lines tell dtypes at every call; nothing in them is for the operator.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    absent = object()
    before = sys.modules.get(DOWNLOADER, absent)
    sys.modules[DOWNLOADER] = None  # type: ignore[assignment] # what makes an import fail
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        if before is absent:
            del sys.modules[DOWNLOADER]
        else:
            sys.modules[DOWNLOADER] = before  # type: ignore[assignment]


class Nf4(Format):
    """4-bit normal float in blocks along the rows: 64, or 32 where 64 does not divide the width.

    A shard equals the whole, bit for bit, where both have blocks of 64 (see `aligned_width`).
    """

    aligned_width = BLOCK

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        return Obstacle.WIDTH if in_features % SMALL_BLOCK or not out_features else None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        blocks = in_features // _block(in_features)
        return {
            "weight": Part((out_features, in_features // 2), torch.uint8),
            "weight_absmax": Part((out_features, blocks), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        packed, state = library().functional.quantize_4bit(
            weight.contiguous(), blocksize=_block(inputs), compress_statistics=False, quant_type="nf4"
        )
        return {"weight": packed.view(outputs, -1), "weight_absmax": state.absmax.view(outputs, -1)}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        state = _nf4_state(parts, torch.float32)
        dense: Tensor = library().functional.dequantize_4bit(parts["weight"].view(-1, 1), state)
        return dense

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = library().matmul_4bit(x, parts["weight"].view(-1, 1), _nf4_state(parts, x.dtype))
        return y


class Int8(Format):
    """Weights as int8 with a scale per output; activations, cast to fp16, with a scale per token.

    Activations beyond 65504 become infinite; the probe of the real weights then fails the start.
    """

    aligned_width = 1

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        # the int8 GEMM of CUDA wants widths of 4
        return Obstacle.WIDTH if in_features % 4 or out_features % 4 or not out_features else None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {
            "weight": Part((out_features, in_features), torch.int8),
            "weight_scale": Part((out_features,), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        values, scale, _ = library().functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": values, "weight_scale": scale}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].float() * (parts["weight_scale"] / 127).unsqueeze(-1)

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        bnb = library()
        state = bnb.MatmulLtState()
        state.CB, state.SCB = parts["weight"], parts["weight_scale"]
        state.threshold, state.has_fp16_weights, state.is_training = 0.0, False, False
        y: Tensor = bnb.matmul(x, parts["weight"], state=state)
        return y


def _block(in_features: int) -> int:
    return SMALL_BLOCK if in_features % BLOCK else BLOCK


def _nf4_state(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    bnb = library()
    packed, absmax = parts["weight"], parts["weight_absmax"]
    shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
    return bnb.functional.QuantState(
        absmax=absmax.view(-1),
        shape=shape,
        code=_nf4_values(packed.device),
        blocksize=shape[1] // absmax.shape[1],
        quant_type="nf4",
        dtype=dtype,
    )


@cache
def _nf4_values(device: torch.device) -> Tensor:
    values: Tensor = library().functional.get_4bit_type("nf4", device=device)
    return values
