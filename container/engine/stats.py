"""What the engine tells about itself: counts and seconds, never content.

Owns: the counters and their frozen picture. Must not know: requests, policy. Standard library only.
Invariant: accepted = completed + failed + cancelled + in flight, all in requests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Running totals since start, the warm-up excepted, in requests and tokens."""

    accepted: int = 0
    refused: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0  # what was still open was; a choice that ended before changes nothing
    prompt_tokens: int = 0  # of accepted prompts, once per request
    generated_tokens: int = 0  # of all choices
    draft_tokens: int = 0  # guessed and verified
    accepted_tokens: int = 0  # of those, found to be what is sampled
    steps: int = 0
    failed_steps: int = 0  # the runner raised
    last_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """One consistent picture between two steps. `waiting` and `running` count sequences."""

    waiting: int
    running: int
    in_flight: int  # requests accepted and not ended
    kv_blocks_used: int  # held by sequences; cached ones are free to take
    kv_blocks_total: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_queried_tokens: int
    accepted: int
    refused: int
    completed: int
    failed: int
    cancelled: int
    prompt_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    steps: int
    failed_steps: int
    last_step_s: float
    draining: bool
