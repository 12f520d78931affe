"""The sums and gathers of ranks on one machine, through memory that they share.

Owns: SharedMemoryGroup, the Group of ranks that compute on the CPU.
Must not know: who the ranks are, plans, models.
Invariant: a sum is made in float32 in the order of the ranks, by every rank for itself from the same numbers,
so all ranks hold the same bits; a call that cannot be answered by all raises GroupBroken, and so does every
later one.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from container.model.group import GroupBroken
from container.ranks.exchange import PAYLOAD_BYTES, Exchange, ExchangeBroken, What

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
SUM_ELEMENTS: Final = PAYLOAD_BYTES // 4
DIGEST_BYTES: Final = 32
INT_BYTES: Final = 8


class Operation(enum.IntEnum):
    """What a round is part of."""

    SUM = 1
    GATHER = 2
    MINIMUM = 3
    AGREE = 4


class SharedMemoryGroup:
    """Implements container.model.group.Group over an Exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of memory it may not write; it may write this
            area = torch.frombuffer(exchange.memory.map, dtype=torch.uint8)
        self._payloads = [
            [self._payload(area, parity, rank) for rank in range(exchange.size)] for parity in (0, 1)
        ]
        self._floats = [[payload.view(torch.float32) for payload in half] for half in self._payloads]

    @property
    def rank(self) -> int:
        return self._exchange.rank

    @property
    def size(self) -> int:
        return self._exchange.size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks in `tensor` itself where its memory is one piece, else in a new
        one.
        """
        if not tensor.numel():
            return tensor
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
        kind = _kind(flat)
        with _broken():
            for first in range(0, flat.numel(), SUM_ELEMENTS):
                self._sum(flat[first : first + SUM_ELEMENTS], What(Operation.SUM, kind, flat.numel(), first))
        return flat.view(tensor.shape)

    def _sum(self, part: Tensor, what: What) -> None:
        count = part.numel()
        slots = self._floats[self._exchange.parity]
        slots[self.rank][:count].copy_(part)
        self._exchange.meet(what)
        if part.dtype is torch.float32:
            total = torch.add(slots[0][:count], slots[1][:count], out=part)
        else:
            total = slots[0][:count] + slots[1][:count]
        for slot in slots[2:]:
            total += slot[:count]
        if total is not part:
            part.copy_(total)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Return (rows, sum of columns) on rank 0, in the dtype given, None elsewhere."""
        rows, columns = tensor.shape
        flat = tensor.reshape(-1).view(torch.uint8)
        what = What(Operation.GATHER, _kind(tensor), rows, columns)
        with _broken():
            parts, said = self._first_round(flat, what)
            row_bytes = [one.columns * tensor.dtype.itemsize for one in said]
            longest = max(rows * width for width in row_bytes)
            for first in range(PAYLOAD_BYTES, longest, PAYLOAD_BYTES):
                self._next_round(flat, first, what, parts)
        if self.rank:
            return None
        return torch.cat(
            [
                part[: rows * width].view(tensor.dtype).view(rows, -1) if rows * width else tensor[:, :0]
                for part, width in zip(parts, row_bytes, strict=True)
            ],
            dim=1,
        )

    def _first_round(self, flat: Tensor, what: What) -> tuple[list[Tensor], list[What]]:
        """Return every rank's bytes, as far as one round holds them and with room for all, and what it
        said.
        """
        half = self._payloads[self._exchange.parity]
        self._lay(half, flat[:PAYLOAD_BYTES])
        said = self._exchange.meet(what, columns_differ=True)
        sizes = [one.rows * one.columns * FLOATS[one.kind].itemsize for one in said]
        if self.rank:
            return [], said
        if max(sizes) <= PAYLOAD_BYTES:
            return list(half), said  # read before the next round begins
        parts = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        for part, payload in zip(parts, half, strict=True):
            part[:PAYLOAD_BYTES].copy_(payload[: part.numel()])
        return parts, said

    def _next_round(self, flat: Tensor, first: int, what: What, parts: list[Tensor]) -> None:
        half = self._payloads[self._exchange.parity]
        self._lay(half, flat[first : first + PAYLOAD_BYTES])
        self._exchange.meet(what, columns_differ=True)
        for part, payload in zip(parts, half, strict=False):
            left = max(0, part.numel() - first)
            part[first : first + PAYLOAD_BYTES].copy_(payload[: min(left, PAYLOAD_BYTES)])

    def _lay(self, half: list[Tensor], part: Tensor) -> None:
        half[self.rank][: part.numel()].copy_(part)

    def minimum(self, value: int) -> int:
        """Return the smallest of the ranks' values, each in 64 bits with a sign."""
        data = value.to_bytes(INT_BYTES, "little", signed=True)
        with _broken():
            shared = self._exchange.share(What(Operation.MINIMUM), data)
        return min(int.from_bytes(one, "little", signed=True) for one in shared)

    def agree(self, digest: bytes) -> None:
        """Raise GroupBroken unless every rank gave the same 32 bytes."""
        assert len(digest) == DIGEST_BYTES, "a digest has 32 bytes"
        with _broken():
            shared = self._exchange.share(What(Operation.AGREE), digest)
        if len(set(shared)) > 1:
            raise GroupBroken("the ranks do not agree")

    def _payload(self, area: Tensor, parity: int, rank: int) -> Tensor:
        at = self._exchange.payload_at(parity, rank)
        return area[at : at + PAYLOAD_BYTES]


def _kind(tensor: Tensor) -> int:
    assert tensor.dtype in FLOATS, "ranks exchange float32, bfloat16 and float16"
    return FLOATS.index(tensor.dtype)


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except ExchangeBroken as error:
        raise GroupBroken(str(error)) from None
