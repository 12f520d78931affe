"""Prompts to token ids, off the event loop where it takes long, with the limits that need the model.

Owns: byte check before tokenizing, truncation, control ids, the context rule.
Must not know: HTTP, dialects, the engine.
Invariant: what leaves here fits the window together with its max_tokens; text never becomes a control id.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from container.text.errors import TextCode, TextError
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import (
    ChatPrompt,
    GenerationRequest,
    ModelLimits,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from sagemaker_entry.threads import beside

T = TypeVar("T")

LONG_TEXT_CHARS: Final = 8192  # a few milliseconds of tokenizing; the hub may stand still for 20

_CODES: Final = {
    TextCode.LONE_SURROGATE: Code.LONE_SURROGATE,
    TextCode.NO_TEMPLATE: Code.NO_TEMPLATE,
    TextCode.TEMPLATE_FAILED: Code.TEMPLATE_FAILED,
    TextCode.TEMPLATE_TIMEOUT: Code.TEMPLATE_FAILED,
    TextCode.RESERVED_NAME: Code.TEMPLATE_FAILED,
}


class Span(Protocol):
    """A token and the characters it stands for."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Tokenizing(Protocol):
    """What of TextModel turns prompts into ids."""

    @property
    def control_ids(self) -> frozenset[int]: ...

    def encode_text(self, text: str) -> list[int]: ...

    def tokenize(self, text: str) -> Sequence[Span]: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any] | None,
    ) -> Any: ...

    def encode_rendered(self, rendered: Any) -> list[int]: ...

    def tokenize_rendered(self, rendered: Any) -> Sequence[Span]: ...


def token_ids(
    model: Tokenizing, prompt: Prompt, request: GenerationRequest, limits: ModelLimits
) -> array[int]:
    """Return the ids of one prompt, truncated as asked; raises ApiError."""
    if isinstance(prompt, TokenPrompt):
        _check_given(model, prompt, limits)
        ids = array("i", prompt.tokens)
    elif isinstance(prompt, TextPrompt):
        check_size(prompt.text, limits)
        ids = array("i", _encode(len(prompt.text), model.encode_text, prompt.text))
    else:
        rendered = render(model, prompt, limits)
        ids = array("i", _encode(len(rendered.text), model.encode_rendered, rendered))
    if request.truncate_tokens is not None:
        ids = ids[-request.truncate_tokens :]
    return ids


def render(model: Tokenizing, prompt: ChatPrompt, limits: ModelLimits) -> Any:
    """Return the conversation as the model's template writes it; raises ApiError."""
    rendered = _client_error(
        model.render_chat,
        prompt.messages,
        prompt.tools,
        prompt.add_generation_prompt,
        prompt.continue_final_message,
        prompt.template_kwargs,
    )
    check_size(rendered.text, limits)
    return rendered


def chat_spans(model: Tokenizing, prompt: ChatPrompt, limits: ModelLimits) -> tuple[Sequence[Span], str]:
    """Return the tokens of a conversation and the text its template made of it; raises ApiError."""
    rendered = render(model, prompt, limits)
    return _encode(len(rendered.text), model.tokenize_rendered, rendered), rendered.text


def text_spans(model: Tokenizing, text: str, limits: ModelLimits) -> Sequence[Span]:
    """Return the tokens of a raw prompt with their places; raises ApiError."""
    check_size(text, limits)
    return _encode(len(text), model.tokenize, text)


def check_size(text: str, limits: ModelLimits) -> None:
    """Refuse text that cannot fit, before tokenizing it costs seconds."""
    most = limits.prompt_bytes_per_token * limits.sequence_tokens
    if len(text) > most or (len(text) * 4 > most and len(text.encode("utf-8", "replace")) > most):
        raise ApiError(Code.CONTEXT_LENGTH, limit=limits.sequence_tokens, prompt_tokens="too many")


def output_tokens(prompt_tokens: int, asked: int | None, limits: ModelLimits) -> int:
    """Return how many tokens may be generated after `prompt_tokens`; raises ApiError when none fit."""
    if prompt_tokens == 0:
        raise ApiError(Code.INVALID_VALUE, param="prompt", rule="at least one token long")
    if prompt_tokens > limits.input_tokens:
        raise ApiError(Code.CONTEXT_LENGTH, limit=limits.input_tokens, prompt_tokens=prompt_tokens)
    room = limits.sequence_tokens - prompt_tokens
    if asked is None and room > 0:
        return room
    if asked is None or asked > room:
        extra: dict[str, Any] = {} if asked is None else {"max_tokens": asked}
        raise ApiError(
            Code.CONTEXT_LENGTH, limit=limits.sequence_tokens, prompt_tokens=prompt_tokens, **extra
        )
    return asked


def _check_given(model: Tokenizing, prompt: TokenPrompt, limits: ModelLimits) -> None:
    if len(prompt.tokens) > limits.sequence_tokens:
        raise ApiError(Code.CONTEXT_LENGTH, limit=limits.sequence_tokens, prompt_tokens=len(prompt.tokens))
    if prompt.tokens and not 0 <= min(prompt.tokens) <= max(prompt.tokens) < limits.vocabulary:
        raise ApiError(
            Code.INVALID_VALUE, param="prompt", rule=f"token ids from 0 to {limits.vocabulary - 1}"
        )
    if not model.control_ids.isdisjoint(prompt.tokens):
        raise ApiError(Code.CONTROL_TOKEN, param="prompt")


def _encode(chars: int, call: Callable[..., T], *arguments: Any) -> T:
    """Call a native tokenizer; in a thread, where it releases the interpreter, when the text is long."""
    if chars <= LONG_TEXT_CHARS:
        return _client_error(call, *arguments)
    result: T = beside(_client_error, call, *arguments)
    return result


def _client_error(call: Callable[..., T], *arguments: Any) -> T:
    """Return `call(...)` with the text room's errors as the client's."""
    try:
        return call(*arguments)
    except TextError as error:
        code = error.code
    if code is TextCode.CONTROL_TOKEN:
        raise ApiError(Code.CONTROL_TOKEN, param="prompt")
    if code is TextCode.TOO_LARGE:
        raise ApiError(Code.INVALID_VALUE, param="messages", rule="smaller than the chat template's limit")
    raise ApiError(_CODES.get(code, Code.INTERNAL))
