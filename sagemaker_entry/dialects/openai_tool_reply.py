"""OpenAI's chat answers of models that may call tools: calls taken out of the text, whole and streamed.

Owns: which tokens are marks, the ids of calls, the shapes of `tool_calls`, the finish reason.
Must not know: how calls are written (container.text does), requests.
Invariant: a whole answer and a streamed one say the same; ids are the server's, never the model's. A call is
    announced once, with its name, before any of its arguments.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Final

from container.text.tool_calls import CallStarted, Said, ToolCallParser, ToolDelta
from sagemaker_entry.dialects.openai_chat_reply import ChatPresenter, token_logprobs
from sagemaker_entry.dialects.openai_reply import FINISH
from sagemaker_entry.dialects.openai_tools import ToolUse
from sagemaker_entry.generation import Choice, ChoiceEnd, EndReason, Event, TextDelta, TokenPiece

CALL_ID_BYTES: Final = 12


class AnswerReader:
    """Takes one answer apart; it sees marks by their token, also those that leave no text."""

    def __init__(self, tools: ToolUse) -> None:
        self._parser = ToolCallParser(tools.form, tools.names, eager=tools.held, most=tools.most)
        self._marks = {mark.token: mark for mark in tools.form.marks if mark.token is not None}

    def read(self, text: str, pieces: Sequence[TokenPiece]) -> list[ToolDelta]:
        """Return what the next `text` completes; `pieces` are its tokens."""
        found: list[ToolDelta] = []
        for piece in pieces:
            mark = self._marks.get(piece.id)
            if mark is None:
                found += self._parser.push(piece.text)
                continue
            before = piece.text.removesuffix(mark.text)  # the rest of a character that was never finished
            found += self._parser.push(before)
            found += self._parser.push_mark(mark, piece.text[len(before) :])
        return found if pieces else self._parser.push(text)

    def finish(self) -> list[ToolDelta]:
        return self._parser.finish()

    @property
    def called(self) -> bool:
        return self._parser.calls > 0


class ToolChatPresenter(ChatPresenter):
    """Words one chat reply in which tools may be called."""

    def __init__(self, *, choices: int, logprobs: bool, include_usage: bool, tools: ToolUse) -> None:
        super().__init__(choices=choices, logprobs=logprobs, include_usage=include_usage)
        self._tools = tools
        self._readers = [AnswerReader(tools) for _ in range(choices)]

    def event(self, event: Event) -> list[bytes]:
        chunks: list[bytes] = []
        if isinstance(event, ChoiceEnd):
            reader = self._readers[event.choice]
            chunks = [self._chunk(event.choice, delta) for delta in _chunk_deltas(reader.finish())]
            self._usage.see(event)
            finish = finish_reason(event.reason, called=reader.called)
            return [*chunks, self._chunk(event.choice, {}, finish=finish)]
        return super().event(event)

    def _delta(self, delta: TextDelta) -> list[bytes]:
        found = self._readers[delta.choice].read(delta.text, delta.pieces)
        deltas = _chunk_deltas(found)
        logprobs = token_logprobs(delta.pieces) if self._logprobs and delta.pieces else None
        if logprobs is not None and not deltas:
            deltas = [{}]
        return [
            self._chunk(delta.choice, each, logprobs=logprobs if number == 0 else None)
            for number, each in enumerate(deltas)
        ]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        reader = AnswerReader(self._tools)
        found = [*reader.read(choice.text, choice.pieces), *reader.finish()]
        worded = super()._choice(index, choice)
        calls = _calls(found)
        text = "".join(delta.text for delta in found if isinstance(delta, Said))
        worded["message"] = {"role": "assistant", "content": text or None, "refusal": None}
        if calls:
            worded["message"]["tool_calls"] = calls
        else:
            worded["message"]["content"] = text
        worded["finish_reason"] = finish_reason(choice.reason, called=reader.called)
        return worded


def finish_reason(reason: EndReason, *, called: bool) -> str:
    """Return OpenAI's word: `tool_calls` for an answer that ended by itself after calling."""
    word = FINISH[reason]
    return "tool_calls" if called and word == "stop" else word


def call_id() -> str:
    """Return a new id; a client that sends it back can have it only from us."""
    return f"call_{secrets.token_hex(CALL_ID_BYTES)}"


def _calls(found: Iterable[ToolDelta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for delta in found:
        if isinstance(delta, CallStarted):
            calls.append(_started(delta.name))
        elif not isinstance(delta, Said):
            calls[delta.index]["function"]["arguments"] += delta.text
    return calls


def _chunk_deltas(found: Iterable[ToolDelta]) -> list[dict[str, Any]]:
    """Return the `delta` objects of a stream; what follows of the same kind is joined."""
    deltas: list[dict[str, Any]] = []
    last: ToolDelta | None = None
    for delta in found:
        if isinstance(delta, Said):
            if isinstance(last, Said):
                deltas[-1]["content"] += delta.text
            else:
                deltas.append({"content": delta.text})
        elif isinstance(delta, CallStarted):
            deltas.append({"tool_calls": [{"index": delta.index, **_started(delta.name)}]})
        elif last is not None and not isinstance(last, Said):
            deltas[-1]["tool_calls"][0]["function"]["arguments"] += delta.text
        else:
            call = {"index": delta.index, "function": {"arguments": delta.text}}
            deltas.append({"tool_calls": [call]})
        last = delta
    return deltas


def _started(name: str) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
