"""W6: which steps are measured, and the terms that explain their time.

Owns: the grid, the fit. Must not know: engines.

    decode   step = a + b * rows   + c * (keys read by all rows)
    prefill  step = a + b * tokens + c * (pairs of query and key)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 512, 2048, 8192)
POOL_TOKENS = 32768  # tokens held at once: bounds memory and the time spent filling
STEP_ROOM = 128  # positions that decoding adds to a sequence over all points of a context
Point = dict[str, float]


def grid(window: int, *, quick: bool = False) -> list[tuple[int, int]]:
    """Return the (batch, context) points that fit the model's window and the pool."""
    batches = BATCHES[:3] if quick else BATCHES
    contexts = (32, 64) if quick else CONTEXTS
    # the longest of the grid shrinks to what a model with a shorter window can hold
    fitting = sorted({min(context, window - STEP_ROOM) for context in contexts})
    return [(batch, context) for context in fitting for batch in batches if batch * context <= POOL_TOKENS]


def fit(points: Sequence[Point], rows: str) -> dict[str, Any] | None:
    """Return the terms in milliseconds, fitted by least squares of relative error; None with too few points.

    `rms` and `worst` are relative residuals. `quadratic_share` is the most of any step that a further
    term in the square of the pairs would explain: near 0 when nothing grows faster than it should.
    """
    import numpy

    if len(points) < 5:
        return None
    seconds = numpy.array([p["step_s"] for p in points])
    counts = numpy.array([p[rows] for p in points])
    pairs = numpy.array([p["pairs"] for p in points])

    def solve(*columns: Any) -> tuple[Any, Any]:
        matrix = numpy.stack(columns, 1)
        terms = numpy.linalg.lstsq(matrix / seconds[:, None], numpy.ones(len(points)), rcond=None)[0]
        return terms, matrix @ terms / seconds - 1.0

    ones = numpy.ones(len(points))
    (fixed, each, pair), off = solve(ones, counts, pairs)
    squares = (pairs / pairs.max()) ** 2
    shares = solve(ones, counts, pairs, squares)[0][3] * squares / seconds
    return {
        "fixed_ms": float(fixed * 1e3),
        f"per_{rows}_ms": float(each * 1e3),
        "per_1000_pairs_ms": float(pair * 1e6),
        "rms": float(numpy.sqrt((off**2).mean())),
        "worst": float(numpy.abs(off).max()),
        "quadratic_share": float(shares[int(numpy.abs(shares).argmax())]),
        "points": len(points),
    }


def explain(points: Sequence[Point]) -> dict[str, Any]:
    """Return the fits of decode steps (one token a row) and of prefill steps."""
    decodes = [p for p in points if p["tokens"] == p["batch"]]
    prefills = [p for p in points if p["tokens"] != p["batch"]]
    return {"decode": fit(decodes, "batch"), "prefill": fit(prefills, "tokens")}
