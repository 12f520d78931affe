"""The workloads W1 to W5 as token ids, exact output lengths and arrival times.

Owns: what is asked of every engine. Must not know: engines, clocks, HTTP.
Invariant: the same (workload, round) gives the same ids everywhere; within a run no two requests share a
prefix by chance, and no round repeats what an earlier one may have left in a cache, except where sharing is
the workload.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

PROMPTS: Final = (32, 64, 128, 256, 512)  # W3, by i mod 5
OUTPUTS: Final = (16, 32, 64, 128, 256)  # W3, by (i div 5) mod 5
SHARED_TOKENS: Final = 512  # W4
OWN_TOKENS: Final = 16
STAGGER_S: Final = 0.2
WINDOW_TOKENS: Final = 1280  # longest sequence any workload of `peers` needs, with room for a template
LOADS: Final = (0.25, 0.5, 0.75, 1.0, 2.0, 4.0)  # W5, times capacity
CHAT_MEDIAN_PROMPT: Final = 160  # W5: conversation lengths, log-normal
CHAT_MEDIAN_OUTPUT: Final = 180
CHAT_SPREAD: Final = 0.8  # sigma of the logarithm: mean 1.38 times the median, p95 3.7 times
CHAT_LONGEST: Final = 600  # either side, so that prompt and output fit WINDOW_TOKENS


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt in ids, the exact number of tokens to make, and when it arrives after the run's start."""

    prompt: tuple[int, ...]
    output_tokens: int
    at_s: float = 0.0


class Text:
    """Python's own manual in the model's tokens, read in order and, at its end, again from the start."""

    def __init__(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ValueError("the text has no tokens")
        self._ids = tuple(ids)

    def take(self, at: int, count: int) -> tuple[int, ...]:
        """Return `count` ids from place `at`."""
        found: tuple[int, ...] = ()
        while len(found) < count:
            start = (at + len(found)) % len(self._ids)
            found += self._ids[start : start + count - len(found)]
        return found


def read_text(model_dir: Path) -> Text:
    """Return the manual (`pydoc_data.topics`, joined in sorted order), in the model's tokens."""
    from tokenizers import Tokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return Text(tokenizer.encode(text, add_special_tokens=False).ids)


def _lone(text: Text, at: int, prompt: int, output: int) -> list[Request]:
    return [Request(text.take(at, prompt), output)]


def _mixed(text: Text, at: int, count: int) -> list[Request]:
    made = []
    for number in range(count):
        prompt, output = PROMPTS[number % 5], OUTPUTS[number // 5 % 5]
        made.append(Request(text.take(at, prompt), output))
        at += prompt
    return made


def _sharing(text: Text, at: int, count: int, shared: int, output: int, apart_s: float) -> list[Request]:
    common, rest = text.take(at, shared), at + shared
    own = [text.take(rest + number * OWN_TOKENS, OWN_TOKENS) for number in range(count)]
    return [Request(common + part, output, number * apart_s) for number, part in enumerate(own)]


def _first(requests: list[Request], count: int, output: int) -> list[Request]:
    """Return a short form for `--quick`: fewer requests, shorter outputs, the same prompts."""
    return [Request(r.prompt, min(r.output_tokens, output), r.at_s) for r in requests[:count]]


Maker = Callable[[Text, int], list[Request]]
FULL: Final[dict[str, Maker]] = {
    "W1": lambda text, at: _lone(text, at, 64, 128),
    "W2": lambda text, at: _lone(text, at, 1024, 1),
    "W3": lambda text, at: _mixed(text, at, 32),
    "W4": lambda text, at: _sharing(text, at, 16, SHARED_TOKENS, 32, 0.0),
    "W4s": lambda text, at: _sharing(text, at, 16, SHARED_TOKENS, 32, STAGGER_S),
}
QUICK: Final[dict[str, Maker]] = {
    "W1": lambda text, at: _lone(text, at, 64, 16),
    "W2": lambda text, at: _lone(text, at, 128, 1),
    "W3": lambda text, at: _first(_mixed(text, at, 32), 6, 8),
    "W4": lambda text, at: _sharing(text, at, 4, 64, 4, 0.0),
    "W4s": lambda text, at: _sharing(text, at, 4, 64, 4, 0.05),
}
STRIDE: Final = 8192  # more than any of them reads: rounds and workloads do not overlap


def requests(workload: str, text: Text, turn: int, *, quick: bool = False) -> list[Request]:
    """Return the requests of W1, W2, W3, W4 (at once) or W4s (staggered) in round `turn` (0 is warm-up)."""
    makers = QUICK if quick else FULL
    place = (turn * len(makers) + list(makers).index(workload)) * STRIDE
    return makers[workload](text, place)


def warm_up(text: Text) -> list[Request]:
    """Return what every engine is given once after loading, its times not kept."""
    return [Request(text.take(number * 48 + 7, 48), 4) for number in range(4)]


def conversations(text: Text, count: int, rate_per_s: float, seed: int) -> list[Request]:
    """Return `count` chat-like requests (W5) as a Poisson process of `rate_per_s`; inf: at once."""
    draw = random.Random(seed)
    made, now_s, at = [], 0.0, draw.randrange(1 << 20)
    for _ in range(count):
        prompt, output = (
            min(CHAT_LONGEST, max(4, round(draw.lognormvariate(math.log(median), CHAT_SPREAD))))
            for median in (CHAT_MEDIAN_PROMPT, CHAT_MEDIAN_OUTPUT)
        )
        made.append(Request(text.take(at, prompt), output, now_s))
        at += prompt
        gap_s = draw.expovariate(1.0)
        now_s += gap_s / rate_per_s
    return made
