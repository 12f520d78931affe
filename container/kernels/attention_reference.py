"""Attention over pages in plain torch: what the native operator is judged by.

Owns: the same layout and arithmetic, written to be read.
Must not know: the library. Invariant: sums in float64, one sequence and one query at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from container.kernels.attention import AttentionShape, KVType, PageLayout

Buffer = npt.NDArray[np.uint8]
TORCH: dict[KVType, torch.dtype] = {
    KVType.FLOAT32: torch.float32,
    KVType.BFLOAT16: torch.bfloat16,
    KVType.INT8: torch.int8,
}


def quantized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return (..., dim) float32 as int8 and one scale per vector: the largest magnitude becomes 127."""
    most = vectors.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 0, 127.0 / most, torch.zeros_like(most))
    return (vectors * factor).round().to(torch.int8), (most / 127.0)[..., 0]


def _views(
    page: Buffer, layout: PageLayout, layer: int, shape: AttentionShape
) -> list[tuple[Tensor, Tensor | None]]:
    """Return a page's keys (kv_heads, lanes, dim), values (kv_heads, page_tokens, dim), each with scales."""
    whole = torch.from_numpy(page)
    size = layout.kv_type.element_bytes
    found: list[tuple[Tensor, Tensor | None]] = []
    for offsets, positions, across in (
        (layout.key_offsets, layout.lanes, True),
        (layout.value_offsets, layout.page_tokens, False),
    ):
        at = offsets[layer]
        end = at + shape.kv_heads * positions * shape.dim * size
        data = whole[at:end].view(TORCH[layout.kv_type])
        if across:
            data = data.view(shape.kv_heads, shape.dim, positions).transpose(1, 2)
        else:
            data = data.view(shape.kv_heads, positions, shape.dim)
        scales = None
        if layout.kv_type is KVType.INT8:
            scales = whole[end : end + 4 * shape.kv_heads * layout.lanes].view(torch.float32)
            scales = scales.view(shape.kv_heads, layout.lanes)
        found.append((data, scales))
    return found


def read(
    pages: Sequence[Buffer], layout: PageLayout, layer: int, shape: AttentionShape, tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the keys and values (kv_heads, tokens, dim) that `pages` hold, float32."""
    parts: list[list[Tensor]] = [[], []]
    for page in pages[: layout.pages_for(tokens)]:
        for kind, (data, scales) in enumerate(_views(page, layout, layer, shape)):
            floats = data[:, : layout.page_tokens].float()
            if scales is not None:
                floats = floats * scales[:, : layout.page_tokens, None]
            parts[kind].append(floats)
    keys, values = (torch.cat(part, 1)[:, :tokens] for part in parts)
    return keys, values


def write(
    pages: Sequence[Buffer],
    layout: PageLayout,
    layer: int,
    shape: AttentionShape,
    start: int,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Store (tokens, kv_heads, dim) from position `start` on."""
    for at in range(keys.shape[0]):
        page, position = divmod(start + at, layout.page_tokens)
        for source, (data, scales) in zip(
            (keys[at], values[at]), _views(pages[page], layout, layer, shape), strict=True
        ):
            if scales is None:
                data[:, position] = source.to(data.dtype)
            else:
                data[:, position], scales[:, position] = quantized(source)


def attended(
    shape: AttentionShape, queries: Tensor, start: int, keys: Tensor, values: Tensor, *, pairs: bool = False
) -> Tensor:
    """Return what (count, heads, dim) queries at positions start, start + 1, ... see, float64.

    `keys` and `values` are (kv_heads, positions, dim). `pairs`: queries are rounded to bfloat16 first, as
    instruction sets do that multiply pairs of it; weights, which those round too, are left as they are.
    """
    group = shape.heads // shape.kv_heads
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for at in range(queries.shape[0]):
        end = start + at + 1
        first = 0 if shape.window is None else max(0, end - shape.window)
        for head in range(shape.heads):
            key, value = keys[head // group, first:end].double(), values[head // group, first:end].double()
            query = queries[at, head]
            if pairs:
                query = query.to(torch.bfloat16)
            weights = torch.softmax(shape.scale * (key @ query.double()), 0)
            out[at, head] = weights @ value
    return out
