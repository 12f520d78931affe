"""One rank of a group of real processes: does the rounds it is told to and compares with plain sums.

python -m tests.ranks.summing KIND RANK SIZE EXCHANGE_FD RENDEZVOUS_FD ROUNDS
"""

from __future__ import annotations

import hashlib
import random
import sys
import time

import torch
from torch import Tensor

from container.model.group import Group, GroupBroken
from container.ranks.exchange import Exchange
from container.ranks.place import Place

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1,),
    (3,),
    (1, 1, 7),
    (5, 13),
    (17, 129),
    (1, 8, 576),
    (262_144,),
    (262_145,),
    (3, 200_001),
    (0, 4),
)
WAIT_S = 60.0


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return what rank `rank` adds; any rank can make any other's."""
    generator = torch.Generator().manual_seed(seed * 64 + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def plain_sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other.float()
    return total.to(parts[0].dtype)


def shapes(group: Group) -> None:
    """Every shape and dtype, contiguous or not, against the sum in rank order; then gathers."""
    for seed, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in DTYPES):
        parts = [part(rank, shape, dtype, seed) for rank in range(group.size)]
        own = parts[group.rank].clone()
        if len(shape) == 2 and seed % 2:
            own = own.t().contiguous().t()  # the same values, laid out otherwise
        summed = group.all_reduce(own)
        assert summed.shape == torch.Size(shape) and summed.dtype is dtype
        assert torch.equal(summed, plain_sum(parts)), f"{shape} {dtype}"
    for seed, (rows, width) in enumerate(((1, 5), (3, 1), (7, 33), (2, 150_000), (64, 9000), (4, 0))):
        for dtype in DTYPES:
            parts = [part(r, (rows, width + r * (width > 0)), dtype, seed) for r in range(group.size)]
            gathered = group.gather_columns(parts[group.rank])
            if group.rank:
                assert gathered is None
            else:
                assert gathered is not None and gathered.dtype is dtype
                assert torch.equal(gathered, torch.cat(parts, dim=1)), f"{rows} x {width}"


def rounds(group: Group, count: int) -> None:
    """Mixed operations, many times over; at the end all ranks must hold the same bits."""
    order = random.Random(7)
    digest = hashlib.sha256()
    for number in range(count):
        what = order.random()
        if what < 0.8:
            size = order.choice((1, 2, 63, 576, 1000))
            summed = group.all_reduce(part(group.rank, (size,), torch.float32, number))
            digest.update(summed.numpy().tobytes())
            if number % 50 == 0:
                parts = [part(r, (size,), torch.float32, number) for r in range(group.size)]
                assert torch.equal(summed, plain_sum(parts))
        elif what < 0.9:
            assert group.minimum(number - group.rank) == number - group.size + 1
        else:
            parts = [part(r, (2, 1 + r), torch.float32, number) for r in range(group.size)]
            gathered = group.gather_columns(parts[group.rank])
            assert (gathered is None) == (group.rank > 0)
            if gathered is not None:
                assert torch.equal(gathered, torch.cat(parts, dim=1))
    group.agree(digest.digest())


def disagree(group: Group) -> None:
    """Say something else than rank 0; both sides must learn of it."""
    try:
        group.agree(bytes([group.rank]) * 32)
    except GroupBroken:
        print("broken")


def latency(group: Group, count: int) -> None:
    for kib in (8, 256):
        tensor = torch.zeros(kib * 256)
        for _ in range(10):
            group.all_reduce(tensor)
        began = time.perf_counter()
        for _ in range(count):
            group.all_reduce(tensor)
        took_us = (time.perf_counter() - began) / count * 1e6
        if group.rank == 0:
            print(f"{kib} KiB {took_us:.0f} us")


def main() -> None:
    kind, rank, size, exchange_fd, rendezvous_fd, many = sys.argv[1:]
    torch.set_num_threads(1)
    exchange = Exchange(int(exchange_fd), int(rank), int(size), WAIT_S)
    group = Place(int(rank), int(size), exchange, f"/proc/self/fd/{rendezvous_fd}").group(kind)
    shapes(group)
    rounds(group, int(many))
    latency(group, 100)
    if kind == "gloo":
        disagree(group)
        group.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
