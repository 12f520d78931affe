"""Keys and values in pages that sequences share: what the native attention reads.

Owns: which pages a slot's sequence has, which are published, how often each is referred to, the budget.
Must not know: models, sampling, which blocks are shared or when they are evicted (the engine does).
Invariant: a page is held exactly as long as a slot reads it or a block id names it; what two of them refer to
is full and never written again; a page nobody refers to is wiped.

    page      one block of `block_tokens` positions, all layers side by side (container.kernels.attention)
    save      gives the slot's page a name; no copy      restore   lets a slot read named pages; no copy
    truncate  takes back a sequence's last positions; what they held is overwritten, or wiped with their page

A layer with a window keeps all positions too, since a page holds all layers: a windowed layer costs what a
full one does, where slabs keep a ring (for a window of 512 of 8,192 tokens in 5 of 6 layers that is 4.5 times
the memory). Attention skips what lies outside of the window.

Budget: one page per block id of the engine's. Its sequences hold an id for every page they write or read, and
an id given out anew is forgotten first, so that there are never more pages than ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from container.kernels.attention import Addresses, KVType, PageLayout
from container.model.kv_limits import KVBudgetExceeded, KVLimits, LayerShape
from container.model.kv_page_memory import PageMemory


class PageStore(Protocol):
    """Where pages come from: container.model.kv_page_memory on a host, device_pages on a device."""

    @property
    def held_pages(self) -> int: ...

    @property
    def resident_bytes(self) -> int: ...

    def take(self) -> int: ...

    def give_back(self, address: int) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Page:
    """One block's memory, and who refers to it."""

    address: int  # in host memory, or the page's number on a device
    readers: int = 0  # slots whose sequence has it
    names: int = 0  # block ids it is published under

    @property
    def exclusive(self) -> bool:
        """True when one sequence alone may write it."""
        return self.readers == 1 and self.names == 0


@dataclass(slots=True)
class Held:
    """A slot's sequence: its pages in order, their addresses, and how many positions count as written."""

    pages: list[Page] = field(default_factory=list)
    addresses: Addresses = field(default_factory=lambda: np.zeros(16, np.uintp))
    tokens: int = 0

    def append(self, page: Page) -> None:
        if len(self.pages) == len(self.addresses):
            # A new array: whoever holds the old one for a step keeps valid addresses.
            self.addresses = np.concatenate([self.addresses, np.zeros_like(self.addresses)])
        self.addresses[len(self.pages)] = page.address
        self.pages.append(page)
        page.readers += 1


