"""What every dialect gives back: a parsed request with the presenter that words its answer, and error bodies.

Owns: the presenter protocol, JSON and SSE encoding, error bodies and statuses per dialect.
Must not know: sockets, Flask, any dialect's request fields.
Invariant: bytes out are valid JSON or whole SSE events, of finite numbers, on one line for every line reader.

    complete(result)                                     one JSON body
    open() event(...)* close()                           a whole stream
    open() event(...)* stream_error(error)               a stream that failed: no [DONE], no normal end

A presenter belongs to one reply and, while streaming, remembers what it needs of earlier events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from container.text.tool_format import NO_TOOLS, ToolFormat
from sagemaker_entry.dialects.choose import Dialect
from sagemaker_entry.dialects.fields import UnknownFields
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import Event, GenerationRequest, GenerationResult, ModelLimits, ReplyContext

JSON_TYPE: Final = "application/json"
STREAM_TYPE: Final = "text/event-stream"
DONE: Final = b"data: [DONE]\n\n"
MAX_ERROR_BYTES: Final = 4096  # SageMaker passes an error on inside its own; clients log it
MAX_REQUEST_ID_CHARS: Final = 256

_encoder = msgspec.json.Encoder()
# Text line readers (str.splitlines, as in httpx) also break at these three; JSON does not need them raw.
_LINE_BREAKS: Final = (
    ("\x85".encode(), b"\\u0085"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)
# Rules about the body as JSON rather than about a field: 400 in every dialect.
_JSON_CODES: Final = frozenset(
    {
        Code.INVALID_JSON,
        Code.TOO_DEEP,
        Code.TOO_MANY_KEYS,
        Code.TOO_MANY_VALUES,
        Code.DUPLICATE_KEY,
        Code.INVALID_NUMBER,
        Code.INVALID_UTF8,
        Code.LONE_SURROGATE,
        Code.BAD_REQUEST,
    }
)
_TGI_PREFIX: Final = {
    "validation": "Input validation error: ",
    "generation": "Request failed during generation: ",
    "template_error": "Template error: ",
}


class Presenter(Protocol):
    """Words one reply of one dialect."""

    @property
    def content_type(self) -> str:
        """Type of `complete`'s body."""

    @property
    def stream_type(self) -> str:
        """Type of the streamed body."""

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        """Return the whole answer as one body."""

    def open(self, context: ReplyContext) -> list[bytes]:
        """Start a stream; call before the first event. The events to send first, often none."""

    def event(self, event: Event) -> list[bytes]:
        """Return the SSE events, each whole, that `event` makes ready to send."""

    def close(self) -> list[bytes]:
        """Return what ends a stream that went well; usage is counted from the events seen."""

    def stream_error(self, error: ApiError) -> bytes:
        """Return the event that ends a stream that failed; nothing follows it."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A body understood: what to generate and how to word the answer."""

    request: GenerationRequest
    presenter: Presenter = field(repr=False)


@dataclass(frozen=True, slots=True)
class ParseOptions:
    """What parsing depends on beside the body: the model's bounds and the operator's settings."""

    limits: ModelLimits
    unknown_fields: UnknownFields = "refuse"
    # TGI answers prompt and continuation on `/` and `/invocations` when the hub calls the model a
    # text-generation one or says nothing; on `/generate` only what is new.
    full_text_by_default: bool = True
    # The platform says that the caller streams; only a Cohere v1 body, which cannot say so itself, asks this.
    forwarded_stream: bool = False
    # How the model calls tools; asked only for a body that offers some. Raises ApiError while it loads.
    tool_format: Callable[[], ToolFormat] = lambda: NO_TOOLS


def encode(value: Any) -> bytes:
    """Return `value` as JSON on one line."""
    encoded = _encoder.encode(value)
    if not encoded.isascii():
        for raw, escaped in _LINE_BREAKS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def sse(value: Any) -> bytes:
    """Return one whole server-sent event that carries `value`."""
    return b"data: " + encode(value) + b"\n\n"


def status_of(dialect: Dialect, error: ApiError) -> int:
    """Return the HTTP status of `error`: TGI answers 422 for bad values and 424 for a failed run."""
    if dialect is not Dialect.TGI or error.code in _JSON_CODES:
        return error.status
    if error.rule.tgi_type == "generation" and error.code is not Code.DEADLINE:
        return 424
    if error.status == 400:
        return 422
    return error.status


def error_body(dialect: Dialect, error: ApiError, request_id: str) -> tuple[bytes, str]:
    """Return the body of `error` in `dialect`, at most MAX_ERROR_BYTES, and its content type.

    TGI's and Cohere's shapes have no place for `request_id`.
    """
    if dialect is Dialect.TGI:
        body = encode(tgi_error(error))
    elif dialect is Dialect.COHERE:
        body = encode({"message": error.message})
    else:
        body = encode({"error": openai_error(error, request_id)})
    if len(body) > MAX_ERROR_BYTES:
        raise AssertionError(f"an error body of {len(body)} bytes: a message or name is not bounded")
    return body, JSON_TYPE


def openai_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the inside of the canonical `error` object."""
    return {
        "message": error.message,
        "type": error.rule.type,
        "param": error.param,
        "code": error.code.value,
        "request_id": request_id[:MAX_REQUEST_ID_CHARS],
    }


def tgi_error(error: ApiError) -> dict[str, str]:
    """Return TGI's error object; its clients choose the exception by `error_type`."""
    kind = error.rule.tgi_type
    if kind == "overloaded":
        text = "Model is overloaded"
    elif kind == "healthcheck":
        text = "unhealthy"
    else:
        text = _TGI_PREFIX.get(kind, "") + _tgi_message(error)
    return {"error": text, "error_type": kind}


def _tgi_message(error: ApiError) -> str:
    """Return TGI's own sentence where it has one for this rule."""
    if error.code is Code.GRAMMAR_OFF:
        return "grammar is not supported"
    if error.code is Code.GRAMMAR_INVALID:
        return f"grammar is not valid: {error.numbers['reason']}"
    if error.code is not Code.CONTEXT_LENGTH:
        return error.message
    given, limit = error.numbers["prompt_tokens"], error.numbers["limit"]
    new_tokens = error.numbers.get("max_tokens")
    if new_tokens is None:
        return f"`inputs` must have less than {limit} tokens. Given: {given}"
    return (
        f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
        f"Given: {given} `inputs` tokens and {new_tokens} `max_new_tokens`"
    )
