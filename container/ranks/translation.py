"""Between frames and the engine's own types.

Owns: Add -> EngineRequest, SequenceDelta -> Delta, and the bounds on what a frame may carry.
Must not know: sockets, threads, the scheduler. Which values are legal is the engine's admission rule.
Invariant: a refusal names no value; what leaves here can be answered in frames of legal size.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Final

from container.engine.request import (
    EngineRequest,
    ErrorCode,
    Grammar,
    GrammarKind,
    Refused,
    RequestKey,
    SampledToken,
    SamplingParams,
    SequenceDelta,
)
from container.ranks.messages import Add, Delta, Sampling, Token

TOKEN_BYTES: Final = 4
MAX_LOGIT_BIAS: Final = 1024  # entries; OpenAI documents 300
MAX_STOP_TOKENS: Final = 1024
MAX_LABEL_CHARS: Final = 256  # tenant, cache salt
GRAMMAR_KINDS: Final = frozenset(kind.value for kind in GrammarKind)
MAX_GRAMMAR_CHARS: Final = 256 * 1024
# A delta with all prompt logprobs must fit one frame: 15 bytes for an id and a float64, 16 MiB in all.
MAX_PROMPT_LOGPROB_ENTRIES: Final = 1_000_000


def to_request(add: Add, connection: int) -> EngineRequest:
    """Return `add` as the engine takes it; raises Refused(INVALID) on anything that exceeds a bound here."""
    prompt = _prompt(add.prompt)
    wanted = add.sampling.prompt_logprobs
    if (
        len(add.stop_token_ids) > MAX_STOP_TOKENS
        or len(add.sampling.logit_bias) > MAX_LOGIT_BIAS
        or len(add.tenant) > MAX_LABEL_CHARS
        or len(add.cache_salt) > MAX_LABEL_CHARS
        or (wanted is not None and len(prompt) * (wanted + 1) > MAX_PROMPT_LOGPROB_ENTRIES)
    ):
        raise Refused(ErrorCode.INVALID)
    return EngineRequest(
        key=RequestKey(connection, add.id),
        prompt=prompt,
        max_tokens=add.max_tokens,
        sampling=_sampling(add.sampling),
        choices=add.choices,
        min_tokens=add.min_tokens,
        stop_token_ids=frozenset(add.stop_token_ids),
        tenant=add.tenant,
        cache_salt=add.cache_salt,
    )


def _prompt(raw: bytes) -> array[int]:
    if len(raw) % TOKEN_BYTES:
        raise Refused(ErrorCode.INVALID)
    tokens = array("i")
    tokens.frombytes(raw)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def _sampling(wire: Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        typical_p=wire.typical_p,
        repetition_penalty=wire.repetition_penalty,
        frequency_penalty=wire.frequency_penalty,
        presence_penalty=wire.presence_penalty,
        logit_bias=tuple(wire.logit_bias),
        seed=wire.seed,
        top_logprobs=wire.top_logprobs,
        prompt_logprobs=wire.prompt_logprobs,
        grammar=_grammar(wire.grammar),
    )


def _grammar(wire: tuple[str, str] | None) -> Grammar | None:
    if wire is None:
        return None
    kind, text = wire
    if len(text) > MAX_GRAMMAR_CHARS or kind not in GRAMMAR_KINDS:
        raise Refused(ErrorCode.INVALID)
    return Grammar(GrammarKind(kind), text)


def to_wire_sampling(params: SamplingParams) -> Sampling:
    """Return the wire form of `params`, field by field."""
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=list(params.logit_bias),
        seed=params.seed,
        top_logprobs=params.top_logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=None if params.grammar is None else (params.grammar.kind.value, params.grammar.text),
    )


def to_prompt_bytes(tokens: array[int]) -> bytes:
    """Return `tokens`, typecode "i", as little-endian int32."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def to_delta(delta: SequenceDelta) -> Delta:
    """Return the wire form of `delta` without its connection."""
    return Delta(
        id=delta.key.id,
        choice=delta.choice,
        tokens=_tokens(delta.tokens),
        finish=None if delta.finish is None else delta.finish.value,
        error=None if delta.error is None else delta.error.value,
        retry_after_s=None,
        cached_tokens=delta.cached_tokens,
        prompt_logprobs=None if delta.prompt_logprobs is None else _tokens(delta.prompt_logprobs),
    )


def _tokens(sampled: Iterable[SampledToken]) -> list[Token]:
    return [Token(s.token, s.logprob, list(s.top)) for s in sampled]


def error_deltas(
    request_id: int, choices: Iterable[int], error: ErrorCode, *, retry_after_s: int | None = None
) -> list[Delta]:
    """Return one final delta per choice, all with the same error."""
    return [
        Delta(
            id=request_id,
            choice=choice,
            tokens=[],
            finish=None,
            error=error.value,
            retry_after_s=retry_after_s,
            cached_tokens=None,
            prompt_logprobs=None,
        )
        for choice in choices
    ]
