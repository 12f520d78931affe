"""The arithmetic of dividing a model among ranks: heads, widths, ranges of a tensor.

Owns: which heads and which columns belong to which rank, the refusal when sizes do not divide.
Must not know: modules, plans, files, how ranks talk to each other.
Invariant: for every divided width the ranges of all ranks cover it once, in rank order; key and value heads
are the one exception: with fewer of them than ranks, each is held by several.

    9 query heads, 3 kv heads, 3 ranks     rank 0 |q0 q1 q2|k0|   rank 1 |q3 q4 q5|k1|   rank 2 |q6 q7 q8|k2|
    8 query heads, 2 kv heads, 4 ranks     rank 0 |q0 q1|k0|  rank 1 |q2 q3|k0|  rank 2 |q4 q5|k1|  ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from container.model.errors import ShardRefused

# Quantization works in blocks along a weight's input side, 64 values in nf4: a cut inside a block would make
# a shard's blocks differ from the whole model's. Coarser first; finer only where ranks would become unequal.
ALIGNMENTS: Final = (64, 32, 16, 8, 4, 2, 1)
VECTOR: Final = 8  # values: 16 bytes of bf16, which grouped matrix products take rows in
CONTIGUOUS: Final = torch.contiguous_format
UNITS_PER_RANK: Final = 8  # so many aligned units per rank bound the inequality between ranks to an eighth


Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank keeps of a tensor: `ranges` along `dim`, side by side."""

    dim: int
    ranges: tuple[Range, ...]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def of(self, whole: Tensor) -> Tensor:
        """Return the kept part as a tensor of its own, so that `whole` can be freed."""
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=CONTIGUOUS)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention layer and the rank's part of them."""

    total: int
    kv_total: int
    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.total % self.size:
            raise ShardRefused(
                f"{self.total} attention heads cannot be divided among {self.size} ranks\n"
                f"hint: {_choices(self.total, self.kv_total)}"
            )
        if self.kv_total % self.size and self.size % self.kv_total:
            raise ShardRefused(
                f"{self.kv_total} key and value heads cannot be divided among {self.size} ranks\n"
                f"hint: {_choices(self.total, self.kv_total)}"
            )

    @property
    def local(self) -> int:
        return self.total // self.size

    @property
    def kv_local(self) -> int:
        return max(1, self.kv_total // self.size)

    @property
    def kv_copies(self) -> int:
        """Return how many ranks hold each key and value head."""
        return max(1, self.size // self.kv_total)

    def query(self, unit: int) -> Range:
        """Return the rank's columns of a query projection with `unit` columns per head."""
        return self.rank * self.local * unit, (self.rank + 1) * self.local * unit

    def key_value(self, unit: int) -> Range:
        """Return the rank's columns of a key or value projection with `unit` columns per head."""
        first = self.rank // self.kv_copies * self.kv_local
        return first * unit, (first + self.kv_local) * unit


def _choices(total: int, kv_total: int) -> str:
    """Return the counts of ranks that would do, in words."""
    sizes = [n for n in range(1, total + 1) if total % n == 0 and (kv_total % n == 0 or n % kv_total == 0)]
    return f"this model divides among {', '.join(map(str, sizes))}"


def even(total: int, rank: int, size: int) -> Range:
    """Return the rank's part of a width `total`; raises ShardRefused when there is less than one each."""
    if total < size:
        raise ShardRefused(f"a width of {total} cannot be divided among {size} ranks")
    unit = _unit(total, size)
    units = total // unit
    return units * rank // size * unit, units * (rank + 1) // size * unit


def _unit(total: int, size: int) -> int:
    """Return what to count in: coarse where ranks stay equal, and whole vectors even where they do not."""
    units = {unit: total // unit for unit in ALIGNMENTS if total % unit == 0 and total // unit >= size}
    fair = [unit for unit, count in units.items() if count % size == 0 or count >= size * UNITS_PER_RANK]
    for unit in fair:
        if unit >= VECTOR:
            return unit
    return VECTOR if VECTOR in units else (fair or list(units))[0]


def even_vectors(total: int, rank: int, size: int) -> Range:
    """As `even`, for widths that kernels only take in multiples of VECTOR; raises ShardRefused."""
    if total % VECTOR or total < size * VECTOR:
        raise ShardRefused(
            f"an expert width of {total} cannot be divided among {size} ranks in multiples of {VECTOR}"
        )
    return even(total, rank, size)
