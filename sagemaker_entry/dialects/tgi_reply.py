"""TGI's answers: one JSON body, or one SSE event per token with the last one carrying the whole text.

Owns: reply shapes of `/generate`, `/generate_stream`, `/tokenize`, `/chat_tokenize`. Must not know: requests.
Invariant: a stream that ends well has exactly one event with `generated_text`, and it is the last.

TGI's last token event also ends the stream, and only `ChoiceEnd` tells which token was the last. So one token
is always held back:

    pieces   a   b   c   end
    sent         a   b   c + generated_text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from sagemaker_entry.dialects.presenter import JSON_TYPE, STREAM_TYPE, encode, tgi_error
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    EndReason,
    Event,
    GenerationResult,
    PromptInfo,
    ReplyContext,
    TextDelta,
    TokenPiece,
    TokenSpan,
)

_FINISH = {
    EndReason.EOS: "eos_token",
    EndReason.STOP_TOKEN: "eos_token",
    EndReason.STOP_STRING: "stop_sequence",
    EndReason.LENGTH: "length",
}


class TgiPresenter:
    """Words one TGI reply.

    `prompt` is put before the text (empty unless the full text is wanted); `listed` wraps the body in a list.
    """

    content_type = JSON_TYPE
    stream_type = STREAM_TYPE

    def __init__(
        self,
        *,
        prompt: str,
        listed: bool,
        details: bool,
        prefill: bool,
        top_tokens: bool,
        max_tokens: int | None,
    ) -> None:
        self._prompt = prompt
        self._listed = listed
        self._details = details
        self._prefill = prefill
        self._top_tokens = top_tokens
        self._max_tokens = max_tokens
        self._special: frozenset[int] = frozenset()
        self._texts: list[str] = []
        self._held: TokenPiece | None = None
        self._early_text = ""  # text that came before the first token
        self._index = 0
        self._input_length = 0

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        self._special = context.special_token_ids
        best = result.choices[0]
        body: dict[str, Any] = {"generated_text": self._prompt + best.text}
        if self._details:
            prefill = _prefill(result.prompts[0].pieces) if self._prefill else []
            body["details"] = self._choice_details(best, prefill)
            if result.rest:
                body["details"]["best_of_sequences"] = [
                    {
                        "generated_text": self._prompt + other.text,
                        **self._choice_details(other, prefill),
                    }
                    for other in result.rest
                ]
        return encode([body] if self._listed else body)

    def open(self, context: ReplyContext) -> list[bytes]:
        self._special = context.special_token_ids
        return []

    def event(self, event: Event) -> list[bytes]:
        if isinstance(event, PromptInfo):
            self._input_length = event.prompt_tokens
            return []
        if isinstance(event, ChoiceEnd):
            return [self._last(event)]
        return self._delta(event)

    def close(self) -> list[bytes]:
        return []  # TGI has no [DONE] here

    def stream_error(self, error: ApiError) -> bytes:
        return _sse(tgi_error(error))

    def _delta(self, delta: TextDelta) -> list[bytes]:
        self._texts.append(delta.text)
        if not delta.pieces:
            self._attach(delta.text)
            return []
        ready = []
        for piece in delta.pieces:
            if self._held is not None:
                ready.append(_sse(self._token_event(self._held, None, None)))
            self._held = piece
            if self._early_text:
                self._held = dataclasses.replace(piece, text=self._early_text + piece.text)
                self._early_text = ""
        return ready

    def _attach(self, text: str) -> None:
        """Give text that came without a token to the token before it, or else to the first one."""
        if self._held is None:
            self._early_text += text
        else:
            self._held = dataclasses.replace(self._held, text=self._held.text + text)

    def _last(self, end: ChoiceEnd) -> bytes:
        # Without any token at all the clients still need one: an empty special token.
        piece = self._held or TokenPiece(id=0, text=self._early_text, special=True)
        self._held = None
        details = None
        if self._details:
            details = {
                "finish_reason": self._finish(end.reason, end.completion_tokens),
                "generated_tokens": end.completion_tokens,
                "seed": end.seed,
                "input_length": self._input_length,
            }
        return _sse(self._token_event(piece, self._prompt + "".join(self._texts), details))

    def _token_event(
        self, piece: TokenPiece, text: str | None, details: dict[str, Any] | None
    ) -> dict[str, Any]:
        self._index += 1
        event: dict[str, Any] = {"index": self._index, "token": _token(piece)}
        if self._top_tokens:
            event["top_tokens"] = self._alternatives(piece)
        event["generated_text"] = text
        event["details"] = details
        return event

    def _choice_details(self, choice: Choice, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        details: dict[str, Any] = {
            "finish_reason": self._finish(choice.reason, choice.completion_tokens),
            "generated_tokens": choice.completion_tokens,
            "seed": choice.seed,
            "prefill": prefill,
            "tokens": [_token(piece) for piece in choice.pieces],
        }
        if self._top_tokens:
            details["top_tokens"] = [self._alternatives(piece) for piece in choice.pieces]
        return details

    def _alternatives(self, piece: TokenPiece) -> list[dict[str, Any]]:
        return [
            {"id": token, "text": text, "logprob": logprob, "special": token in self._special}
            for token, text, logprob in piece.top
        ]

    def _finish(self, reason: EndReason, generated_tokens: int) -> str:
        # TGI looks at the length before it looks at the token.
        if self._max_tokens is not None and generated_tokens >= self._max_tokens:
            return "length"
        return _FINISH[reason]


def tokenize_body(spans: Iterable[TokenSpan]) -> bytes:
    """Return the reply of `/tokenize`."""
    return encode(_spans(spans))


def chat_tokenize_body(spans: Iterable[TokenSpan], templated_text: str) -> bytes:
    """Return the reply of `/chat_tokenize`."""
    return encode({"tokenize_response": _spans(spans), "templated_text": templated_text})


def _spans(spans: Iterable[TokenSpan]) -> list[dict[str, Any]]:
    return [{"id": s.id, "text": s.text, "start": s.start, "stop": s.stop} for s in spans]


def _prefill(pieces: Sequence[TokenPiece]) -> list[dict[str, Any]]:
    return [{"id": piece.id, "text": piece.text, "logprob": piece.logprob} for piece in pieces]


def _token(piece: TokenPiece) -> dict[str, Any]:
    return {"id": piece.id, "text": piece.text, "logprob": piece.logprob, "special": piece.special}


def _sse(value: Any) -> bytes:
    # TGI writes no space after the colon, and some of its readers count on five characters.
    return b"data:" + encode(value) + b"\n\n"
