"""The frames between a front worker and the engine process: a closed set of msgspec structs.

Owns: the schema, its version and the length framing.
Must not know: sockets, HTTP, tensors. No torch, so that the front can import it.
Invariant: a frame is either decoded whole into one of these types or refused; nothing is coerced.

    | u32 length, little endian | msgpack array [tag, fields...] |
"""

from __future__ import annotations

import struct
from typing import Annotated, Final

import msgspec

from container.engine.request import MAX_CHOICES

SCHEMA_VERSION: Final = 3
MAX_FRAME_BYTES: Final = 16 * 1024 * 1024  # a prompt of a million tokens still fits
MAX_REQUEST_ID: Final = 2**63 - 1  # counted up by one per request and connection: never reused
LENGTH = struct.Struct("<I")

RequestId = Annotated[int, msgspec.Meta(ge=1, le=MAX_REQUEST_ID)]
ChoiceIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHOICES)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all frames; arrays on the wire, so field order is the schema."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"  # frames carry content: never show fields


class Sampling(_Frame, frozen=True, array_like=True):
    """Wire form of container.engine.request.SamplingParams, field by field."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: list[tuple[int, float]]
    seed: int
    top_logprobs: int | None
    prompt_logprobs: int | None
    grammar: tuple[str, str] | None  # kind, text


class Hello(_Frame, frozen=True, array_like=True, tag="hello"):
    """First frame of each side. The engine answers with what the front needs to validate requests."""

    schema: int = SCHEMA_VERSION


class Welcome(_Frame, frozen=True, array_like=True, tag="welcome"):
    """The engine's answer to Hello."""

    schema: int
    sequence_tokens: int  # longest prompt + output
    vocabulary: int  # width of a row of logits
    running_limit: int
    runner: str  # "native" or "compat"
    reason: str | None  # closed reason code when compat
    prompt_logprobs: bool
    grammar: bool  # structured output is available


class Add(_Frame, frozen=True, array_like=True, tag="add"):
    """Front to engine: run this. Answered by deltas, the last one per choice with finish or error."""

    id: RequestId
    prompt: bytes  # little-endian int32 token ids
    max_tokens: int
    sampling: Sampling
    choices: int
    min_tokens: int
    stop_token_ids: list[int]
    tenant: str
    cache_salt: str


class Cancel(_Frame, frozen=True, array_like=True, tag="cancel"):
    """Front to engine: nobody waits for this request, or this choice of it. Idempotent; no answer needed."""

    id: RequestId
    choice: ChoiceIndex | None = None  # None: all that have not ended


class Token(_Frame, frozen=True, array_like=True):
    """Wire form of SampledToken."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Delta(_Frame, frozen=True, array_like=True):
    """Wire form of SequenceDelta without its connection."""

    id: int
    choice: int
    tokens: list[Token]
    finish: str | None
    error: str | None
    retry_after_s: int | None
    cached_tokens: int | None
    prompt_logprobs: list[Token] | None


class Deltas(_Frame, frozen=True, array_like=True, tag="deltas"):
    """Engine to front: everything one step produced for this connection, in one frame."""

    step: int
    deltas: list[Delta]


FromFront = Hello | Add | Cancel
FromEngine = Welcome | Deltas

_encoder = msgspec.msgpack.Encoder()
decode_from_front = msgspec.msgpack.Decoder(FromFront).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: FromFront | FromEngine) -> bytes:
    """Return `message` as one length-prefixed frame.

    Raises ValueError when it would exceed MAX_FRAME_BYTES.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(payload)) + payload
