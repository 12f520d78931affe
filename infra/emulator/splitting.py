"""Where a response stream is cut into parts.

Owns: the `--split` modes. Must not know: what the bytes say; a cut may fall anywhere, inside a character too.
Invariant: the parts of a piece, joined, are that piece; no part is empty or above PART_BYTES; nothing is
held back, so a part leaves as soon as the container's flush arrives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Self

from infra.emulator.eventstream import PART_BYTES

Cutter = Callable[[bytes], Iterator[bytes]]

# Longest part of the random mode: shorter than most server-sent events, so that nearly all are cut.
RANDOM_PART_BYTES: Final = 24


@dataclass(frozen=True, slots=True)
class Split:
    """A way to cut; `seed` None means fixed parts of `part_bytes`."""

    part_bytes: int = PART_BYTES
    seed: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the mode named `none`, `bytes=N` or `random:SEED`; raises ValueError for any other."""
        if text == "none":
            return cls()
        if text.startswith("bytes=") and text[6:].isdecimal() and 0 < int(text[6:]) <= PART_BYTES:
            return cls(part_bytes=int(text[6:]))
        if text.startswith("random:") and text[7:].isdecimal():
            return cls(part_bytes=RANDOM_PART_BYTES, seed=int(text[7:]))
        raise ValueError(f"`split` must be none, bytes=N with N up to {PART_BYTES}, or random:SEED")

    def cutter(self) -> Cutter:
        """Return the function that cuts the pieces of one stream, in order."""
        if self.seed is None:
            return self._fixed
        return _random_cutter(random.Random(self.seed), self.part_bytes)

    def _fixed(self, piece: bytes) -> Iterator[bytes]:
        for start in range(0, len(piece), self.part_bytes):
            yield piece[start : start + self.part_bytes]


def _random_cutter(draw: random.Random, part_bytes: int) -> Cutter:
    def cut(piece: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(piece):
            end = start + draw.randint(1, part_bytes)
            yield piece[start:end]
            start = end

    return cut
