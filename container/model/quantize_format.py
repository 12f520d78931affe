"""What every quantized weight format can do, and where the formats are found.

Owns: the Format protocol, the reasons a layer is left alone, the lookup by scheme.
Must not know: modules, models. A library that one scheme needs is imported when that is asked for.
Invariant: a format keeps all it knows about a weight in its parts: tensors whose first axis is the output.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from container.model.quantize_choose import Scheme


class Obstacle(enum.StrEnum):
    """Why a layer stays in full precision. Closed: it is logged and counted."""

    WIDTH = "width"  # the sizes are not multiples of the block
    OUTPUT = "output"  # the head: errors there reach every token directly
    ROUTER = "router"  # a flipped expert costs more than the bytes saved
    LAYOUT = "layout"  # experts stored in a way not known here


@dataclass(frozen=True, slots=True)
class Part:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Multiplier(Protocol):
    """Multiplies by a weight (out_features, in_features) held in parts."""

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return `x` (tokens, in_features) times the weight transposed, (tokens, out_features)."""

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (out_features, in_features) the parts stand for, in full precision."""

    def multiply_plain(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """As `multiply`, with the unpacked weight and activations as they are."""
        return functional.linear(x, self.unpack(parts).to(x.dtype))


class Format(Multiplier, Protocol):
    """Packs, unpacks and multiplies one weight matrix (out_features, in_features)."""

    @property
    def aligned_width(self) -> int:
        """Other widths than multiples of this are packed otherwise: a shard may differ from the whole."""

    def obstacle(self, out_features: int, in_features: int) -> Obstacle | None:
        """Return why a weight of this size cannot be packed, or None."""

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Return what `pack` makes of a weight of this size; `weight` is always among it."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of `weight` (out_features, in_features), on its device."""


class Plain(Multiplier):
    """The weight as it was: where one of an expert's two weights cannot be packed."""

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return functional.linear(x, parts["weight"])

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"]


def format_for(scheme: Scheme) -> Format:
    """Return the format of `scheme`, importing what it needs; `none` has no format."""
    if scheme is Scheme.INT8_BLOCK or scheme is Scheme.INT4_BLOCK:
        from container.model.quantize_blocks import Int4Block, Int8Block

        return Int8Block() if scheme is Scheme.INT8_BLOCK else Int4Block()
    if scheme is Scheme.FP8:
        from container.model.quantize_fp8 import Fp8

        return Fp8()
    assert scheme is not Scheme.NONE, "an unquantized weight has no format"
    from container.model.quantize_bnb import Int8, Nf4

    return Nf4() if scheme is Scheme.BNB_NF4 else Int8()
