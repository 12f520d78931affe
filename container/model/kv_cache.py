"""Keys and values in host memory: a contiguous slab per running sequence, a store of published blocks.

Owns: slabs, their growth, the block store, wiping.
Must not know: models, sampling, which blocks are shared or when they are evicted (the engine does).
Invariant: memory holds at most `resident_tokens` of sequences in slabs (rounded up to capacity classes)
and `blocks` blocks in the store; a slab row is zero wherever no running sequence wrote.

    shelf    sequences of one capacity class side by side, so that one call attends for all of them
             per layer  K (rows, Hk, length, Dk)   V (rows, Hk, length, Dv)
    length   the class's capacity; in a layer with a window no more than its ring: position p lies at p % ring
             and overwrites p - ring, which no later token attends to
    growth   128 -> 256 -> 512 ... tokens by copy into a shelf of the next class
    save     slab -> store, one block;   restore   store -> slab, leading blocks of a new sequence

A ring holds a window, and whatever one step may write together with the block it completes: so each block
is still whole in every layer when it is saved. Drafts that are taken back have overwritten what lay a ring's
length before them, so a ring is longer than its window by as many. A block that accepted drafts completed is
saved one step later, when the next row and its drafts are written too. The store keeps every block of every
layer, since a later prompt may leave a published chain at any block; a hit restores no more of a windowed
layer than its ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from container.model.kv_limits import KVBudgetExceeded, KVLimits, LayerShape

SMALLEST_CAPACITY: Final = 128  # tokens; below this a copy costs more than the memory saved
SHELF_TOKENS: Final = 4096  # rows x capacity of one shelf; bounds what a lone sequence makes us reserve


class Shelf:
    """Slab rows of one capacity. `keys[layer]` and `values[layer]` are (rows, Hk, length, D)."""

    def __init__(
        self, rows: int, capacity: int, layers: Sequence[LayerShape], limits: KVLimits, dtype: torch.dtype
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        # Layers of equal shape share one tensor, so that copies and wipes are two calls, not two per layer.
        self.stacks: list[Tensor] = []
        alike: dict[LayerShape, list[int]] = {}
        for layer, shape in enumerate(layers):
            alike.setdefault(shape, []).append(layer)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for shape, members in alike.items():
            length = min(capacity, limits.held_tokens(shape.window))
            for tensors, dim in ((keys, shape.key_dim), (values, shape.value_dim)):
                stack = _zeros((len(members), rows, shape.kv_heads, length, dim), dtype)
                self.stacks.append(stack)
                tensors.update(zip(members, stack.unbind(0), strict=True))
        self.keys = [keys[layer] for layer in range(len(layers))]
        self.values = [values[layer] for layer in range(len(layers))]
        self._taken: set[int] = set()

    @property
    def empty(self) -> bool:
        return not self._taken

    def take(self) -> int | None:
        """Return the lowest free row, or None when the shelf is full."""
        row = next((row for row in range(self.rows) if row not in self._taken), None)
        if row is not None:
            self._taken.add(row)
        return row

    def give_back(self, row: int, tokens: int) -> None:
        """Zero the row's first `tokens` positions and free it."""
        for stack in self.stacks:
            stack[:, row, :, :tokens].zero_()  # all of a ring that is shorter
        self._taken.remove(row)

    def copy_row(self, row: int, other: Shelf, other_row: int, tokens: int) -> None:
        """Copy what another shelf's row holds of its first `tokens` positions into `row`.

        A ring has reached its full length before it turns over, so positions lie alike in both shelves.
        """
        for mine, theirs in zip(self.stacks, other.stacks, strict=True):
            held = min(tokens, theirs.shape[3])
            mine[:, row, :, :held] = theirs[:, other_row, :, :held]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros whose pages cost no memory until written: numpy asks calloc, `torch.zeros` fills.

    Zero matters: a masked position has weight 0, and 0 times a stray NaN would still be NaN.
    """
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(slots=True)
class Place:
    """Where a slot's sequence lies, how many positions it has, and up to which some were ever written."""

    shelf: Shelf
    row: int
    tokens: int = 0
    reached: int = 0  # more than `tokens` after a truncation: a ring has lost what lay its length before


