"""What a client asks of the engine, in token ids and numbers, and the ways it can end.

Owns: the request, its sampling parameters, finish reasons and error codes.
Must not know: text, HTTP, tensors, processes. Standard library only.
Invariant: a value of these types is immutable and its repr shows sizes, never content.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_TOP_LOGPROBS = 20  # more would hand out the last layer piece by piece (model extraction)
MAX_CHOICES = 16  # sequences one request may fan out to
SEED_BITS = 64


class FinishReason(enum.StrEnum):
    """Why a sequence ended without an error."""

    STOP_TOKEN = "stop_token"  # end-of-sequence token or a stop id of the request; the token is reported too
    GRAMMAR = "grammar"  # the output is complete and nothing may follow it; its last token is part of it
    LENGTH = "length"  # max_tokens or the model's window is reached
    CANCELLED = "cancelled"  # the client left, a stop string matched or a deadline passed


class ErrorCode(enum.StrEnum):
    """Closed list of the reasons the engine gives for refusing or failing a request."""

    CONTEXT_LENGTH = "context_length_exceeded"  # prompt + max_tokens can never fit
    QUEUE_FULL = "queue_full"  # try again later
    DRAINING = "draining"
    INVALID = "invalid_request"  # a malformed frame; the front should have refused it
    KV_EXHAUSTED = "kv_exhausted"  # the only running sequence cannot get another block
    NUMERICAL = "numerical_error"  # NaN, or every token masked
    UNSUPPORTED = "unsupported"  # the runner in use cannot do what was asked
    GRAMMAR = "grammar_error"  # the grammar cannot be compiled or followed within its bounds
    INTERNAL = "internal"  # the step failed; the requests in it are lost


class GrammarKind(enum.StrEnum):
    """The languages a grammar may be written in; what each means is llguidance's."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"  # written by the front only, never by a client


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an output must be a member of; it is complete before the sequence may end."""

    kind: GrammarKind
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from one row of logits.

    Order of application: penalties, bias, held stop ids, grammar, temperature, top-k, top-p, typical-p,
    min-p, draw. Logprobs are taken from the raw logits, before all of that.
    """

    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0  # in (0, 1]; 1 means off
    min_p: float = 0.0  # in [0, 1]; 0 means off
    typical_p: float = 1.0  # in (0, 1]; 1 means off
    repetition_penalty: float = 1.0  # > 0, over prompt and output; 1 means off
    frequency_penalty: float = 0.0  # in [-2, 2], over output only
    presence_penalty: float = 0.0  # in [-2, 2], over output only
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    seed: int = 0  # unsigned 64 bits, key of the counter RNG
    top_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's; n: and the n best
    prompt_logprobs: int | None = None  # the same for prompt tokens 1..; forces an uncached prefill
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """True when the sampler needs counts of the tokens seen so far."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Names a request inside the engine: the front connection that sent it and the id it chose there."""

    connection: int
    id: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and `choices` continuations of it.

    `tenant` is set by the server, never read from a client field; `cache_salt` is the client's and is
    only mixed in on top. `stop_token_ids` includes the model's end-of-sequence ids unless ignored.
    """

    key: RequestKey
    prompt: array[int] = field(repr=False)  # (prompt_tokens,) typecode "i"
    max_tokens: int
    sampling: SamplingParams
    choices: int = 1
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""
    cache_salt: str = field(default="", repr=False)

    def __repr__(self) -> str:
        return (
            f"EngineRequest(key={self.key}, prompt_tokens={len(self.prompt)}, "
            f"max_tokens={self.max_tokens}, choices={self.choices})"
        )


class Refused(Exception):
    """The engine did not accept a request; nothing of it is kept.

    `retry_after_s` is set for QUEUE_FULL only.
    """

    def __init__(self, code: ErrorCode, *, retry_after_s: int | None = None) -> None:
        super().__init__(code.value)
        self.code = code
        self.retry_after_s = retry_after_s


TopLogprobs = tuple[tuple[int, float], ...]  # (token id, natural log probability), best first


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token as sampled, with what was asked for about it."""

    token: int = field(repr=False)
    logprob: float | None = None
    top: TopLogprobs = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one step added to one choice of a request.

    Exactly one delta per choice carries `finish` or `error`, and it is the last one for that choice.
    `prompt_logprobs` (one per prompt token after the first) and `cached_tokens` come with the first delta.
    """

    key: RequestKey
    choice: int
    tokens: Sequence[SampledToken] = field(default=(), repr=False)
    finish: FinishReason | None = None
    error: ErrorCode | None = None
    cached_tokens: int | None = None
    prompt_logprobs: Sequence[SampledToken] | None = field(default=None, repr=False)
