"""One forward of a transformers model over rows of several sequences, packed into a single row of tokens.

Owns: packing order, positions, which rows of hidden states become logits.
Must not know: sampling, the prefix cache, the engine's plan.
Invariant: logits come back in the order of the wanted positions, float32, whatever order was packed.

Each sequence contributes consecutive tokens; nothing but attention mixes tokens in a decoder, and attention
knows the borders from the Step. Single tokens are sorted by where their slabs lie, so that neighbours on a
shelf are computed in one batched call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from container.model.attention import Call, Run, Span, Step, attending
from container.model.group import Group, Solo
from container.model.kv_cache import KVCache, Place
from container.model.rows import PackedRow


class PackedModel:
    """A model in eval mode that attends through our hook, with the KV slabs it fills."""

    def __init__(self, model: Any, kv: KVCache, group: Group | None = None) -> None:
        self.kv = kv
        self._model = model
        self._group = group or Solo()

    def mode(self) -> AbstractContextManager[object]:
        """Return what whole steps run in, and all that touches the slabs between them."""
        return torch.inference_mode()

    def logits(self, rows: Sequence[PackedRow], calls: list[Call] | None = None) -> Tensor | None:
        """Run one step; return (sum of wanted, vocabulary) float32, row after row as given, on rank 0.

        Other ranks hold some columns of the logits, give them to rank 0 and get None. `calls`, when given,
        receives a note of every attention call. Raises KVBudgetExceeded, GroupBroken.
        """
        assert all(row.start == self.kv.written(row.slot) for row in rows), (
            "a row does not go on where its slot ended"
        )
        places = [self.kv.place(row.slot, row.start + len(row.tokens)) for row in rows]
        order, step = _lay_out(rows, places)
        step.calls = calls
        tokens: list[int] = []
        positions: list[int] = []
        firsts = [0] * len(rows)
        for index in order:
            row = rows[index]
            firsts[index] = len(tokens)
            tokens.extend(row.tokens)
            positions.extend(range(row.start, row.start + len(row.tokens)))
        wanted = [firsts[index] + offset for index, row in enumerate(rows) for offset in row.wanted]
        with torch.inference_mode(), attending(step):
            output = self._model(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, dtype=torch.long),
            )
        logits: Tensor = output.logits[0]
        assert logits.shape[0] == len(wanted), "the model does not pick rows of logits"
        if self._group.size == 1 or not wanted:
            return logits.float() if self._group.rank == 0 else None
        whole = self._group.gather_columns(logits.float())
        assert (whole is None) == (self._group.rank != 0), "rank 0 alone gets the logits"
        return whole

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers; storage that several share counts once."""
        return sum(self._storages().values())

    def weight_blocks(self) -> list[tuple[int, int]]:
        """Return address and bytes of each storage in host memory."""
        return [(address, size) for (device, address), size in self._storages().items() if device == "cpu"]

    def _storages(self) -> dict[tuple[str, int], int]:
        tensors = itertools.chain(self._model.parameters(), self._model.buffers())
        held = ((tensor.device.type, tensor.untyped_storage()) for tensor in tensors)
        return {(device, storage.data_ptr()): storage.nbytes() for device, storage in held}

    def close(self) -> None:
        """Wipe KV and let go of the weights."""
        self.kv.close()
        self._model = None


def _lay_out(rows: Sequence[PackedRow], places: Sequence[Place]) -> tuple[list[int], Step]:
    """Return the packing order of `rows` and the step that describes it."""
    singles = [index for index, row in enumerate(rows) if len(row.tokens) == 1]
    singles.sort(key=lambda index: (places[index].shelf.capacity, id(places[index].shelf), places[index].row))
    several = [index for index, row in enumerate(rows) if len(row.tokens) != 1]
    spans = []
    first = len(singles)
    for index in several:
        row, place = rows[index], places[index]
        spans.append(Span(place.shelf, place.row, first, len(row.tokens), row.start))
        first += len(row.tokens)
    return singles + several, Step(_runs(singles, rows, places), spans)


def _runs(singles: Sequence[int], rows: Sequence[PackedRow], places: Sequence[Place]) -> list[Run]:
    """Cut the sorted single-token rows wherever shelf rows stop being neighbours."""
    runs: list[Run] = []
    begin = 0
    for at in range(1, len(singles) + 1):
        if at < len(singles):
            last, this = places[singles[at - 1]], places[singles[at]]
            if last.shelf is this.shelf and last.row + 1 == this.row:
                continue
        members = singles[begin:at]
        place = places[members[0]]
        ends = [rows[index].start + 1 for index in members]
        shelf_rows = torch.arange(place.row, place.row + len(members))
        runs.append(Run(place.shelf, place.row, begin, ends, shelf_rows, torch.tensor(ends) - 1))
        begin = at
    return runs
