"""Cohere's v1 chat answers: one object, or events by `event_type`.

Owns: their shapes. Must not know: requests, how calls are written (container.text does).
Invariant: a stream has one `stream-start` first and one `stream-end` last, which carries the whole reply; the
    whole and the streamed reply say the same.

Parameters of a call are an object here. A call that the length cut has none, so it is left out; the finish
reason says MAX_TOKENS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from container.text.tool_calls import CallStarted, Said, ToolDelta
from sagemaker_entry.dialects.cohere_frames import FINISH, Frames, meta, stream_error_event
from sagemaker_entry.dialects.openai_reply import Usage
from sagemaker_entry.dialects.openai_tool_reply import AnswerReader
from sagemaker_entry.dialects.openai_tools import ToolUse
from sagemaker_entry.dialects.presenter import JSON_TYPE, encode
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


class Answer:
    """One answer as it grows: its text, and the calls in it."""

    def __init__(self, tools: ToolUse | None) -> None:
        self._reader = None if tools is None else AnswerReader(tools)
        self._texts: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []

    def push(self, text: str, pieces: Sequence[TokenPiece]) -> str:
        """Return what of `text` is said to the user."""
        if self._reader is None:
            self._texts.append(text)
            return text
        return self._take(self._reader.read(text, pieces))

    def finish(self) -> str:
        """Return what was held back and turned out to be no call."""
        return "" if self._reader is None else self._take(self._reader.finish())

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The whole calls, with their parameters as an object."""
        made = []
        for name, parts in self._calls:
            try:
                parameters = json.loads("".join(parts) or "{}")
            except ValueError:
                continue  # cut by the length
            made.append({"name": name, "parameters": parameters})
        return made

    def _take(self, deltas: Iterable[ToolDelta]) -> str:
        said = []
        for delta in deltas:
            if isinstance(delta, Said):
                said.append(delta.text)
            elif isinstance(delta, CallStarted):
                self._calls.append((delta.name, []))
            else:
                self._calls[delta.index][1].append(delta.text)
        self._texts += said
        return "".join(said)


class ChatPresenter:
    """Words one v1 chat reply."""

    content_type = JSON_TYPE

    def __init__(
        self,
        frames: Frames,
        history: list[dict[str, Any]],
        tools: ToolUse | None,
        warnings: tuple[str, ...],
    ) -> None:
        self._frames = frames
        self._history = history
        self._tools = tools
        self._warnings = warnings
        self._usage = Usage()
        self._id = ""
        self._answer = Answer(tools)
        self._reason = EndReason.EOS

    @property
    def stream_type(self) -> str:
        return self._frames.content_type

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        self._id, self._usage = context.id, Usage.of(result)
        choice = result.choices[0]
        answer = Answer(self._tools)
        answer.push(choice.text, choice.pieces)
        answer.finish()
        return encode(self._reply(answer, choice.reason))

    def open(self, context: ReplyContext) -> list[bytes]:
        self._id = context.id
        return [self._event("stream-start", generation_id=self._id)]

    def event(self, event: Event) -> list[bytes]:
        self._usage.see(event)
        said = ""
        if isinstance(event, TextDelta):
            said = self._answer.push(event.text, event.pieces)
        elif isinstance(event, ChoiceEnd):
            self._reason = event.reason
            said = self._answer.finish()
        return [self._event("text-generation", text=said)] if said else []

    def close(self) -> list[bytes]:
        reply = self._reply(self._answer, self._reason)
        events = []
        if reply.get("tool_calls"):
            events.append(self._event("tool-calls-generation", tool_calls=reply["tool_calls"]))
        end = {"event_type": "stream-end", "is_finished": True, "finish_reason": reply["finish_reason"]}
        return [*events, self._frames.frame({**end, "response": reply})]

    def stream_error(self, error: ApiError) -> bytes:
        return self._frames.frame(stream_error_event(error))

    def _event(self, kind: str, **values: Any) -> bytes:
        return self._frames.frame({"event_type": kind, "is_finished": False, **values})

    def _reply(self, answer: Answer, reason: EndReason) -> dict[str, Any]:
        usage = self._usage
        calls = answer.calls
        said: dict[str, Any] = {"role": "CHATBOT", "message": answer.text}
        reply: dict[str, Any] = {
            "response_id": self._id,
            "generation_id": self._id,
            "text": answer.text,
            "finish_reason": FINISH[reason],
            "chat_history": [*self._history, said],
            "meta": meta(usage, "1", self._warnings),
            "token_count": {
                "prompt_tokens": usage.prompt_tokens,
                "response_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if calls:
            reply["tool_calls"] = said["tool_calls"] = calls
        return reply
