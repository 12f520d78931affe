"""What chat and completion replies share: the envelope, usage, finish reasons.

Owns: those. Must not know: choices, requests.
Invariant: logprobs are finite; usage counts every generated token once, discarded candidates included.
"""

from __future__ import annotations

from typing import Any, Final

from sagemaker_entry.generation import ChoiceEnd, EndReason, Event, GenerationResult, PromptInfo, ReplyContext

FINISH: Final = {
    EndReason.EOS: "stop",
    EndReason.STOP_TOKEN: "stop",
    EndReason.STOP_STRING: "stop",
    EndReason.LENGTH: "length",
}
LEAST_LOGPROB: Final = -9999.0  # OpenAI's value for "very unlikely"; JSON has no -Infinity


def bounded_logprob(logprob: float | None) -> float:
    """Return a finite logprob; None and NaN read as very unlikely."""
    if logprob is None or not logprob > LEAST_LOGPROB:
        return LEAST_LOGPROB
    return logprob


def envelope(context: ReplyContext, kind: str) -> dict[str, Any]:
    """Return the fields every body and chunk of a reply begins with."""
    return {
        "id": context.id,
        "object": kind,
        "created": context.created_s,
        "model": context.model,
        "system_fingerprint": context.fingerprint,
    }


class Usage:
    """Tokens of one reply, counted from its events or its result."""

    def __init__(self, prompt_tokens: int = 0, completion_tokens: int = 0, cached_tokens: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cached_tokens = cached_tokens

    @classmethod
    def of(cls, result: GenerationResult) -> Usage:
        return cls(result.prompt_tokens, result.completion_tokens, result.cached_tokens)

    def see(self, event: Event) -> None:
        if isinstance(event, PromptInfo):
            self.prompt_tokens += event.prompt_tokens
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, ChoiceEnd):
            self.completion_tokens += event.completion_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
