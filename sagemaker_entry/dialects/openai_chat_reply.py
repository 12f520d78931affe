"""OpenAI's chat answers: chat.completion, and chat.completion.chunk events.

Owns: their shapes, logprobs included. Must not know: requests, templates.
Invariant: all events of a stream carry the same id; each choice has one role delta first and one
finish_reason last; `usage` and [DONE] come after every choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sagemaker_entry.dialects.openai_reply import FINISH, Usage, bounded_logprob, envelope
from sagemaker_entry.dialects.presenter import DONE, JSON_TYPE, STREAM_TYPE, encode, openai_error, sse
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    Event,
    GenerationResult,
    PromptInfo,
    ReplyContext,
    TextDelta,
    TokenPiece,
)


class ChatPresenter:
    """Words one chat reply."""

    content_type = JSON_TYPE
    stream_type = STREAM_TYPE

    def __init__(self, *, choices: int, logprobs: bool, include_usage: bool) -> None:
        self._choices = choices
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._usage = Usage()
        self._envelope: dict[str, Any] = {}
        self._request_id = ""

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        body = envelope(context, "chat.completion")
        body["choices"] = [self._choice(index, choice) for index, choice in enumerate(result.choices)]
        body["usage"] = Usage.of(result).body()
        return encode(body)

    def open(self, context: ReplyContext) -> list[bytes]:
        self._envelope = envelope(context, "chat.completion.chunk")
        self._request_id = context.id
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self._choices)]

    def event(self, event: Event) -> list[bytes]:
        self._usage.see(event)
        if isinstance(event, PromptInfo):
            return []
        if isinstance(event, ChoiceEnd):
            return [self._chunk(event.choice, {}, finish=FINISH[event.reason])]
        return self._delta(event)

    def close(self) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        return [sse({**self._envelope, "choices": [], "usage": self._usage.body()}), DONE]

    def stream_error(self, error: ApiError) -> bytes:
        return sse({"error": openai_error(error, self._request_id)})

    def _delta(self, delta: TextDelta) -> list[bytes]:
        logprobs = token_logprobs(delta.pieces) if self._logprobs and delta.pieces else None
        if not delta.text and logprobs is None:
            return []
        return [self._chunk(delta.choice, {"content": delta.text}, logprobs=logprobs)]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._envelope, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return sse(chunk)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": token_logprobs(choice.pieces) if self._logprobs else None,
            "finish_reason": FINISH[choice.reason],
        }


def token_logprobs(pieces: Sequence[TokenPiece]) -> dict[str, Any]:
    """Return chat's logprobs object for `pieces`."""
    return {
        "content": [
            {
                **_entry(piece.text, piece.logprob, piece.raw),
                "top_logprobs": _alternatives(piece.top),
            }
            for piece in pieces
        ],
        "refusal": None,
    }


def _alternatives(top: Iterable[tuple[int, str, float]]) -> list[dict[str, Any]]:
    return [_entry(text, logprob, None) for _, text, logprob in top]


def _entry(text: str, logprob: float | None, raw: bytes | None) -> dict[str, Any]:
    data = text.encode() if raw is None else raw
    # Part of a character has no text of its own; without its bytes the field is null, as OpenAI defines.
    return {"token": text, "logprob": bounded_logprob(logprob), "bytes": list(data) if data else None}