class KVCache:
    """Slabs by slot and published blocks by id. Not thread-safe; the runner is its only user."""

    def __init__(self, layers: Sequence[LayerShape], dtype: torch.dtype, limits: KVLimits) -> None:
        self._layers = tuple(layers)
        self._dtype = dtype
        self._limits = limits
        self._largest = limits.held_tokens(None)
        self._windowed = any(layer.window is not None for layer in layers)
        self._shelves: dict[int, list[Shelf]] = {}
        self._places: dict[int, Place] = {}
        self._store: dict[int, list[Tensor]] = {}
        self._resident = 0

    @property
    def resident_tokens(self) -> int:
        """Positions written in slabs, all running sequences together."""
        return self._resident

    @property
    def stored_blocks(self) -> int:
        return len(self._store)

    @property
    def slab_bytes(self) -> int:
        """Memory reserved by shelves; untouched parts of it are not resident."""
        stacks = (stack for shelves in self._shelves.values() for shelf in shelves for stack in shelf.stacks)
        return sum(stack.numel() * stack.element_size() for stack in stacks)

    def written(self, slot: int) -> int:
        """Return how many positions of the slot's sequence count as written."""
        place = self._places.get(slot)
        return place.tokens if place else 0

    def place(self, slot: int, tokens: int) -> Place:
        """Return the slot's place with room for `tokens` positions, all of which count as written.

        Raises KVBudgetExceeded when the running sequences together would not fit.
        """
        step = self._limits.step_tokens if self._windowed else None  # rings only depend on it
        assert step is None or tokens - self.written(slot) <= step, "a step adds more than was promised"
        return self._place(slot, tokens)

    def _place(self, slot: int, tokens: int) -> Place:
        assert tokens <= self._largest, "a sequence is longer than the longest the runner promised"
        place = self._places.get(slot)
        grown = tokens - (place.tokens if place else 0)
        limit = self._limits.resident_tokens
        if grown > 0 and limit is not None and self._resident + grown > limit:
            raise KVBudgetExceeded(f"slabs hold {self._resident} of {limit} tokens")
        if place is None:
            place = self._places[slot] = self._new_place(tokens)
        elif tokens > place.shelf.capacity:
            place = self._places[slot] = self._moved(place, tokens)
        if grown > 0:
            place.tokens += grown
            place.reached = max(place.reached, place.tokens)
            self._resident += grown
        return place

    @torch.inference_mode()  # slabs made during a step may be changed in this mode only
    def truncate(self, slot: int, tokens: int) -> None:
        """Take back the slot's positions from `tokens` on: drafts of its last row that were not sampled.

        They no longer count as written or resident, and are wiped.
        """
        place = self._places[slot]
        dropped = place.tokens - tokens
        assert 0 < dropped <= self._limits.draft_tokens, "more is taken back than drafts, or nothing"
        for stack in place.shelf.stacks:
            length = stack.shape[3]
            for at in range(tokens, place.tokens):
                stack[:, place.row, :, at % length].zero_()
        place.tokens = tokens
        self._resident -= dropped

    @torch.inference_mode()  # slabs made during a step may be changed in this mode only
    def release(self, slot: int) -> None:
        """Wipe and free the slot's slab; a slot that holds none is left as it is."""
        place = self._places.pop(slot, None)
        if place is not None:
            self._resident -= place.tokens
            self._vacate(place)

    def save(self, slot: int, index: int, block: int) -> None:
        """Copy the slot's block number `index` into the store under id `block`."""
        assert 0 <= block <= self._limits.blocks, "a block id is outside the pool"
        place = self._places[slot]
        first, last = index * self._limits.block_tokens, (index + 1) * self._limits.block_tokens
        assert last <= place.tokens, "a block is saved before it is full"
        held = self._store.get(block)
        parts = []
        for stack in place.shelf.stacks:
            length = stack.shape[3]
            assert first >= place.reached - length, "a block is saved after its window has passed"
            at = first % length  # a ring is whole blocks long, so that no block wraps around
            parts.append(stack[:, place.row, :, at : at + last - first])
        if held is None:
            self._store[block] = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        else:
            for mine, part in zip(held, parts, strict=True):
                mine.copy_(part)

    def forget(self, block: int) -> None:
        """Keep what `block` names: the next `save` under this id writes over it, in the same memory."""

    def restore(self, slot: int, blocks: Sequence[int]) -> None:
        """Copy published `blocks` into the leading positions of the slot's slab.

        Raises KeyError when a block was never saved.
        """
        size = self._limits.block_tokens
        held = [self._store[block] for block in blocks]
        tokens = len(blocks) * size
        place = self._place(slot, tokens)
        for index, parts in enumerate(held):
            first = index * size
            for stack, part in zip(place.shelf.stacks, parts, strict=True):
                length = stack.shape[3]
                if first >= tokens - length:
                    at = first % length
                    stack[:, place.row, :, at : at + size] = part

    @torch.inference_mode()  # slabs made during a step may be changed in this mode only
    def reset(self) -> None:
        """Wipe and forget every sequence and published block."""
        for slot in list(self._places):
            self.release(slot)
        for parts in self._store.values():
            for part in parts:
                part.zero_()
        self._store.clear()

    def close(self) -> None:
        """Wipe everything and free the memory."""
        self.reset()
        self._shelves.clear()

    def _capacity_for(self, tokens: int) -> int:
        capacity = SMALLEST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self._largest)

    def _new_place(self, tokens: int) -> Place:
        capacity = self._capacity_for(tokens)
        shelves = self._shelves.setdefault(capacity, [])
        for shelf in shelves:
            row = shelf.take()
            if row is not None:
                return Place(shelf, row)
        rows = max(1, min(self._limits.slots, SHELF_TOKENS // capacity))
        shelf = Shelf(rows, capacity, self._layers, self._limits, self._dtype)
        shelves.append(shelf)
        row = shelf.take()
        assert row is not None
        return Place(shelf, row)

    def _moved(self, place: Place, tokens: int) -> Place:
        moved = self._new_place(tokens)
        moved.shelf.copy_row(moved.row, place.shelf, place.row, place.tokens)
        moved.tokens, moved.reached = place.tokens, place.reached
        self._vacate(place)
        return moved

    def _vacate(self, place: Place) -> None:
        place.shelf.give_back(place.row, place.tokens)
        if place.shelf.empty:
            # Give the memory back. One small shelf per class stays to avoid reserving anew; that of a long
            # sequence costs little beside computing it, and would double what a prompt holds while it grows.
            shelves = self._shelves[place.shelf.capacity]
            if len(shelves) > 1 or place.shelf.rows == 1:
                shelves.remove(place.shelf)
