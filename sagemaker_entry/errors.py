"""Every error a client can see: one closed table, no text from anywhere else.

Owns: codes, statuses, messages. Must not know: dialect bodies (they wrap these), exceptions of libraries.
Invariant: a message holds names of fields, rules and numbers, never text a client sent and never str(exc).

    ApiError
    |- carries one Code; Code -> (HTTP status, OpenAI type, message template, TGI error_type)
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Rule(NamedTuple):
    """One row of the table. `message` may use {param} and the named numbers of the raise site."""

    status: int
    type: str  # OpenAI's `type`
    tgi_type: str  # TGI's `error_type`
    message: str


class Code(enum.StrEnum):
    """Closed list of client-visible error codes."""

    INVALID_JSON = "invalid_json"
    TOO_DEEP = "too_deep"
    TOO_MANY_KEYS = "too_many_keys"
    DUPLICATE_KEY = "duplicate_key"
    INVALID_NUMBER = "invalid_number"
    INVALID_UTF8 = "invalid_utf8"
    LONE_SURROGATE = "lone_surrogate"
    TOO_MANY_VALUES = "too_many_values"
    UNKNOWN_SHAPE = "unknown_shape"
    UNSUPPORTED_SHAPE = "unsupported_shape"
    SESSIONS_OFF = "sessions_not_enabled"
    SESSION_HEADER = "session_header_not_supported"
    SESSION_NOT_FOUND = "session_not_found"
    SESSION_NOT_CLOSED = "session_not_closed"
    SESSIONS_FULL = "too_many_sessions"
    UNKNOWN_FIELD = "unknown_field"
    UNSUPPORTED_FIELD = "unsupported_field"
    MISSING_FIELD = "missing_field"
    INVALID_TYPE = "invalid_type"
    INVALID_VALUE = "invalid_value"
    INVALID_REQUEST = "invalid_request"  # a rule over several fields, in words of the raise site
    CONTEXT_LENGTH = "context_length_exceeded"
    CONTROL_TOKEN = "control_token"
    TEMPLATE_FAILED = "template_failed"
    NO_TEMPLATE = "no_chat_template"
    TOOLS_UNSUPPORTED = "tools_unsupported"
    MODEL_NOT_FOUND = "model_not_found"
    ADAPTER_NOT_FOUND = "adapter_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNAUTHORIZED = "unauthorized"
    MEDIA_TYPE = "unsupported_media_type"
    CONTENT_ENCODING = "unsupported_content_encoding"
    LENGTH_REQUIRED = "length_required"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    BAD_REQUEST = "bad_request"
    READ_TIMEOUT = "read_timeout"
    EXPECTATION = "expectation_failed"
    TRANSFER_CODING = "unsupported_transfer_coding"
    OVERLOADED = "overloaded"
    LOADING = "loading"
    DRAINING = "draining"
    ENGINE_DOWN = "engine_down"
    DEADLINE = "deadline_exceeded"
    KV_EXHAUSTED = "kv_exhausted"
    NUMERICAL = "numerical_error"
    GRAMMAR_OFF = "grammar_not_available"
    GRAMMAR_INVALID = "invalid_grammar"
    GRAMMAR_FAILED = "grammar_failed"
    GRAMMAR_VIOLATED = "grammar_violated"
    LOCKED = "locked"
    NOT_LOCKED = "not_locked"
    UNLOCK_REFUSED = "unlock_refused"
    INTERNAL = "internal"


TABLE: Final[dict[Code, Rule]] = {
    Code.INVALID_JSON: Rule(400, "invalid_request_error", "validation", "the body is not one JSON document"),
    Code.TOO_DEEP: Rule(400, "invalid_request_error", "validation", "nesting is limited to {limit} levels"),
    Code.TOO_MANY_KEYS: Rule(
        400, "invalid_request_error", "validation", "an object is limited to {limit} keys"
    ),
    Code.DUPLICATE_KEY: Rule(
        400, "invalid_request_error", "validation", "an object names the same key twice"
    ),
    Code.INVALID_NUMBER: Rule(
        400, "invalid_request_error", "validation", "a number is not finite or too large"
    ),
    Code.INVALID_UTF8: Rule(400, "invalid_request_error", "validation", "the body is not valid UTF-8"),
    Code.LONE_SURROGATE: Rule(400, "invalid_request_error", "validation", "a string holds a lone surrogate"),
    Code.TOO_MANY_VALUES: Rule(
        400, "invalid_request_error", "validation", "the body is limited to {limit} values"
    ),
    Code.UNSUPPORTED_SHAPE: Rule(
        400, "invalid_request_error", "validation", "a {shape} body is not served here"
    ),
    Code.SESSIONS_OFF: Rule(
        400, "invalid_request_error", "validation", "Invalid payload. stateful sessions not enabled"
    ),
    Code.SESSION_HEADER: Rule(
        400,
        "invalid_request_error",
        "validation",
        "Invalid payload. stateful sessions not enabled, X-Amzn-SageMaker-Session-Id header not supported",
    ),
    Code.SESSION_NOT_FOUND: Rule(
        400,
        "invalid_request_error",
        "validation",
        "Bad request: session not found: closed, expired or unknown",
    ),
    Code.SESSION_NOT_CLOSED: Rule(
        400, "invalid_request_error", "validation", "Failed to close session: closed, expired or unknown"
    ),
    Code.SESSIONS_FULL: Rule(
        429, "rate_limit_error", "overloaded", "no more sessions can be open at once; close one or wait"
    ),
    Code.UNKNOWN_SHAPE: Rule(
        400,
        "invalid_request_error",
        "validation",
        "the body must have one of `inputs` (TGI), `messages` (OpenAI chat), `prompt` (OpenAI completion) or "
        "`message` (Cohere chat)",
    ),
    Code.UNKNOWN_FIELD: Rule(400, "invalid_request_error", "validation", "`{param}` is not a known field"),
    Code.UNSUPPORTED_FIELD: Rule(400, "invalid_request_error", "validation", "`{param}` is not supported"),
    Code.MISSING_FIELD: Rule(400, "invalid_request_error", "validation", "`{param}` is required"),
    Code.INVALID_TYPE: Rule(400, "invalid_request_error", "validation", "`{param}` must be {expected}"),
    Code.INVALID_VALUE: Rule(400, "invalid_request_error", "validation", "`{param}` must be {rule}"),
    Code.INVALID_REQUEST: Rule(400, "invalid_request_error", "validation", "{rule}"),
    Code.CONTEXT_LENGTH: Rule(
        400,
        "invalid_request_error",
        "validation",
        "prompt and output are limited to {limit} tokens together; the prompt has {prompt_tokens}",
    ),
    Code.CONTROL_TOKEN: Rule(
        400, "invalid_request_error", "validation", "`{param}` holds a token id reserved for control"
    ),
    Code.TEMPLATE_FAILED: Rule(
        400, "invalid_request_error", "template_error", "the chat template refused these messages"
    ),
    Code.NO_TEMPLATE: Rule(400, "invalid_request_error", "template_error", "this model has no chat template"),
    Code.TOOLS_UNSUPPORTED: Rule(
        400,
        "invalid_request_error",
        "template_error",
        "this model's chat template writes no tool calls that can be told from text; "
        "`tool_choice` can be `none`, `required` or a function",
    ),
    Code.MODEL_NOT_FOUND: Rule(404, "invalid_request_error", "validation", "this model is not served here"),
    Code.ADAPTER_NOT_FOUND: Rule(
        404, "invalid_request_error", "validation", "no adapter of this name is registered here"
    ),
    Code.NOT_FOUND: Rule(404, "invalid_request_error", "validation", "no such route"),
    Code.METHOD_NOT_ALLOWED: Rule(
        405, "invalid_request_error", "validation", "this route has no such method"
    ),
    Code.UNAUTHORIZED: Rule(401, "authentication_error", "validation", "a valid API key is required"),
    Code.MEDIA_TYPE: Rule(
        415,
        "invalid_request_error",
        "validation",
        "content type must be application/json; `/invocations` also takes application/jsonlines",
    ),
    Code.CONTENT_ENCODING: Rule(
        415, "invalid_request_error", "validation", "content encodings are not accepted"
    ),
    Code.LENGTH_REQUIRED: Rule(411, "invalid_request_error", "validation", "the body needs a length"),
    Code.BODY_TOO_LARGE: Rule(
        413, "invalid_request_error", "validation", "the body is limited to {limit} bytes"
    ),
    Code.HEADERS_TOO_LARGE: Rule(431, "invalid_request_error", "validation", "the headers are too large"),
    Code.BAD_REQUEST: Rule(400, "invalid_request_error", "validation", "the request is malformed"),
    Code.READ_TIMEOUT: Rule(408, "invalid_request_error", "validation", "the body did not arrive in time"),
    Code.EXPECTATION: Rule(417, "invalid_request_error", "validation", "no such expectation can be met"),
    Code.TRANSFER_CODING: Rule(
        501, "invalid_request_error", "validation", "the only transfer coding is chunked"
    ),
    Code.OVERLOADED: Rule(
        429, "rate_limit_error", "overloaded", "the endpoint is overloaded; try again later"
    ),
    Code.LOADING: Rule(503, "server_error", "healthcheck", "the model is loading"),
    Code.DRAINING: Rule(503, "server_error", "healthcheck", "the server is shutting down"),
    Code.ENGINE_DOWN: Rule(503, "server_error", "healthcheck", "the engine restarted; try again"),
    Code.DEADLINE: Rule(
        504, "server_error", "generation", "the request's deadline passed; stream long answers"
    ),
    Code.KV_EXHAUSTED: Rule(
        507, "server_error", "generation", "the sequence outgrew the memory for keys and values"
    ),
    Code.NUMERICAL: Rule(
        422, "invalid_request_error", "generation", "no token can be drawn with these settings"
    ),
    Code.GRAMMAR_OFF: Rule(
        400, "invalid_request_error", "validation", "`{param}`: structured output is not available here"
    ),
    Code.GRAMMAR_INVALID: Rule(
        400, "invalid_request_error", "validation", "`{param}` cannot be followed: {reason}"
    ),
    Code.GRAMMAR_FAILED: Rule(
        422, "invalid_request_error", "generation", "the answer could not follow its grammar to the end"
    ),
    Code.GRAMMAR_VIOLATED: Rule(
        500, "server_error", "generation", "the finished answer was not shown to follow its grammar"
    ),
    Code.LOCKED: Rule(503, "server_error", "healthcheck", "the model is locked: its key has not come yet"),
    Code.NOT_LOCKED: Rule(409, "invalid_request_error", "validation", "no key is awaited here"),
    Code.UNLOCK_REFUSED: Rule(
        403, "invalid_request_error", "validation", "the unlock message was refused: {reason}"
    ),
    Code.INTERNAL: Rule(500, "server_error", "generation", "the server failed"),
}


class ApiError(Exception):
    """An error meant for the client.

    `numbers` fill the message's named places: ints, floats or words of our own, never client text. They are
    kept, because a dialect may word the same fact in its own way.
    """

    def __init__(
        self,
        code: Code,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        **numbers: int | float | str,
    ) -> None:
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.numbers = numbers
        self.rule = TABLE[code]
        self.message = self.rule.message.format(param=param, **numbers)
        super().__init__(code.value)

    @property
    def status(self) -> int:
        return self.rule.status
