"""A bar with throughput for work on large files.

Owns: what a terminal sees while sealing, proving, packing. Must not know: what the bytes are.
Invariant: nothing is shown unless stderr is a terminal; stdout is never touched.
"""

from __future__ import annotations

import sys
import time
from typing import Final

from infra.report import Result

SHOWN_EVERY_S: Final = 0.2
GIGABYTE: Final = 1e9


class Meter:
    """Shows how far the work is on a terminal's stderr, and knows its rate afterwards."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._begun_s = time.monotonic()
        self._shown_s = 0.0
        self._done = 0
        self._terminal = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        self._done = done
        now_s = time.monotonic()
        if self._terminal and (now_s - self._shown_s >= SHOWN_EVERY_S or done >= total):
            self._shown_s = now_s
            end = "\n" if done >= total else ""
            share = done / max(total, 1)
            print(
                f"\r{self._verb} {share:4.0%}  {self._rate():.2f} GB/s ", end=end, file=sys.stderr, flush=True
            )

    def result(self) -> Result:
        return {"seconds": round(time.monotonic() - self._begun_s, 3), "gb_per_s": round(self._rate(), 3)}

    def _rate(self) -> float:
        return self._done / GIGABYTE / max(time.monotonic() - self._begun_s, 1e-6)
