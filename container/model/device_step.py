"""A step's numbers as the device gets them: one buffer, one copy, places that depend on sizes alone.

Owns: the layout of the buffer, filling it, which sizes are captured. Must not know: weights, devices.
Invariant: padding reads and writes nothing that is alive: its place is -1, its row has no tokens, its line of
the table names page 0, which belongs to no sequence.

    | ids T | feeds T | positions T | places T | starts R + 1 | lengths R | lines R | wanted W | keeps W |
    | changes 3 C | wipes F |

A token whose id the host does not know yet is fed: `feeds` names the line whose last sampled token it is, and
is -1 for all others. `keeps` names the line that what is sampled of a wanted row is kept for. Behind what is
captured lie, of any number, `changes` (line, index, page) of the table and `wipes`, pages to be made zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
DECODE_SIZES: Final = (1, 2, 4, *range(8, 257, 8))
MIXED_SIZES: Final = (16, 32, 64, 128, 256, 512)  # tokens, of which a sixteenth are rows at least
MIXED_ROWS: Final = 64
NOWHERE: Final = -1


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much room a step's numbers take: tokens, rows, wanted rows of logits."""

    tokens: int
    rows: int
    wanted: int

    @property
    def decodes(self) -> bool:
        """True when every row has one token at most."""
        return self.tokens == self.rows

    def fits(self, other: StepSize) -> bool:
        """Return whether `other` fits in, with the kernel it needs."""
        enough = other.tokens <= self.tokens and other.rows <= self.rows and other.wanted <= self.wanted
        return enough and (other.decodes or not self.decodes)

    @property
    def ints(self) -> int:
        """What lies before the changes."""
        return 4 * self.tokens + 3 * self.rows + 1 + 2 * self.wanted


def captured_sizes(slots: int, step_tokens: int) -> list[StepSize]:
    """Return the sizes worth capturing for a runner of `slots`, the largest first."""
    decodes = [size for size in DECODE_SIZES if size < slots]
    if slots <= DECODE_SIZES[-1]:
        decodes.append(slots)
    made = [StepSize(size, size, size) for size in decodes]
    rows = min(slots, MIXED_ROWS)
    # Never as many rows as tokens: that size would be taken for a decode.
    made += [StepSize(t, min(rows, t - 1), min(rows, t - 1)) for t in MIXED_SIZES if t <= step_tokens]
    return sorted(made, key=lambda size: (size.tokens, size.rows), reverse=True)


def smallest_fit(sizes: Sequence[StepSize], needed: StepSize) -> StepSize | None:
    """Return the smallest of `sizes`, the largest first, that `needed` fits in; a decode's own kind first."""
    fitting = [size for size in reversed(sizes) if size.fits(needed)]
    return next((size for size in fitting if size.decodes == needed.decodes), next(iter(fitting), None))


@dataclass(frozen=True, slots=True)
class Fields:
    """A buffer's parts, in numpy or in torch: views of one array of int32."""

    size: StepSize

    def borders(self) -> dict[str, tuple[int, int]]:
        """Return first and end of each part, by name."""
        size = self.size
        lengths = {
            "ids": size.tokens,
            "feeds": size.tokens,
            "positions": size.tokens,
            "places": size.tokens,
            "starts": size.rows + 1,
            "lengths": size.rows,
            "lines": size.rows,
            "wanted": size.wanted,
            "keeps": size.wanted,
        }
        ends = list(accumulate(lengths.values()))
        return {name: (end - lengths[name], end) for name, end in zip(lengths, ends, strict=True)}


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row as the buffer needs it: its tokens, where they stand and lie, which logits are wanted."""

    line: int
    start: int
    tokens: Sequence[int]
    pages: npt.NDArray[np.uintp]  # of the sequence, in order
    wanted: Sequence[int]
    fed: bool = False  # the first token is what the line sampled last


def needed_size(rows: Sequence[StepRow]) -> StepSize:
    """Return the exact size of a step of `rows`."""
    tokens = sum(len(row.tokens) for row in rows)
    return StepSize(tokens, len(rows), sum(len(row.wanted) for row in rows))


def fill(
    buffer: Ints,
    size: StepSize,
    rows: Sequence[StepRow],
    changes: Sequence[tuple[int, int, int]],
    wipes: Sequence[int],
    page_tokens: int,
    spare_line: int,
) -> int:
    """Write the step of `rows`, padded to `size`, into `buffer`; return how many numbers to copy.

    `spare_line` is the line of the table that names page 0 throughout.
    """
    told = size.ints + 3 * len(changes)
    end = told + len(wipes)
    assert size.fits(needed_size(rows)) and end <= len(buffer), "a step is larger than its buffer"
    parts = {name: buffer[first:last] for name, (first, last) in Fields(size).borders().items()}
    parts["ids"][:] = 0
    parts["feeds"][:] = NOWHERE
    parts["positions"][:] = 0
    parts["places"][:] = NOWHERE
    parts["lengths"][:] = 0
    parts["lines"][:] = spare_line
    parts["wanted"][:] = 0
    parts["keeps"][:] = spare_line
    at = picked = 0
    for number, row in enumerate(rows):
        count = len(row.tokens)
        positions = np.arange(row.start, row.start + count)
        parts["ids"][at : at + count] = row.tokens
        if row.fed:
            parts["feeds"][at] = row.line
        parts["positions"][at : at + count] = positions
        pages = row.pages[positions // page_tokens].astype(np.int64)
        parts["places"][at : at + count] = pages * page_tokens + positions % page_tokens
        parts["starts"][number] = at
        parts["lengths"][number] = row.start + count
        parts["lines"][number] = row.line
        parts["wanted"][picked : picked + len(row.wanted)] = [at + offset for offset in row.wanted]
        at, picked = at + count, picked + len(row.wanted)
        if row.wanted:
            parts["keeps"][picked - 1] = row.line
    parts["starts"][len(rows) :] = at
    if changes:
        buffer[size.ints : told] = np.asarray(changes, np.int32).T.reshape(-1)
    buffer[told:end] = wipes
    return end
