"""How fast this machine's memory can be read: the bound of decoding, where each token reads all weights once.

Owns: the measurement. Must not know: engines.
Invariant: what is returned was read, by as many threads as asked for, from memory larger than any cache.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

THREAD_BYTES = 256 * 2**20  # each thread's own; the last-level caches of today's servers are shared by many
PASSES = 5


def read_gb_s(threads: int, thread_bytes: int = THREAD_BYTES, passes: int = PASSES) -> float:
    """Return the most gigabytes (1e9 bytes) a second that `threads` read together in one of `passes`."""
    words = [
        np.ones(thread_bytes // 8, np.uint64) for _ in range(threads)
    ]  # touched, so that pages are there
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            began = time.perf_counter()
            totals = list(pool.map(_sum, words))
            best_s = min(best_s, time.perf_counter() - began)
            assert totals == [each.size for each in words], "not all of it was read"
    return threads * words[0].nbytes / best_s / 1e9


def _sum(words: npt.NDArray[np.uint64]) -> int:
    """Add all words up: numpy does it in vector registers and lets other threads run meanwhile."""
    return int(words.sum())
