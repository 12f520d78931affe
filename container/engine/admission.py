"""The engine's door: what may enter, and when to say "try again later".

Owns: the limits, the rules a request must meet, the estimate of the wait.
Must not know: sequences, blocks, the runner beyond its capacity. Standard library only.
Invariant: what is accepted can run alone: its prompt and output fit the window, the pool and
what running sequences may hold together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from container.engine.request import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    SEED_BITS,
    EngineRequest,
    ErrorCode,
    Refused,
    SamplingParams,
)
from container.engine.step import Capacity

WAITING_PER_RUNNING: Final = 4  # queue bound when none is set: about four full batches ahead of a newcomer
WAITING_S: Final = 5.0  # a longer wait is better spent at another replica
RETRY_AFTER_MIN_S: Final = 1
RETRY_AFTER_MAX_S: Final = 30
RATE_HALF_LIFE_S: Final = 20.0  # long against one request, short against a change of load
ANSWERS_HALF_LIFE: Final = 32.0  # answers; their length depends on what is asked, not on the load
MIN_ANSWERS: Final = 3.5  # four of late; fewer say nothing about the next
CACHE_SALT: Final = re.compile(r"[A-Za-z0-9_-]{0,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the operator allows; None means: derive it from the runner's capacity."""

    running: int | None = None  # sequences running at once; None: the runner's slots
    waiting: int | None = None  # sequences queued before QUEUE_FULL; None: 4 x running
    waiting_s: float = WAITING_S  # estimated wait beyond which new requests get QUEUE_FULL

    def resolve(self, capacity: Capacity) -> tuple[int, int]:
        """Return the running and the waiting limit.

        Raises ValueError when the runner cannot hold that many, or when decoding alone would use up a step:
        prompts would then starve.
        """
        running = capacity.slots if self.running is None else self.running
        waiting = WAITING_PER_RUNNING * running if self.waiting is None else self.waiting
        if not 1 <= running <= capacity.slots:
            raise ValueError(f"`running` must be 1..{capacity.slots} (the runner's slots), got {running}")
        if running >= capacity.step_tokens:
            raise ValueError(
                f"`running` must be below `step_tokens` ({capacity.step_tokens}), got {running}\n"
                "hint: raise the token budget of a step"
            )
        if waiting < 0 or not self.waiting_s > 0:
            raise ValueError("`waiting` must be at least 0 and `waiting_s` above 0")
        return running, waiting


class Pace:
    """How fast a full engine hands out places, from what it measured: tokens a second, tokens per answer.

    What requests declare plays no part: most end early. Neither do steps with places to spare: a lone
    sequence makes few tokens a second, and says nothing about a full batch.
    """

    def __init__(self) -> None:
        self._tokens = 0.0  # generated in full steps ...
        self._busy_s = 0.0  # ... that took so long
        self._answers = 0.0
        self._answer_tokens = 0.0

    def observe(self, tokens: int, busy_s: float) -> None:
        """Record a step of a full engine: `tokens` generated in `busy_s` seconds."""
        fade = 0.5 ** (busy_s / RATE_HALF_LIFE_S)
        self._tokens = self._tokens * fade + tokens
        self._busy_s = self._busy_s * fade + busy_s

    def answered(self, tokens: int) -> None:
        """Record that a running sequence ended, in whatever way, after `tokens` generated ones."""
        fade = 0.5 ** (1 / ANSWERS_HALF_LIFE)
        self._answers = self._answers * fade + 1
        self._answer_tokens = self._answer_tokens * fade + tokens

    def wait_s(self, ahead: int) -> float | None:
        """Return the time until `ahead` more sequences have ended; None while too little is known to say.

        Exact for a steady mix. Just after a cold start it is short: brief answers are the first to end.
        """
        if ahead <= 0:
            return 0.0
        if self._answers < MIN_ANSWERS or self._tokens <= 0.0:
            return None
        return ahead * (self._answer_tokens / self._answers) * (self._busy_s / self._tokens)


