"""A device's memory for keys and values: one pool of pages, each layer a view of it.

Owns: the pool, which pages are free, wiping. Must not know: who holds a page, what its positions mean.
Invariant: page 0 is never handed out, so that padding has somewhere to point; a page taken is zero.

    pool   (pages, everything a page holds), layer after layer, keys before values
    wiped  together, by one launch before the next step: nothing reads a page between the two
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from container.model.device import Device, LayerPages
from container.model.kv_limits import LayerShape


class DevicePages:
    """`pages` pages beside page 0, named by their number. Implements container.model.kv_pages.PageStore."""

    def __init__(
        self, device: Device, layers: Sequence[LayerShape], page_tokens: int, pages: int, dtype: torch.dtype
    ) -> None:
        self._page_elements = page_tokens * sum(layer.elements for layer in layers)
        self._pool = device.zeros((pages + 1, self._page_elements), dtype)
        self._free = list(range(pages, 0, -1))
        self._held: set[int] = set()
        self._unwiped: list[int] = []
        self.layers: list[LayerPages] = []
        at = 0
        for layer in layers:
            views = []
            for dim in (layer.key_dim, layer.value_dim):
                sizes = (page_tokens, layer.kv_heads, dim)
                views.append(self._pool[:, at : at + prod(sizes)].view(pages + 1, *sizes))
                at += prod(sizes)
            self.layers.append(LayerPages(*views))

    @property
    def pool(self) -> Tensor:
        """All pages, (pages + 1, elements)."""
        return self._pool

    @property
    def held_pages(self) -> int:
        return len(self._held)

    @property
    def resident_bytes(self) -> int:
        return self._pool.nbytes

    def take(self) -> int:
        """Return the number of a page of zeros."""
        assert self._free, "there are as many pages as block ids"
        page = self._free.pop()
        self._held.add(page)
        return page

    def give_back(self, address: int) -> None:
        """Take the page back; it is wiped before the next step."""
        self._held.remove(address)
        self._free.append(address)
        self._unwiped.append(address)

    def unwiped(self) -> list[int]:
        """Return what was given back since this was asked last; whoever asks lets `wipe` follow."""
        pages, self._unwiped = self._unwiped, []
        return pages

    def wipe(self, pages: Tensor) -> None:
        """Launch the wiping of `pages`, int32 on the device."""
        self._pool[pages] = 0

    def close(self) -> None:
        """Wipe everything; no page may be held."""
        assert not self._held, "a page is still held"
        self._pool.zero_()
