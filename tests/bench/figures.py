"""From the times of tokens to the figures of a workload, and from rounds to medians.

Owns: the arithmetic. Must not know: engines, files, clocks.
Invariant: a figure is made of exact token counts; a request that made another number of tokens than asked is
an error, never a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.workloads import Request

# Goodput counts an answer only if a reader would call it prompt: the first token within the time the front
# lets a request wait (5 s by default), then at least four tokens a second.
PROMPT_FIRST_S = 5.0
PROMPT_TOKEN_S = 0.25

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Timed:
    """What a request got: (seconds after the run's start, tokens that came then), in order; or an error."""

    events: tuple[tuple[float, int], ...]
    error: str = ""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.events)


class Inexact(Exception):
    """An engine made another number of tokens than it was asked for, or failed a request."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of `values` lie, interpolated between neighbours.

    The same as numpy's default. Raises ValueError without values or outside 0 to 1.
    """
    if not values or not 0.0 <= share <= 1.0:
        raise ValueError("a percentile needs values and a share from 0 to 1")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def check(requests: Sequence[Request], got: Sequence[Timed]) -> None:
    """Raise Inexact unless every request was answered with exactly the tokens asked for."""
    if len(requests) != len(got):
        raise Inexact(f"{len(got)} answers to {len(requests)} requests")
    for number, (asked, timed) in enumerate(zip(requests, got, strict=True)):
        if timed.error:
            raise Inexact(f"request {number} failed: {timed.error}")
        if timed.tokens != asked.output_tokens:
            raise Inexact(f"request {number} made {timed.tokens} tokens, not {asked.output_tokens}")


def figures(workload: str, requests: Sequence[Request], got: Sequence[Timed]) -> Figures:
    """Return the figures of one run; raises Inexact. Times in seconds, rates in tokens a second."""
    check(requests, got)
    firsts = [timed.events[0][0] - asked.at_s for asked, timed in zip(requests, got, strict=True)]
    if workload == "W1":
        return {"decode_tok_s": _decode_rate(got[0]), "first_token_s": firsts[0]}
    if workload == "W2":
        return {"prefill_tok_s": len(requests[0].prompt) / firsts[0], "first_token_s": firsts[0]}
    latencies = [timed.events[-1][0] - asked.at_s for asked, timed in zip(requests, got, strict=True)]
    makespan_s = max(timed.events[-1][0] for timed in got) - min(asked.at_s for asked in requests)
    made = {
        "output_tok_s": sum(timed.tokens for timed in got) / makespan_s,
        "makespan_s": makespan_s,
        "first_token_p50_s": percentile(firsts, 0.5),
        "first_token_p95_s": percentile(firsts, 0.95),
    }
    if workload == "W3":
        made["latency_p50_s"] = percentile(latencies, 0.5)
        made["latency_p95_s"] = percentile(latencies, 0.95)
    return made


def _decode_rate(timed: Timed) -> float:
    """Return tokens a second after those that came first; nan when all came at once."""
    (first_s, first), last_s = timed.events[0], timed.events[-1][0]
    return (timed.tokens - first) / (last_s - first_s) if last_s > first_s else math.nan


def open_loop(requests: Sequence[Request], got: Sequence[Timed]) -> Figures:
    """Return W5's figures at one load: goodput, refusals, percentiles of first token and inter-token time."""
    answered = [(a, t) for a, t in zip(requests, got, strict=True) if not t.error and t.events]
    end_s = max((t.events[-1][0] for _, t in answered), default=math.nan)
    firsts = [t.events[0][0] - a.at_s for a, t in answered]
    gaps = [
        later[0] - earlier[0]
        for _, t in answered
        for earlier, later in zip(t.events, t.events[1:], strict=False)
    ]
    good = sum(t.tokens for a, t in answered if _is_prompt(a, t))
    made = {
        "requests": float(len(requests)),
        "refused": float(sum(t.error == "429" for t in got)),
        "failed": float(sum(bool(t.error) and t.error != "429" for t in got)),
        "output_tok_s": sum(t.tokens for _, t in answered) / end_s,
        "goodput_tok_s": good / end_s,
    }
    for name, values in (("first_token", firsts), ("inter_token", gaps)):
        for share in (50, 95, 99):
            made[f"{name}_p{share}_s"] = percentile(values, share / 100) if values else math.nan
    return made


def _is_prompt(asked: Request, timed: Timed) -> bool:
    first_s, last_s = timed.events[0][0], timed.events[-1][0]
    return first_s - asked.at_s <= PROMPT_FIRST_S and last_s - first_s <= PROMPT_TOKEN_S * timed.tokens


def medians(rounds: Sequence[Mapping[str, float]]) -> Figures:
    """Return the median of each figure over rounds; figures that are not in all rounds are left out."""
    names = [name for name in rounds[0] if all(name in each for each in rounds)] if rounds else []
    return {name: median(each[name] for each in rounds) for name in names}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest ratio of `ours` to `theirs`, round by round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(each), min(each), max(each)
