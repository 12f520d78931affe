"""Randomness that depends on nothing but a seed, a position and a token id.

Owns: Philox 4x32-10 and the Gumbel noise made from it.
Must not know: logits, sampling parameters, batches.
Invariant: the noise of a token is the same whichever other tokens, rows or steps are computed with it, so a
draw survives batching, chunking and preemption.

    key      | seed, low 32 bits | seed, high 32 bits |
    counter  | token id // 4 | 0 | position, low 32 bits | position, high 32 bits |
    output   | token id % 4 = 0 | 1 | 2 | 3 |                  one block serves four neighbouring tokens
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit words in 64-bit cells, so that a product of two is exact

MASK: Final = np.uint64(0xFFFFFFFF)
HIGH: Final = np.uint64(32)
ROUNDS: Final = 10
# Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11), table 2 and Random123's philox.h
MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
LANES: Final = 4


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Return the four 32-bit output words of Philox 4x32-10 for each counter.

    The counter's words broadcast against each other; `key` is the unsigned 64-bit key, low word first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (second >> HIGH) ^ c1 ^ np.uint64(k0)
        c2 = (first >> HIGH) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & MASK, first & MASK
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def gumbel(seed: int, position: int, vocabulary: int) -> NDArray[np.float64]:
    """Return standard Gumbel noise for every token id below `vocabulary`, shape (vocabulary,)."""
    blocks = np.arange(-(-vocabulary // LANES), dtype=np.uint64)
    words = np.stack(philox(_counter(blocks, position), seed), axis=-1).reshape(-1)
    return _noise(words[:vocabulary])


def gumbel_of(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what `gumbel` gives for the ids `tokens`, shape (len(tokens),), without computing the others."""
    blocks, lanes = np.divmod(tokens, LANES)
    words = np.stack(philox(_counter(blocks.astype(np.uint64), position), seed))
    return _noise(words[lanes, np.arange(len(tokens))])


def _counter(blocks: Words, position: int) -> tuple[Words, Words, Words, Words]:
    low, high = position & 0xFFFFFFFF, position >> 32
    return blocks, np.zeros_like(blocks), np.full_like(blocks, low), np.full_like(blocks, high)


def _noise(words: Words) -> NDArray[np.float64]:
    """Return -ln(-ln u) with u = (word + 1/2) / 2**32, exact in float64 and never 0 or 1.

    float64 because the largest noise, which decides draws, comes from u within 2**-32 of 1.
    """
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log(uniform))
