"""Cohere's v2 chat answers: one object, or server-sent events.

Owns: their shapes. Must not know: requests, how calls are written.
Invariant: a stream opens and closes every content block and call it sends, and ends with one `message-end`;
    one that failed ends with a `message-end` that says ERROR and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from container.text.tool_calls import CallStarted, Said, ToolDelta
from sagemaker_entry.dialects.cohere_frames import FINISH, meta, token_counts
from sagemaker_entry.dialects.openai_reply import Usage, bounded_logprob
from sagemaker_entry.dialects.openai_tool_reply import AnswerReader, call_id
from sagemaker_entry.dialects.openai_tools import ToolUse
from sagemaker_entry.dialects.presenter import JSON_TYPE, STREAM_TYPE, encode
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import (
    ChoiceEnd,
    EndReason,
    Event,
    GenerationResult,
    ReplyContext,
    TextDelta,
    TokenPiece,
)

_EMPTY = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}


class ChatV2Presenter:
    """Words one v2 chat reply."""

    content_type = JSON_TYPE
    stream_type = STREAM_TYPE

    def __init__(self, tools: ToolUse | None, warnings: tuple[str, ...], *, logprobs: bool) -> None:
        self._tools = tools
        self._warnings = warnings
        self._logprobs = logprobs
        self._reader = None if tools is None else AnswerReader(tools)
        self._usage = Usage()
        self._open: str | None = None  # what block is open: `content` or `tool-call`
        self._index = -1
        self._calls = 0
        self._reason = EndReason.EOS

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        choice = result.choices[0]
        text = choice.text
        calls: list[dict[str, Any]] = []
        if self._tools is not None:
            reader = AnswerReader(self._tools)
            text, calls = _collected([*reader.read(choice.text, choice.pieces), *reader.finish()])
        message: dict[str, Any] = {"role": "assistant"}
        if text or not calls:
            message["content"] = [{"type": "text", "text": text}]
        if calls:
            message["tool_calls"] = calls
        reply: dict[str, Any] = {
            "id": context.id,
            "finish_reason": _finish(choice.reason, called=bool(calls)),
            "message": message,
            "usage": {"tokens": token_counts(Usage.of(result))},
        }
        if self._logprobs:
            reply["logprobs"] = [_logprob(piece) for piece in choice.pieces]
        if self._warnings:
            reply["meta"] = meta(Usage.of(result), "2", self._warnings)
        return encode(reply)

    def open(self, context: ReplyContext) -> list[bytes]:
        return [_sse("message-start", id=context.id, delta={"message": _EMPTY})]

    def event(self, event: Event) -> list[bytes]:
        self._usage.see(event)
        if isinstance(event, TextDelta):
            return self._delta(event.text, event.pieces)
        if isinstance(event, ChoiceEnd):
            self._reason = event.reason
            held = [] if self._reader is None else self._blocks(self._reader.finish(), ())
            return [*held, *self._end_block()]
        return []

    def close(self) -> list[bytes]:
        finish = _finish(self._reason, called=self._calls > 0)
        delta = {"finish_reason": finish, "usage": {"tokens": token_counts(self._usage)}}
        return [_sse("message-end", delta=delta)]

    def stream_error(self, error: ApiError) -> bytes:
        return _sse("message-end", delta={"finish_reason": "ERROR", "error": error.message})

    def _delta(self, text: str, pieces: Sequence[TokenPiece]) -> list[bytes]:
        if self._reader is not None:
            return self._blocks(self._reader.read(text, pieces), pieces)
        return self._blocks([Said(text)] if text else [], pieces)

    def _blocks(self, deltas: Iterable[ToolDelta], pieces: Sequence[TokenPiece]) -> list[bytes]:
        sent: list[bytes] = []
        for delta in deltas:
            if isinstance(delta, Said):
                sent += self._content(delta.text, pieces)
                pieces = ()
            elif isinstance(delta, CallStarted):
                sent += self._begin("tool-call")
                self._calls += 1
                call = {"id": call_id(), "type": "function"}
                message = {"tool_calls": {**call, "function": {"name": delta.name, "arguments": ""}}}
                sent.append(_sse("tool-call-start", index=self._index, delta={"message": message}))
            else:
                message = {"tool_calls": {"function": {"arguments": delta.text}}}
                sent.append(_sse("tool-call-delta", index=self._index, delta={"message": message}))
        return sent

    def _content(self, text: str, pieces: Sequence[TokenPiece]) -> list[bytes]:
        sent: list[bytes] = []
        if self._open != "content":
            sent += self._begin("content")
            start = {"message": {"content": {"type": "text", "text": ""}}}
            sent.append(_sse("content-start", index=self._index, delta=start))
        values: dict[str, Any] = {"index": self._index, "delta": {"message": {"content": {"text": text}}}}
        if self._logprobs and pieces:
            values["logprobs"] = _joined(pieces)
        return [*sent, _sse("content-delta", **values)]

    def _begin(self, block: str) -> list[bytes]:
        ended = self._end_block()
        self._open = block
        self._index += 1
        return ended

    def _end_block(self) -> list[bytes]:
        block, self._open = self._open, None
        return [] if block is None else [_sse(f"{block}-end", index=self._index)]


def _sse(kind: str, **values: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **values}) + b"\n\n"


def _finish(reason: EndReason, *, called: bool) -> str:
    word = FINISH[reason]
    return "TOOL_CALL" if called and word == "COMPLETE" else word


def _collected(deltas: Iterable[ToolDelta]) -> tuple[str, list[dict[str, Any]]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, Said):
            texts.append(delta.text)
        elif isinstance(delta, CallStarted):
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": call_id(), "type": "function", "function": function})
        else:
            calls[delta.index]["function"]["arguments"] += delta.text
    return "".join(texts), calls


def _logprob(piece: TokenPiece) -> dict[str, Any]:
    return {"text": piece.text, "token_ids": [piece.id], "logprobs": [bounded_logprob(piece.logprob)]}


def _joined(pieces: Sequence[TokenPiece]) -> dict[str, Any]:
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.id for piece in pieces],
        "logprobs": [bounded_logprob(piece.logprob) for piece in pieces],
    }
