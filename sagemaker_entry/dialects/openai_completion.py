"""OpenAI's legacy completion request to a generation request.

Owns: fields of /v1/completions, the four shapes of `prompt`. Must not know: how the reply looks.
Invariant: prompts are all text or all token ids, none is empty, and prompts x candidates stays bounded.
"""

from __future__ import annotations

from typing import Any, Final

from sagemaker_entry.dialects.bounds import check_prompt_bytes, utf8_bytes
from sagemaker_entry.dialects.fields import (
    Fields,
    invalid_type,
    invalid_value,
    is_integer,
    missing,
    range_rule,
    unsupported,
)
from sagemaker_entry.dialects.openai_completion_reply import CompletionPresenter
from sagemaker_entry.dialects.openai_fields import Shared, read_sampling, read_shared, read_text_format
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest, ModelLimits, TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
UNSUPPORTED: Final = ("structured_outputs",)
_SHAPES: Final = "a string, a list of strings, a list of token ids or a list of such lists"


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    limits = options.limits
    fields.refuse(UNSUPPORTED)
    if fields.text("suffix"):
        raise unsupported("suffix")
    read_text_format(fields)
    max_tokens = fields.integer("max_tokens", low=1, high=limits.sequence_tokens) or DEFAULT_MAX_TOKENS
    shared = read_shared(fields, limits, max_tokens)
    best_of = _best_of(fields, limits, shared)
    logprobs = fields.integer("logprobs", low=0, high=limits.max_top_logprobs)
    echo = bool(fields.boolean("echo"))
    prompts = _prompts(fields, limits)
    if len(prompts) * best_of > limits.max_sequences:
        raise invalid_value("prompt", f"a list that times `best_of` is at most {limits.max_sequences}")
    request = GenerationRequest(
        prompts=prompts,
        sampling=read_sampling(
            fields,
            limits,
            top_logprobs=0 if logprobs is None and best_of > shared.choices else logprobs,
            prompt_logprobs=logprobs if echo else None,
        ),
        seed=shared.seed,
        model=shared.model,
        max_tokens=max_tokens,
        min_tokens=shared.min_tokens,
        choices=shared.choices,
        best_of=best_of,
        stop=shared.stop,
        include_stop=shared.include_stop,
        stop_token_ids=shared.stop_token_ids,
        ignore_eos=shared.ignore_eos,
        skip_special_tokens=shared.skip_special_tokens,
        cache_salt=shared.cache_salt,
        stream=shared.stream,
        prompt_pieces=echo and (logprobs is not None or isinstance(prompts[0], TokenPrompt)),
    )
    fields.finish()
    presenter = CompletionPresenter(
        texts=tuple(p.text if isinstance(p, TextPrompt) else None for p in prompts),
        choices=shared.choices,
        echo=echo,
        shows_special=not shared.skip_special_tokens,
        logprobs=logprobs,
        include_usage=shared.include_usage,
    )
    return Parsed(request, presenter)


def _best_of(fields: Fields, limits: ModelLimits, shared: Shared) -> int:
    best_of = fields.integer("best_of", low=1, high=limits.max_choices)
    if best_of is None:
        return shared.choices
    if best_of < shared.choices:
        raise invalid_value("best_of", "at least `n`")
    if shared.stream and best_of > shared.choices:
        raise ApiError(Code.INVALID_REQUEST, param="best_of", rule="`best_of` above `n` cannot be streamed")
    return best_of


def _prompts(fields: Fields, limits: ModelLimits) -> tuple[TextPrompt, ...] | tuple[TokenPrompt, ...]:
    value = fields.value("prompt")
    if value is None:
        raise missing("prompt")
    if isinstance(value, str):
        return _texts([value], limits)
    if not isinstance(value, list):
        raise invalid_type("prompt", _SHAPES)
    if not value:
        raise invalid_value("prompt", "not empty")
    if is_integer(value[0]):
        return (_tokens(value, limits),)
    if len(value) > limits.max_prompts:
        raise invalid_value("prompt", f"a list of at most {limits.max_prompts} prompts")
    if isinstance(value[0], str):
        return _texts(value, limits)
    return tuple(_tokens(item, limits) for item in value)


def _texts(items: list[Any], limits: ModelLimits) -> tuple[TextPrompt, ...]:
    for item in items:
        if not isinstance(item, str):
            raise invalid_type("prompt", _SHAPES)
        if not item:
            raise invalid_value("prompt", "not empty")
        check_prompt_bytes(utf8_bytes(item), limits)
    return tuple(TextPrompt(item) for item in items)


def _tokens(item: object, limits: ModelLimits) -> TokenPrompt:
    if not isinstance(item, list):
        raise invalid_type("prompt", _SHAPES)
    if not item:
        raise invalid_value("prompt", "not empty")
    if not all(map(is_integer, item)):
        raise invalid_type("prompt", _SHAPES)
    high = limits.vocabulary - 1
    if min(item) < 0 or max(item) > high:
        raise invalid_value("prompt", f"made of token ids {range_rule(0, high)}")
    if len(item) > limits.sequence_tokens:
        raise ApiError(
            Code.CONTEXT_LENGTH, param="prompt", limit=limits.sequence_tokens, prompt_tokens=len(item)
        )
    return TokenPrompt(tuple(item))
