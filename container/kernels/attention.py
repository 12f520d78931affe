"""Attention over paged keys and values as Python calls it: layouts, rows, every check the native code omits.

Owns: where a layer's keys and values lie in a page, the rows' memory layout, the bounds of the operator.
Must not know: sequences, slots, models. Pages and tensors belong to the caller, who keeps them alive.
Invariant: nothing out of bounds reaches the library through this file; see csrc/attention.hpp for the layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from container.kernels.memory import ALIGNMENT, Floats, readable
from container.kernels.operators import AttentionLayer, Native, Paging

MAX_DIM: Final = 256  # ATTENTION_MAX_DIM: bounds the operator's stack
MAX_PAGE_TOKENS: Final = 64  # ATTENTION_MAX_PAGE_TOKENS
LANES: Final = 8
PAIR_PRODUCTS: Final = ("avx512bf16",)  # instruction sets that multiply bfloat16 keys and values as they are
# Lets threads share contexts of a few rows: enough for 100,000 tokens of one sequence with 9 heads of 64.
SCRATCH_FLOATS: Final = 1 << 18

Addresses = npt.NDArray[np.uintp]
# The memory layout of `Row` in csrc/attention.hpp.
ROW: Final = np.dtype(
    {
        "names": ["first", "count", "start", "pages"],
        "formats": ["<i4", "<i4", "<i4", "<u8"],
        "offsets": [0, 4, 8, 16],
        "itemsize": 24,
    }
)


class KVType(IntEnum):
    """What keys and values are stored as; products with them are summed in float32 always.

    With bfloat16, instruction sets in PAIR_PRODUCTS round queries and weights to it too.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2  # with one float32 scale per head and position

    @property
    def element_bytes(self) -> int:
        return (4, 2, 1)[self]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention; `window` None: a query sees all earlier positions."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("`heads` is not a multiple of `kv_heads`")
        if not 8 <= self.dim <= MAX_DIM or self.dim % 8:
            raise ValueError(f"`dim` is not a multiple of 8 from 8 to {MAX_DIM}")
        if self.window is not None and self.window < 1:
            raise ValueError("`window` is not positive")


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where each layer's keys and values begin in a page, in bytes, and what a page measures."""

    page_tokens: int
    kv_type: KVType
    key_offsets: tuple[int, ...]
    value_offsets: tuple[int, ...]
    page_bytes: int

    @classmethod
    def of(cls, layers: Sequence[tuple[int, int]], page_tokens: int, kv_type: KVType) -> PageLayout:
        """Return the layout of pages for `layers`, each (kv_heads, dim)."""
        if not 1 <= page_tokens <= MAX_PAGE_TOKENS:
            raise ValueError(f"`page_tokens` is not from 1 to {MAX_PAGE_TOKENS}")
        lanes = -(-page_tokens // LANES) * LANES
        keys: list[int] = []
        values: list[int] = []
        at = 0
        for kv_heads, dim in layers:
            scales = 4 * kv_heads * lanes if kv_type is KVType.INT8 else 0
            for offsets, positions in ((keys, lanes), (values, page_tokens)):
                offsets.append(at)
                at += kv_heads * positions * dim * kv_type.element_bytes + scales
                at = -(-at // ALIGNMENT) * ALIGNMENT
        return cls(page_tokens, kv_type, tuple(keys), tuple(values), at)

    @property
    def lanes(self) -> int:
        """Positions per page as keys count them: `page_tokens` rounded up to whole vectors."""
        return -(-self.page_tokens // LANES) * LANES

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def native(self) -> Paging:
        """Return the structure that the library reads."""
        return Paging(self.page_tokens, int(self.kv_type))

    def native_layer(self, layer: int, shape: AttentionShape) -> AttentionLayer:
        """Return the structure of layer number `layer`."""
        return AttentionLayer(
            shape.heads,
            shape.kv_heads,
            shape.dim,
            shape.window or 0,
            shape.scale,
            self.key_offsets[layer],
            self.value_offsets[layer],
        )


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Tokens [first, first + count) of a step are positions start, start + 1, ... of one sequence.

    `pages` holds the addresses of its pages from position 0 on; it is kept alive until the call returns.
    """

    first: int
    count: int
    start: int
    pages: Addresses


def packed_rows(rows: Sequence[AttentionRow], tokens: int, page_tokens: int) -> npt.NDArray[Any]:
    """Return `rows` as the library reads them; `tokens` is the step's size.

    Asserts that rows do not overlap, stay inside of the step, and have a page for each position.
    """
    packed = np.zeros(len(rows), ROW)
    covered = 0
    for at, row in enumerate(rows):
        assert row.count > 0 and row.start >= 0, "a row has tokens and starts at a position"
        assert row.first >= 0 and row.first + row.count <= tokens, "a row reaches outside of the step"
        assert row.pages.dtype == np.uintp and row.pages.ndim == 1, "addresses are pointer-sized"
        assert row.pages.flags.c_contiguous, "addresses lie side by side"
        assert len(row.pages) * page_tokens >= row.start + row.count, "a position has no page"
        covered += row.count
        packed[at] = (row.first, row.count, row.start, row.pages.ctypes.data)
    order = np.argsort(packed["first"], kind="stable")
    ends = packed["first"][order] + packed["count"][order]
    assert covered <= tokens and bool((ends[:-1] <= packed["first"][order][1:]).all()), "rows overlap"
    return packed


def attention(
    native: Native,
    shape: AttentionShape,
    layout: PageLayout,
    layer: int,
    rows: Sequence[AttentionRow],
    qkv: Floats,
    out: Floats,
    scratch: Floats | None = None,
) -> None:
    """Write the rows' keys and values to their pages and fill `out` with what their queries attend to.

    `qkv` (tokens, heads + 2 * kv_heads, dim) and `out` (tokens, heads, dim) are float32 and contiguous;
    queries and keys carry their rotation already. Tokens of no row are left alone. A page that two sequences
    share must be full in both. `scratch`, float32, lets threads share the work of one long context.
    """
    tokens = qkv.shape[0]
    width = shape.heads + 2 * shape.kv_heads
    assert readable(qkv, (tokens, width, shape.dim)), "`qkv` has another shape"
    assert readable(out, (tokens, shape.heads, shape.dim)), "`out` has another shape"
    assert scratch is None or readable(scratch, (scratch.size,)), "float32 side by side is read"
    packed = packed_rows(rows, tokens, layout.page_tokens)
    native.call(
        "strongroom_attention",
        ctypes.byref(layout.native_layer(layer, shape)),
        ctypes.byref(layout.native()),
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_int32(len(packed)),
        ctypes.c_void_p(qkv.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_void_p(None if scratch is None else scratch.ctypes.data),
        ctypes.c_int64(0 if scratch is None else scratch.size),
    )
