"""How Cohere's streams are cut into objects, and what all of its replies share.

Owns: the frames, finish reasons, token counts. Must not know: requests, HTTP.
Invariant: one object is one piece with one line end: a client that gets two objects in one part of the
platform's stream reads no further (cohere-aws 0.8.18), one that gets no line end loses the next
(cohere 7.3.1).

    BARE      {"event_type": ...}                        `stream` in the body
    WRAPPED   {"bytes": "<base64 of such an object>"}    the platform's stream operation, no `stream`
"""

from __future__ import annotations

import base64
import enum
from typing import Any, Final

from sagemaker_entry.dialects.openai_reply import Usage
from sagemaker_entry.dialects.presenter import JSON_TYPE, encode
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import EndReason

LINES_TYPE: Final = "application/jsonlines"
FINISH: Final = {
    EndReason.EOS: "COMPLETE",
    EndReason.STOP_TOKEN: "COMPLETE",
    EndReason.STOP_STRING: "STOP_SEQUENCE",
    EndReason.LENGTH: "MAX_TOKENS",
}


class Frames(enum.StrEnum):
    """How the objects of a v1 stream are written."""

    BARE = "bare"
    WRAPPED = "wrapped"

    @property
    def content_type(self) -> str:
        return JSON_TYPE if self is Frames.WRAPPED else LINES_TYPE

    def frame(self, value: dict[str, Any]) -> bytes:
        """Return one piece of the stream."""
        text = encode(value)
        if self is Frames.WRAPPED:
            text = encode({"bytes": base64.b64encode(text).decode("ascii")})
        return text + b"\n"


def stream_error_event(error: ApiError) -> dict[str, Any]:
    """Return the v1 event that ends a stream that failed."""
    return {
        "event_type": "stream-error",
        "is_finished": True,
        "finish_reason": "ERROR",
        "err": error.message,
    }


def token_counts(usage: Usage) -> dict[str, int]:
    """Return input and output tokens as Cohere names them."""
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def meta(usage: Usage, version: str, warnings: tuple[str, ...]) -> dict[str, Any]:
    """Return the `meta` object of a reply."""
    made: dict[str, Any] = {"api_version": {"version": version}, "tokens": token_counts(usage)}
    if warnings:
        made["warnings"] = list(warnings)
    return made