class Gate:
    """Applies the rules to one arrival after another."""

    def __init__(self, capacity: Capacity, limits: EngineLimits) -> None:
        self._capacity = capacity
        self.running_limit, self.waiting_limit = limits.resolve(capacity)
        self._waiting_s = limits.waiting_s
        self.pace = Pace()

    def forget_pace(self) -> None:
        """Know nothing about the wait again."""
        self.pace = Pace()

    def check_request(self, request: EngineRequest) -> None:
        """Raise Refused (INVALID, UNSUPPORTED or CONTEXT_LENGTH) unless `request` can run alone."""
        capacity = self._capacity
        if not _well_formed(request, capacity.vocabulary):
            raise Refused(ErrorCode.INVALID)
        if request.sampling.prompt_logprobs is not None and not capacity.prompt_logprobs:
            raise Refused(ErrorCode.UNSUPPORTED)
        if request.sampling.grammar is not None and not capacity.grammar:
            raise Refused(ErrorCode.UNSUPPORTED)
        tokens = len(request.prompt) + request.max_tokens
        longest = min(capacity.sequence_tokens, capacity.blocks * capacity.block_tokens)
        if capacity.resident_tokens is not None:
            longest = min(longest, capacity.resident_tokens)
        if tokens > longest:
            raise Refused(ErrorCode.CONTEXT_LENGTH)

    def check_room(self, running: int, waiting: int) -> None:
        """Raise Refused(QUEUE_FULL) when the queue is at its bound or the wait would be too long.

        Free slots count as room: sequences that the next step takes are not a queue. While nothing is known
        about the wait, as in a first burst, only the bound holds.
        """
        free = self.running_limit - running
        wait_s = self.pace.wait_s(waiting + 1 - free)
        if waiting < self.waiting_limit + free and (wait_s is None or wait_s <= self._waiting_s):
            return
        retry_after_s = RETRY_AFTER_MIN_S
        if wait_s is not None:
            retry_after_s = max(RETRY_AFTER_MIN_S, math.ceil(min(wait_s, RETRY_AFTER_MAX_S)))
        raise Refused(ErrorCode.QUEUE_FULL, retry_after_s=retry_after_s)


def _well_formed(request: EngineRequest, vocabulary: int) -> bool:
    return (
        len(request.prompt) > 0
        and request.prompt.typecode == "i"
        and _are_ids(request.prompt, vocabulary)
        and _are_ids(request.stop_token_ids, vocabulary)
        and request.max_tokens >= 1
        and 0 <= request.min_tokens <= request.max_tokens
        and 1 <= request.choices <= MAX_CHOICES
        and CACHE_SALT.fullmatch(request.cache_salt) is not None
        and _can_be_sampled(request.sampling, vocabulary)
    )


def _are_ids(tokens: Iterable[int], vocabulary: int) -> bool:
    return all(0 <= token < vocabulary for token in tokens)


def _can_be_sampled(sampling: SamplingParams, vocabulary: int) -> bool:
    """Every comparison is written so that NaN fails it."""
    return (
        0.0 <= sampling.temperature < math.inf
        and sampling.top_k >= 0
        and 0.0 < sampling.top_p <= 1.0
        and 0.0 <= sampling.min_p <= 1.0
        and 0.0 < sampling.typical_p <= 1.0
        and 0.0 < sampling.repetition_penalty < math.inf
        and -2.0 <= sampling.frequency_penalty <= 2.0
        and -2.0 <= sampling.presence_penalty <= 2.0
        and 0 <= sampling.seed < 1 << SEED_BITS
        and _are_ids((token for token, _ in sampling.logit_bias), vocabulary)
        and all(math.isfinite(bias) for _, bias in sampling.logit_bias)
        and 0 <= (sampling.top_logprobs or 0) <= MAX_TOP_LOGPROBS
        and 0 <= (sampling.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS
    )
