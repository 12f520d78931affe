"""Sequences in pages for tests of the attention operator: made at random, run natively, compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from container.kernels import attention_reference as reference
from container.kernels.attention import (
    PAIR_PRODUCTS,
    AttentionRow,
    AttentionShape,
    KVType,
    PageLayout,
    attention,
)
from container.kernels.operators import Native

LAYER = 1  # of two, so that offsets matter
STALE = 255  # what fills pages first: NaN in float32 and bfloat16


@dataclass
class Paged:
    """One sequence with its pages; positions [0, start) are written, `count` more come with the call."""

    start: int
    count: int
    pages: list[reference.Buffer]

    def row(self, first: int) -> AttentionRow:
        addresses = np.array([page.ctypes.data for page in self.pages], np.uintp)
        return AttentionRow(first, self.count, self.start, addresses)


def layout_for(shape: AttentionShape, page_tokens: int, kv_type: int) -> PageLayout:
    sizes = (shape.kv_heads, shape.dim)
    return PageLayout.of([sizes, sizes, sizes], page_tokens, reference.KVType(kv_type))


def aligned(size: int, fill: int = STALE) -> reference.Buffer:
    raw = np.full(size + 64, fill, np.uint8)
    at = -raw.ctypes.data % 64
    return raw[at : at + size]


def sequence(
    shape: AttentionShape, layout: PageLayout, start: int, count: int, seed: int, scale: float = 1.0
) -> Paged:
    """Return a sequence with `start` random positions written and stale bytes wherever nothing is."""
    made = torch.Generator().manual_seed(seed)
    pages = [aligned(layout.page_bytes) for _ in range(layout.pages_for(start + count))]
    if start:
        keys, values = (
            scale * torch.randn(start, shape.kv_heads, shape.dim, generator=made) for _ in range(2)
        )
        reference.write(pages, layout, LAYER, shape, 0, keys, values)
    return Paged(start, count, pages)


def inputs(shape: AttentionShape, tokens: int, seed: int, scale: float = 1.0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, shape.heads + 2 * shape.kv_heads, shape.dim, generator=made)


def run(
    native: Native,
    shape: AttentionShape,
    layout: PageLayout,
    sequences: Sequence[Paged],
    qkv: Tensor,
    scratch: Tensor | None = None,
) -> list[Tensor]:
    """Run one call over all sequences, packed in order; return each one's (count, heads, dim)."""
    rows, first = [], 0
    for one in sequences:
        rows.append(one.row(first))
        first += one.count
    out = torch.full((qkv.shape[0], shape.heads, shape.dim), float("nan"))
    held = None if scratch is None else scratch.numpy()
    attention(native, shape, layout, LAYER, rows, qkv.numpy(), out.numpy(), held)
    return list(out[:first].split([one.count for one in sequences]))


def assert_like_reference(
    native: Native,
    shape: AttentionShape,
    layout: PageLayout,
    sequences: Sequence[Paged],
    qkv: Tensor,
    found: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Compare with what the reference makes of the pages as they are now, own positions among them.

    Where weights are rounded to bfloat16, each is off by 2^-8 of itself at most, and so is what they weigh.
    """
    pairs = layout.kv_type is KVType.BFLOAT16 and native.isa in PAIR_PRODUCTS
    first = 0
    for one, mine in zip(sequences, found, strict=True):
        keys, values = reference.read(one.pages, layout, LAYER, shape, one.start + one.count)
        queries = qkv[first : first + one.count, : shape.heads]
        wanted = reference.attended(shape, queries, one.start, keys, values, pairs=pairs)
        allowed = torch.full(wanted.shape, tolerance, dtype=torch.float64)
        if pairs:
            allowed += reference.attended(shape, queries, one.start, keys, values.abs(), pairs=True) / 256
        assert ((mine.double() - wanted).abs() < allowed).all()  # false for NaN
        first += one.count


def random_shape(rng: random.Random) -> AttentionShape:
    kv_heads, dim = rng.choice([1, 2, 3]), 8 * rng.randint(2, 16)
    window = rng.choice([None, None, rng.randint(1, 60), rng.randint(200, 400)])
    return AttentionShape(kv_heads * rng.randint(1, 8), kv_heads, dim, dim**-0.5, window)
