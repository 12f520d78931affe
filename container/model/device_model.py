"""A decoder on a device with the pages it fills: rows in, logits on the device out, nothing waited for.

Owns: staging, the table of pages, captured sizes, each line's last sampled token.
Must not know: plans, sampling, which device. Stands where PackedModel does, and runs ahead.
Invariant: one copy to the device per step; a staging buffer is written again only after its copy was done;
what a captured launch reads and writes stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from container.kernels.attention import KVType
from container.model.device import Device, Marker, StepRows
from container.model.device_decoder import DecoderWeights, forward
from container.model.device_pages import DevicePages
from container.model.device_step import (
    Fields,
    StepRow,
    StepSize,
    captured_sizes,
    fill,
    needed_size,
    smallest_fit,
)
from container.model.kv_limits import KVLimits, LayerShape
from container.model.kv_pages import PagedKV
from container.model.rows import PackedRow

STAGING_BUFFERS = 2  # one is filled while the other's copy may be under way


class DeviceModel:
    """`weights` on `device`; `captures` None captures the usual sizes at start, an empty list none."""

    def __init__(
        self,
        device: Device,
        weights: DecoderWeights,
        limits: KVLimits,
        *,
        captures: Sequence[StepSize] | None = None,
    ) -> None:
        assert limits.step_tokens is not None, "a device's buffers are made for a step's tokens"
        shapes = [
            LayerShape(each.shape.kv_heads, each.shape.dim, each.shape.dim, each.shape.window)
            for each in weights.layers
        ]
        self.weights = weights
        self._device = device
        self._page_tokens = limits.block_tokens
        self.pages = DevicePages(device, shapes, limits.block_tokens, limits.blocks, weights.embedding.dtype)
        self.kv = PagedKV(shapes, KVType.BFLOAT16, limits, self.pages)
        lines, line_pages = limits.slots, -(-limits.sequence_tokens // limits.block_tokens)
        self._spare_line = lines  # names page 0 throughout
        self._told = np.zeros((lines, line_pages), np.int64)  # the table as the device has it
        self._table = device.zeros((lines + 1, line_pages), torch.int32)
        self.last = device.zeros((lines + 1,), torch.int32)
        largest = StepSize(limits.step_tokens, limits.slots, limits.step_tokens)
        most = largest.ints + 3 * self._told.size + limits.blocks
        self._staging = [device.staging((most,), torch.int32) for _ in range(STAGING_BUFFERS)]
        self._copied: list[Marker | None] = [None] * STAGING_BUFFERS
        self._inbox = device.zeros((most,), torch.int32)
        self._steps = 0
        self._keeps = self._inbox[:0]
        self._outputs: dict[StepSize, Tensor] = {}
        if captures is None:
            captures = captured_sizes(limits.slots, limits.step_tokens)
        self._sizes = [size for size in captures if size.ints <= largest.ints]
        self._replays: dict[StepSize, Callable[[], None]] = {}
        for size in self._sizes:
            self._idle(size)
            self._replays[size] = device.capture(lambda size=size: self._forward(size))  # type: ignore[misc]

    def mode(self) -> AbstractContextManager[object]:
        """Return what whole steps run in."""
        return torch.inference_mode()

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.tensors())

    def weight_blocks(self) -> list[tuple[int, int]]:
        """Return address and bytes of each weight in host memory."""
        held = self.weights.tensors()
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in held if tensor.device.type == "cpu"]

    @property
    def device(self) -> Device:
        return self._device

    def logits(self, rows: Sequence[PackedRow]) -> Tensor:
        """Run one step; return (sum of wanted, vocabulary) float32 on the device, row after row as given.

        Raises KVBudgetExceeded.
        """
        return self.launch(rows)

    def launch(self, rows: Sequence[PackedRow], fed: Collection[int] = ()) -> Tensor:
        """As `logits`; the token of a slot in `fed` is the one that was kept for it last.

        What it returns holds until the next launch.
        """
        assert all(row.start == self.kv.written(row.slot) for row in rows), (
            "a row does not go on where its slot ended"
        )
        placed = [self._placed(row, row.slot in fed) for row in rows]
        changes = self._changes(placed)
        needed = needed_size(placed)
        size = smallest_fit(self._sizes, needed) or needed
        turn = self._steps % STAGING_BUFFERS
        self._steps += 1
        copied = self._copied[turn]
        if copied is not None:
            copied.wait()
        staging = self._staging[turn]
        wipes = self.pages.unwiped()
        count = fill(staging.numpy(), size, placed, changes, wipes, self._page_tokens, self._spare_line)
        self._copied[turn] = self._device.upload(staging[:count], self._inbox[:count])
        told = size.ints + 3 * len(changes)
        if changes:
            line, index, page = self._inbox[size.ints : told].view(3, -1)
            self._table[line, index] = page
        if wipes:
            self.pages.wipe(self._inbox[told:count])
        replay = self._replays.get(size)
        if replay is None:
            self._forward(size)
        else:
            replay()
        logits = self._outputs[size] if replay is not None else self._outputs.pop(size)
        first, _ = Fields(size).borders()["keeps"]
        self._keeps = self._inbox[first : first + needed.wanted]
        return logits[: needed.wanted]

    def keep_all(self, tokens: Tensor) -> None:
        """Keep `tokens`, one per row of the last launch's logits, for the slot of each row's sequence."""
        self.last[self._keeps] = tokens

    def keep(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Keep `tokens` (len(slots),) int32 as what `slots` sampled last; waits for the device."""
        lines = torch.tensor(slots, dtype=torch.int32, device=tokens.device)
        self.last[lines] = tokens

    def close(self) -> None:
        """Wipe keys and values, let go of what was captured."""
        self.kv.close()
        self._replays.clear()
        self._outputs.clear()
        self.last.zero_()

    def _placed(self, row: PackedRow, fed: bool) -> StepRow:
        assert not fed or len(row.tokens) == 1, "one token is fed"
        pages = self.kv.place(row.slot, row.start + len(row.tokens))
        return StepRow(row.slot, row.start, row.tokens, pages, row.wanted, fed)

    def _changes(self, rows: Sequence[StepRow]) -> list[tuple[int, int, int]]:
        """Return what of the table is not as the device has it, and count it as told."""
        changes = []
        for row in rows:
            pages = row.pages.astype(np.int64)
            told = self._told[row.line, : len(pages)]
            for index in np.flatnonzero(told != pages):
                changes.append((row.line, int(index), int(pages[index])))
            told[:] = pages
        return changes

    def _idle(self, size: StepSize) -> None:
        """Make the inbox hold a step of padding alone."""
        staging = self._staging[0]
        count = fill(staging.numpy(), size, (), (), (), self._page_tokens, self._spare_line)
        self._device.upload(staging[:count], self._inbox[:count]).wait()

    def _forward(self, size: StepSize) -> None:
        parts = {name: self._inbox[first:end] for name, (first, end) in Fields(size).borders().items()}
        rows = StepRows(
            parts["starts"],
            parts["lengths"],
            parts["lines"],
            self._table,
            parts["positions"],
            parts["places"],
            size.decodes,
        )
        feeds = parts["feeds"]
        ids = torch.where(feeds >= 0, self.last[feeds.clamp_min(0)], parts["ids"])
        with torch.inference_mode():
            self._outputs[size] = forward(
                self._device.operators, self.weights, self.pages.layers, ids, rows, parts["wanted"]
            )
