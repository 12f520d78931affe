"""An engine without a model, for tests of the harness: tokens at a fixed pace, or misbehaviour on request.

Options: `pace_s` between tokens; `short` makes one token too few; `dies` ends the process at the first run;
`prints` writes to stdout, where only replies may go; `fails` raises while loading.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.bench.figures import Timed
from tests.bench.protocol import serve
from tests.bench.workloads import Request


class Fake:
    """Answers each request on its own, as if alone."""

    def __init__(self) -> None:
        self._options: dict[str, Any] = {}

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        self._options = options
        if options.get("fails"):
            raise RuntimeError("this machine lacks what it takes")
        return {"about": {"version": "1.0", "precision": "none"}, "phases": {"load": 0.0}}

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        if self._options.get("dies"):
            os._exit(3)
        if self._options.get("prints"):
            print("a library says hello", flush=True)
        pace_s = self._options.get("pace_s", 0.01)
        less = 1 if self._options.get("short") else 0
        time.sleep(pace_s)
        return [
            Timed(tuple((r.at_s + pace_s * (n + 1), 1) for n in range(r.output_tokens - less)))
            for r in requests
        ]

    def steps(self, points: list[tuple[int, int]]) -> list[dict[str, float]]:
        return [
            {"batch": b, "tokens": b, "context": c, "pairs": b * c, "step_s": 0.002 + 1e-4 * b + 1e-7 * b * c}
            for b, c in points
        ]

    def share(self, sequences: int) -> dict[str, float]:
        return {"sequences": sequences, "steps": 10, "step_s": 0.01, "engine_share": 0.02}

    def close(self) -> None:
        """Nothing was started."""


if __name__ == "__main__":
    sys.exit(serve(Fake()))
