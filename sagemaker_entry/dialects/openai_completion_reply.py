"""OpenAI's completion answers: text_completion bodies and events, `echo` and legacy logprobs included.

Owns: their shapes. Must not know: requests.
Invariant: `index` is prompt index x n + rank; `text_offset` counts characters of the choice's own `text`,
the echoed prompt included.

    echo   |<------ prompt ------>|<- answer ->|
    offset 0                      len(prompt)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sagemaker_entry.dialects.openai_reply import FINISH, Usage, bounded_logprob, envelope
from sagemaker_entry.dialects.presenter import DONE, JSON_TYPE, STREAM_TYPE, encode, openai_error, sse
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import (
    ChoiceEnd,
    Event,
    GenerationResult,
    PromptInfo,
    ReplyContext,
    TextDelta,
    TokenPiece,
)


class CompletionPresenter:
    """Words one completion reply.

    `texts` holds each prompt as text, None for a prompt of token ids. `shows_special`: special tokens are
    part of the text rather than only listed.
    """

    content_type = JSON_TYPE
    stream_type = STREAM_TYPE

    def __init__(
        self,
        *,
        texts: tuple[str | None, ...],
        choices: int,
        echo: bool,
        shows_special: bool,
        logprobs: int | None,
        include_usage: bool,
    ) -> None:
        self._texts = texts
        self._choices = choices
        self._echo = echo
        self._shows_special = shows_special
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._usage = Usage()
        self._envelope: dict[str, Any] = {}
        self._request_id = ""
        self._offsets = [0] * (len(texts) * choices)  # characters of each choice sent so far

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        body = envelope(context, "text_completion")
        ranks = [0] * len(self._texts)
        choices = []
        for choice in result.choices:
            info = result.prompts[choice.prompt]
            before: tuple[TokenPiece, ...] = tuple(info.pieces) if self._echo else ()
            text = self._prompt_text(info) + choice.text if self._echo else choice.text
            choices.append(
                {
                    "text": text,
                    "index": choice.prompt * self._choices + ranks[choice.prompt],
                    "logprobs": self._legacy_logprobs((*before, *choice.pieces), 0),
                    "finish_reason": FINISH[choice.reason],
                }
            )
            ranks[choice.prompt] += 1
        body["choices"] = choices
        body["usage"] = Usage.of(result).body()
        return encode(body)

    def open(self, context: ReplyContext) -> list[bytes]:
        self._envelope = envelope(context, "text_completion")
        self._request_id = context.id
        return []

    def event(self, event: Event) -> list[bytes]:
        self._usage.see(event)
        if isinstance(event, PromptInfo):
            return self._echoed(event) if self._echo else []
        index = event.prompt * self._choices + event.choice
        if isinstance(event, ChoiceEnd):
            return [self._chunk(index, "", (), FINISH[event.reason])]
        return self._delta(index, event)

    def close(self) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        return [sse({**self._envelope, "choices": [], "usage": self._usage.body()}), DONE]

    def stream_error(self, error: ApiError) -> bytes:
        return sse({"error": openai_error(error, self._request_id)})

    def _echoed(self, info: PromptInfo) -> list[bytes]:
        text = self._prompt_text(info)
        first = info.prompt * self._choices
        return [self._chunk(index, text, info.pieces, None) for index in range(first, first + self._choices)]

    def _delta(self, index: int, delta: TextDelta) -> list[bytes]:
        if not delta.text and not (self._logprobs is not None and delta.pieces):
            return []
        return [self._chunk(index, delta.text, delta.pieces, None)]

    def _chunk(self, index: int, text: str, pieces: Sequence[TokenPiece], finish: str | None) -> bytes:
        logprobs = self._legacy_logprobs(pieces, self._offsets[index]) if pieces else None
        self._offsets[index] += len(text)
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._envelope, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return sse(chunk)

    def _prompt_text(self, info: PromptInfo) -> str:
        text = self._texts[info.prompt]
        return "".join(self._shown(piece) for piece in info.pieces) if text is None else text

    def _legacy_logprobs(self, pieces: Sequence[TokenPiece], offset: int) -> dict[str, Any] | None:
        """Return the legacy logprobs object; `offset` is where the first piece starts in the text.

        The first token of an echoed prompt has no logprob: null in both lists.
        """
        if self._logprobs is None:
            return None
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(self._shown(piece))
        return {
            "tokens": [piece.text for piece in pieces],
            "token_logprobs": [
                None if piece.logprob is None else bounded_logprob(piece.logprob) for piece in pieces
            ],
            "top_logprobs": [_alternatives(piece) for piece in pieces] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _shown(self, piece: TokenPiece) -> str:
        """Return what the piece adds to the text."""
        return "" if piece.special and not self._shows_special else piece.text


def _alternatives(piece: TokenPiece) -> dict[str, float] | None:
    """Return the best tokens by text, the chosen one always among them; of equal texts the best stays."""
    if piece.logprob is None:
        return None
    best: dict[str, float] = {}
    for text, logprob in [(text, logprob) for _, text, logprob in piece.top] + [(piece.text, piece.logprob)]:
        best.setdefault(text, bounded_logprob(logprob))
    return best
