"""Paged attention on an accelerator as Python calls it: shapes, layouts, every check the kernel omits.

Owns: the form of a layer's attention and of a step's rows, how work is cut, the launch.
Must not know: sequences, slots' owners, models. Pages and tensors belong to the caller, who keeps them alive.
Invariant: nothing that depends on a length is read on the host, so that a captured launch serves every
mixture of rows that fits its sizes.

    keys, values   (pages, page_tokens, kv_heads, dim), one pair per layer; page 0 belongs to no sequence
    table          (slots, pages of a sequence) int32: which page holds positions [i * page_tokens, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from container.kernels.gpu import attention_kernel

SMALLEST: Final = 16  # the least extent of a tensor core's product
LARGEST_DIM: Final = 256
FP8: Final = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class PagedShape:
    """One layer's attention. `window` None: a query sees all earlier positions; `softcap` None: no cap."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("`heads` is not a multiple of `kv_heads`")
        if not all(1 <= dim <= LARGEST_DIM for dim in (self.key_dim, self.value_dim)):
            raise ValueError(f"`key_dim` or `value_dim` is not from 1 to {LARGEST_DIM}")
        if self.window is not None and self.window < 1:
            raise ValueError("`window` is not positive")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError("`softcap` is not positive")

    @property
    def group(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A step's rows where the device has them, int32 all.

    Tokens [starts[r], starts[r + 1]) are the last positions of the sequence in line `slots[r]` of `table`,
    which holds `lengths[r]` positions with them. A row of no tokens is left alone.
    """

    starts: Tensor
    lengths: Tensor
    slots: Tensor
    table: Tensor

    @property
    def count(self) -> int:
        return self.lengths.shape[0]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut; results differ by rounding only.

    `block_rows` query rows (tokens times heads of a group) share a program, which reads `tile` positions at a
    time; a program's keys are cut into `splits`.
    """

    block_rows: int = 16
    tile: int = 32
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if any(size < SMALLEST or size & (size - 1) for size in (self.block_rows, self.tile)):
            raise ValueError(f"`block_rows` or `tile` is not a power of two from {SMALLEST} on")
        if self.splits < 1:
            raise ValueError("`splits` is not positive")


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """Room for the partial sums of split attention, float32; kept between launches so that none allocates."""

    gathered: Tensor  # (tokens, heads, splits, value_dim)
    peaks: Tensor  # (tokens, heads, splits)
    sums: Tensor  # (tokens, heads, splits)

    @classmethod
    def of(cls, shape: PagedShape, tokens: int, splits: int, device: torch.device) -> Partials:
        """Return room for `tokens` queries."""
        sizes = (tokens, shape.heads, splits)
        made = [torch.empty(size, device=device) for size in ((*sizes, shape.value_dim), sizes, sizes)]
        return cls(*made)


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """What some models and formats add: a sink logit per head, scales per kv head of fp8 keys and values."""

    sinks: Tensor | None = None  # (heads,) float32
    key_scales: Tensor | None = None  # (kv_heads,) float32: what stored keys are multiplied by
    value_scales: Tensor | None = None


PLAIN: Final = Extras()


def attend(
    shape: PagedShape,
    rows: Rows,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tuning: Tuning,
    extras: Extras = PLAIN,
    partials: Partials | None = None,
) -> None:
    """Fill `out` (tokens, heads, value_dim) with what the rows' queries attend to.

    `query` (tokens, heads, key_dim) carries its rotation; the rows' own keys and values are in their pages
    already. Tokens of no row are left alone. `partials` are needed for more than one split.
    """
    _check(shape, rows, query, keys, values, out, extras)
    splits = tuning.splits
    assert splits == 1 or partials is not None, "splits need room for their sums"
    block_rows = max(tuning.block_rows, padded(shape.group))
    block_tokens = block_rows // shape.group
    unused = rows.lengths  # stands for tensors that this variant never reads
    target = out if partials is None or splits == 1 else partials.gathered
    if partials is not None and splits > 1:
        held = (query.shape[0], shape.heads, splits, shape.value_dim)
        assert partials.gathered.is_contiguous() and partials.gathered.shape[0] >= held[0], "too little room"
        assert partials.gathered.shape[1:] == held[1:], "the room is for another shape"
    grid = (query.shape[0] // block_tokens + rows.count, shape.kv_heads, splits)
    kernel: Any = attention_kernel.attend
    kernel[grid](
        query,
        keys,
        values,
        target,
        unused if partials is None else partials.peaks,
        unused if partials is None else partials.sums,
        rows.starts,
        rows.lengths,
        rows.slots,
        rows.table,
        unused if extras.sinks is None else extras.sinks,
        unused if extras.key_scales is None else extras.key_scales,
        unused if extras.value_scales is None else extras.value_scales,
        shape.scale,
        rows.count,
        query.stride(0),
        out.stride(0),
        keys.stride(0),
        values.stride(0),
        rows.table.stride(0),
        **constants(shape, keys, query, tuning, extras),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    if partials is not None and splits > 1:
        _combine(shape, rows, partials, out, splits)


def constants(
    shape: PagedShape, keys: Tensor, query: Tensor, tuning: Tuning, extras: Extras
) -> dict[str, Any]:
    """Return what one compiled variant of the kernel is made for."""
    block_rows = max(tuning.block_rows, padded(shape.group))
    return {
        "GROUP": shape.group,
        "KV_HEADS": shape.kv_heads,
        "K_DIM": shape.key_dim,
        "V_DIM": shape.value_dim,
        "K_PAD": padded(shape.key_dim),
        "V_PAD": padded(shape.value_dim),
        "PAGE": keys.shape[1],
        "BLOCK_M": block_rows,
        "BLOCK_Q": block_rows // shape.group,
        "TILE": tuning.tile,
        "SPLITS": tuning.splits,
        "WINDOW": shape.window or 0,
        "SOFTCAP": shape.softcap or 0.0,
        "HAS_SINKS": extras.sinks is not None,
        "SCALED": extras.key_scales is not None,
        "WIDE": query.device.type == "cpu" and query.dtype is torch.bfloat16,
    }


def padded(size: int) -> int:
    """Return the power of two, at least a tensor core's extent, that holds `size`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _combine(shape: PagedShape, rows: Rows, partials: Partials, out: Tensor, splits: int) -> None:
    kernel: Any = attention_kernel.combine
    kernel[(out.shape[0], shape.heads)](
        partials.gathered,
        partials.peaks,
        partials.sums,
        out,
        rows.starts,
        rows.count,
        out.stride(0),
        HEADS=shape.heads,
        V_DIM=shape.value_dim,
        V_PAD=padded(shape.value_dim),
        SPLITS=splits,
        SPLITS_PAD=1 << (splits - 1).bit_length(),
    )


def _check(
    shape: PagedShape, rows: Rows, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, extras: Extras
) -> None:
    tokens = query.shape[0]
    for tensor, sizes in (
        (query, (tokens, shape.heads, shape.key_dim)),
        (out, (tokens, shape.heads, shape.value_dim)),
        (keys, (*keys.shape[:2], shape.kv_heads, shape.key_dim)),
        (values, (*keys.shape[:2], shape.kv_heads, shape.value_dim)),
    ):
        assert tensor.shape == sizes, "a tensor has another shape"
        assert tensor[0].is_contiguous(), "heads lie side by side"
    assert keys.dtype is values.dtype and (keys.dtype is query.dtype or keys.dtype is FP8), "unlike dtypes"
    assert (keys.dtype is FP8) == (extras.key_scales is not None), "fp8 comes with scales, and nothing else"
    assert (extras.key_scales is None) == (extras.value_scales is None), "scales come in pairs"
    assert rows.starts.shape == (rows.count + 1,) and rows.slots.shape == (rows.count,), "rows are cut short"
    assert rows.count > 0 and rows.table.dim() == 2 and rows.table.stride(1) == 1, "a table has lines"
    parts = (rows.starts, rows.lengths, rows.slots, rows.table)
    assert all(part.dtype is torch.int32 for part in parts), "rows are int32"
    for wanted, width in (
        (extras.sinks, shape.heads),
        (extras.key_scales, shape.kv_heads),
        (extras.value_scales, shape.kv_heads),
    ):
        assert wanted is None or (wanted.shape == (width,) and wanted.dtype is torch.float32), "float32 each"