class PagedKV:
    """Pages by slot and published pages by block id. Not thread-safe; the runner is its only user."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        kv_type: KVType,
        limits: KVLimits,
        memory: PageStore | None = None,
    ) -> None:
        """Pages of `memory`, of host memory unless given.

        Raises ValueError when a layer's keys and values differ in width, or a page is too long.
        """
        if any(layer.key_dim != layer.value_dim for layer in layers):
            raise ValueError("keys and values of one layer differ in width")
        shapes = [(layer.kv_heads, layer.key_dim) for layer in layers]
        self.layout = PageLayout.of(shapes, limits.block_tokens, kv_type)
        self._limits = limits
        self._largest = limits.held_tokens(None)
        self._memory: PageStore = memory or PageMemory(self.layout.page_bytes)
        self._held: dict[int, Held] = {}
        self._published: dict[int, Page] = {}
        self._resident = 0

    @property
    def resident_tokens(self) -> int:
        """Positions that running sequences hold; those in a page that several read count once."""
        return self._resident

    @property
    def stored_blocks(self) -> int:
        return len(self._published)

    @property
    def held_pages(self) -> int:
        """Pages that a sequence reads or a block id names."""
        return self._memory.held_pages

    @property
    def slab_bytes(self) -> int:
        """Memory of all pages, read, published or kept for the next sequence."""
        return self._memory.resident_bytes

    def written(self, slot: int) -> int:
        """Return how many positions of the slot's sequence count as written."""
        held = self._held.get(slot)
        return held.tokens if held else 0

    def place(self, slot: int, tokens: int) -> Addresses:
        """Return the addresses of the slot's pages for `tokens` positions, all of which count as written.

        The array stays valid until the slot is released. Raises KVBudgetExceeded when the running sequences
        together would not fit.
        """
        assert tokens <= self._largest, "a sequence is longer than the longest the runner promised"
        held = self._held.get(slot)
        grown = max(0, tokens - (held.tokens if held else 0))
        self._charge(grown)
        if held is None:
            held = self._held[slot] = Held()
        size = self._limits.block_tokens
        if grown and held.tokens % size:
            assert held.pages[-1].exclusive, "a shared page would be written"
        while len(held.pages) * size < tokens:
            held.append(Page(self._memory.take()))
        held.tokens += grown
        return held.addresses[: self.layout.pages_for(tokens)]

    def truncate(self, slot: int, tokens: int) -> None:
        """Take back the slot's positions from `tokens` on; they were never published.

        Pages that lie beyond are wiped and given back; in the last one, positions are overwritten later.
        """
        held = self._held[slot]
        assert 0 <= tokens <= held.tokens, "a sequence is cut behind its end"
        size = self._limits.block_tokens
        assert tokens == held.tokens or all(page.exclusive for page in held.pages[tokens // size :]), (
            "a published page would be cut"
        )
        kept = self.layout.pages_for(tokens)
        self._resident -= held.tokens - tokens
        held.tokens = tokens
        for page in held.pages[kept:]:
            page.readers -= 1
            self._drop_unused(page)
        del held.pages[kept:]
        held.addresses[kept:] = 0

    def release(self, slot: int) -> None:
        """Let go of the slot's pages; what nobody else refers to is wiped. An empty slot is left as it is."""
        held = self._held.pop(slot, None)
        if held is None:
            return
        tokens = held.tokens
        for page in held.pages:
            page.readers -= 1
            if page.readers == 0:
                self._resident -= min(tokens, self._limits.block_tokens)
            tokens -= self._limits.block_tokens
            self._drop_unused(page)

    def save(self, slot: int, index: int, block: int) -> None:
        """Publish the slot's page number `index` under id `block`; what the id named before is forgotten."""
        assert 0 <= block <= self._limits.blocks, "a block id is outside the pool"
        held = self._held[slot]
        assert (index + 1) * self._limits.block_tokens <= held.tokens, "a block is saved before it is full"
        page = held.pages[index]
        page.names += 1
        self.forget(block)
        self._published[block] = page

    def forget(self, block: int) -> None:
        """Unpublish what `block` names, if anything; sequences that read it go on."""
        page = self._published.pop(block, None)
        if page is not None:
            page.names -= 1
            self._drop_unused(page)

    def restore(self, slot: int, blocks: Sequence[int]) -> None:
        """Make the published `blocks` the leading pages of an empty slot.

        Raises KeyError when a block was never saved, KVBudgetExceeded as `place` does.
        """
        assert slot not in self._held, "a slot is restored while it holds a sequence"
        pages = [self._published[block] for block in blocks]
        size = self._limits.block_tokens
        assert len(pages) * size <= self._largest, "a sequence is longer than the longest the runner promised"
        assert len({page.address for page in pages}) == len(pages), "a page stands at two places"
        self._charge(size * sum(page.readers == 0 for page in pages))
        held = self._held[slot] = Held(tokens=len(pages) * size)
        for page in pages:
            held.append(page)

    def reset(self) -> None:
        """Wipe and forget every sequence and published block."""
        for slot in list(self._held):
            self.release(slot)
        for block in list(self._published):
            self.forget(block)

    def close(self) -> None:
        """Wipe everything and free the memory."""
        self.reset()
        self._memory.close()

    def check(self) -> None:
        """Assert that counts and references agree; tests and debug builds call it after every step."""
        size = self._limits.block_tokens
        readers: dict[Page, int] = {}
        names: dict[Page, int] = {}
        resident: dict[Page, int] = {}
        for held in self._held.values():
            assert len(held.pages) == self.layout.pages_for(held.tokens), "a page too many or too few"
            assert held.addresses[: len(held.pages)].tolist() == [p.address for p in held.pages], (
                "wrong address"
            )
            for index, page in enumerate(held.pages):
                readers[page] = readers.get(page, 0) + 1
                tokens = min(size, held.tokens - index * size)
                assert tokens == size or page.exclusive, "a page is shared before it is full"
                resident[page] = tokens
        for page in self._published.values():
            names[page] = names.get(page, 0) + 1
        for page in readers.keys() | names.keys():
            assert page.readers == readers.get(page, 0), "readers are miscounted"
            assert page.names == names.get(page, 0), "names are miscounted"
        assert self.held_pages == len(readers.keys() | names.keys()), "a page is leaked"
        assert self._resident == sum(resident.values()), "resident tokens are miscounted"

    def _charge(self, tokens: int) -> None:
        limit = self._limits.resident_tokens
        if tokens and limit is not None and self._resident + tokens > limit:
            raise KVBudgetExceeded(f"pages hold {self._resident} of {limit} tokens")
        self._resident += tokens

    def _drop_unused(self, page: Page) -> None:
        if page.readers == 0 and page.names == 0:
            self._memory.give_back(page.address)
