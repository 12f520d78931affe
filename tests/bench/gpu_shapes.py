"""Models of known shapes with random weights on a device, and what their steps must move at least.

Owns: the shapes, drawing weights where they will lie, the bytes of a step. Must not know: what is measured.
Speed hardly depends on values, so that a shape stands for its model where no weights can be had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from container.model.device import Activation, Angles, Device, HeadShape, Weight
from container.model.device_decoder import DecoderLayer, DecoderWeights
from container.model.device_weights import Pack, dense, fp8, int4

PACKS: dict[str, Pack] = {"bf16": dense, "fp8": fp8, "int4": int4}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the common form."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int

    @property
    def kv_bytes(self) -> int:
        """What a token's keys and values take, in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.dim * 2


LLAMA_8B = Shape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = Shape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256)
TINY = Shape("tiny", 1, 32, 32, 2, 1, 16, 96)
TINY_LARGE = Shape("tiny-large", 1, 128, 128, 8, 2, 16, 96)


def weights(
    shape: Shape, device: Device, form: str, positions: int, dtype: torch.dtype = torch.bfloat16
) -> DecoderWeights:
    """Return random weights of `shape` on `device`, drawn and packed one product at a time."""
    pack = PACKS[form]

    def drawn(outputs: int, inputs: int, into: Callable[[Tensor, Tensor | None], Weight] = pack) -> Weight:
        weight = device.zeros((outputs, inputs), dtype)
        return into(weight.normal_(0.0, inputs**-0.5), None)

    def ones() -> Tensor:
        return device.zeros((shape.hidden,), dtype).fill_(1.0)

    heads = HeadShape(shape.heads, shape.kv_heads, shape.dim, shape.dim**-0.5)
    layers = [
        DecoderLayer(
            heads,
            ones(),
            drawn((shape.heads + 2 * shape.kv_heads) * shape.dim, shape.hidden),
            drawn(shape.hidden, shape.heads * shape.dim),
            ones(),
            drawn(2 * shape.intermediate, shape.hidden),
            drawn(shape.hidden, shape.intermediate),
        )
        for _ in range(shape.layers)
    ]
    embedding = device.zeros((shape.vocabulary, shape.hidden), dtype).normal_()
    angles = torch.outer(
        torch.arange(positions).float(), 500000.0 ** -(torch.arange(0, shape.dim, 2) / shape.dim)
    )
    turned = [device.zeros(angles.shape, torch.float32) for _ in range(2)]
    for to, source in zip(turned, (angles.cos(), angles.sin()), strict=True):
        device.upload(source, to).wait()
    head = drawn(shape.vocabulary, shape.hidden, dense)
    return DecoderWeights(layers, embedding, ones(), head, Angles(*turned), 1e-5, Activation.SILU)
