"""Paged attention in plain torch: what the kernel is judged by, and what runs where Triton does not.

Owns: the same layout and arithmetic, written to be read.
Must not know: Triton, how work is cut. Invariant: sums in float64, one row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(pages: Tensor, line: Tensor, first: int, end: int) -> Tensor:
    """Return positions [first, end) of the sequence whose pages `line` names, (kv_heads, end - first, dim).

    `pages` is (pages, page_tokens, kv_heads, dim).
    """
    at = torch.arange(first, end, device=pages.device)
    page = line[at // pages.shape[1]].long()
    return pages[page, at % pages.shape[1]].transpose(0, 1)


def attended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return what `query` (count, heads, dim), the last of the positions, sees; (count, heads, dim) float64.

    `keys` and `values` are (kv_heads, positions, dim), their positions begin at `first`.
    """
    count, heads, _ = query.shape
    kv_heads, length = keys.shape[:2]
    grouped = query.double().transpose(0, 1).reshape(kv_heads, -1, count, query.shape[2])
    scores = scale * (grouped @ keys.double()[:, None].transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = first + torch.arange(length, device=query.device)
    own = first + length - count + torch.arange(count, device=query.device)
    seen = at[None] <= own[:, None]
    if window is not None:
        seen &= own[:, None] - at[None] < window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.double().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1)[..., :length]
    found = weights @ values.double()[:, None]
    return found.reshape(heads, count, values.shape[2]).transpose(0, 1)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    table: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Fill `out` (tokens, heads, dim) as container.kernels.gpu.attention.attend does."""
    borders = starts.tolist()
    for row, (length, slot) in enumerate(zip(lengths.tolist(), slots.tolist(), strict=True)):
        begin, end = borders[row], borders[row + 1]
        if begin == end:
            continue
        first = 0 if window is None else max(0, length - (end - begin) - window + 1)
        held = []
        for pages, scales in ((keys, key_scales), (values, value_scales)):
            floats = gathered(pages, table[slot], first, length).double()
            held.append(floats if scales is None else floats * scales.double()[:, None, None])
        queries = query[begin:end]
        found = attended(
            queries, held[0], held[1], first, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        out[begin:end] = found.to(out.dtype)
