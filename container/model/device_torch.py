"""A layer's operators by torch alone, for a device whose kernels are missing or wrong: slower, right.

Owns: attention by torch's scaled_dot_product_attention over gathered pages. Must not know: which device.
Invariant: the results are those of the plain operators within rounding. It reads the step's rows on the host,
so that its launches cannot be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from container.model.device import HeadShape, LayerPages, StepRows
from container.model.device_cpu import PlainOperators


class TorchOperators(PlainOperators):
    """Row after row; everything but attention is the plain form, which runs wherever its tensors lie."""

    def attend(self, query: Tensor, shape: HeadShape, rows: StepRows, pages: LayerPages) -> Tensor:
        out = torch.zeros_like(query)
        starts, lengths, lines = (part.tolist() for part in (rows.starts, rows.lengths, rows.lines))
        page_tokens = pages.keys.shape[1]
        for row, (length, line) in enumerate(zip(lengths, lines, strict=True)):
            first, end = starts[row], starts[row + 1]
            if first == end:
                continue
            count = end - first
            low = 0 if shape.window is None else max(0, length - count - shape.window + 1)
            own = rows.table[line, low // page_tokens : -(-length // page_tokens)]
            begins = low // page_tokens * page_tokens  # position of the first gathered
            keys, values = (
                pool[own].flatten(0, 1)[low - begins : length - begins].transpose(0, 1)[None]
                for pool in (pages.keys, pages.values)
            )
            attended = functional.scaled_dot_product_attention(
                query[first:end].transpose(0, 1)[None],
                keys,
                values,
                attn_mask=_seen(count, length - low, shape.window, query.device),
                scale=shape.scale,
                enable_gqa=shape.heads != shape.kv_heads,
            )
            out[first:end] = attended[0].transpose(0, 1)
        return out.view(query.shape[0], -1)


def _seen(count: int, length: int, window: int | None, place: torch.device) -> Tensor | None:
    """Return which of `length` positions the last `count` see, (count, length); None where each sees all."""
    if count == 1 and (window is None or window >= length):
        return None
    queries = torch.arange(length - count, length, device=place)[:, None]
    keys = torch.arange(length, device=place)[None]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)
