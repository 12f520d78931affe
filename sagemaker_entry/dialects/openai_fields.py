"""Fields chat and completion requests share: sampling, stops, the model's name, streaming.

Owns: their types, ranges and defaults. Must not know: prompts, replies.
Invariant: every value read here ends up in the GenerationRequest; fields that ask nothing of us are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.bounds import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TOP_K,
    MIN_PROBABILITY,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
)
from sagemaker_entry.dialects.fields import (
    Fields,
    check_strings,
    invalid_type,
    invalid_value,
    is_number,
    unsupported,
)
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ModelLimits

MAX_TEMPERATURE: Final = 2.0  # OpenAI's
MAX_SEED: Final = 2**63 - 1  # OpenAI's schema has a signed 64-bit integer
CACHE_SALT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN_ID: Final = re.compile(r"0|[1-9][0-9]{0,9}")
# Bookkeeping of OpenAI's own platform, hints about caching, and vLLM's priority, which no client may set.
IGNORED: Final = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "verbosity",
    "priority",
)


@dataclass(frozen=True, slots=True)
class Shared:
    """What both shapes say in the same way; the meaning is GenerationRequest's."""

    model: str | None
    seed: int | None
    choices: int
    min_tokens: int
    stop: tuple[str, ...] = field(repr=False)
    include_stop: bool
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    cache_salt: str = field(repr=False)
    stream: bool
    include_usage: bool


def read_shared(fields: Fields, limits: ModelLimits, max_tokens: int | None) -> Shared:
    """Take the shared fields other than sampling; raises ApiError."""
    fields.ignore(IGNORED)
    stream, include_usage = _streaming(fields)
    min_tokens = fields.integer("min_tokens", low=0, high=limits.sequence_tokens) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid_value("min_tokens", "at most `max_tokens`")
    salt_rule = "1 to 64 letters, digits, `-` or `_`"
    return Shared(
        model=served_model(fields, limits),
        seed=fields.integer("seed", low=0, high=MAX_SEED),
        choices=fields.integer("n", low=1, high=limits.max_choices) or 1,
        min_tokens=min_tokens,
        stop=_stop(fields, limits),
        include_stop=bool(fields.boolean("include_stop_str_in_output")),
        stop_token_ids=fields.integers(
            "stop_token_ids", count=limits.max_stop_token_ids, low=0, high=limits.vocabulary - 1
        )
        or (),
        ignore_eos=bool(fields.boolean("ignore_eos")),
        skip_special_tokens=fields.boolean("skip_special_tokens") is not False,
        cache_salt=fields.text("cache_salt", pattern=CACHE_SALT, rule=salt_rule) or "",
        stream=stream,
        include_usage=include_usage,
    )


def read_sampling(
    fields: Fields, limits: ModelLimits, *, top_logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Take the sampling fields; what is absent comes from the model's own generation defaults."""
    base = limits.default_sampling
    temperature = fields.number("temperature")
    if temperature is not None and temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise invalid_value("temperature", f"0 or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
    top_k = fields.integer("top_k", low=-1, high=MAX_TOP_K)  # -1 and 0 both turn it off
    top_p = _probability(fields, "top_p")
    min_p = fields.number("min_p", low=0, high=1)
    typical_p = _probability(fields, "typical_p")
    repetition = fields.number("repetition_penalty", low=MIN_REPETITION_PENALTY, high=MAX_REPETITION_PENALTY)
    frequency = fields.number("frequency_penalty", low=-MAX_PENALTY, high=MAX_PENALTY)
    presence = fields.number("presence_penalty", low=-MAX_PENALTY, high=MAX_PENALTY)
    bias = _logit_bias(fields, limits)
    return SamplingParams(
        temperature=base.temperature if temperature is None else temperature,
        top_k=base.top_k if top_k is None else max(top_k, 0),
        top_p=base.top_p if top_p is None else top_p,
        min_p=base.min_p if min_p is None else min_p,
        typical_p=base.typical_p if typical_p is None else typical_p,
        repetition_penalty=base.repetition_penalty if repetition is None else repetition,
        frequency_penalty=base.frequency_penalty if frequency is None else frequency,
        presence_penalty=base.presence_penalty if presence is None else presence,
        logit_bias=base.logit_bias if bias is None else bias,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def read_text_format(fields: Fields) -> None:
    """Take `response_format`: plain text asks for nothing, structured output is not served."""
    wanted = fields.nested("response_format")
    if wanted is None:
        return
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise ApiError(Code.MISSING_FIELD, param="response_format.type")
    if kind != "text":
        raise unsupported("response_format")
    wanted.finish()


def _probability(fields: Fields, name: str) -> float | None:
    value = fields.number(name)
    if value is not None and not MIN_PROBABILITY <= value <= 1:
        raise invalid_value(name, "above 0 and at most 1")
    return value


def served_model(fields: Fields, limits: ModelLimits) -> str | None:
    """Return the served name when it was asked for by name; empty and missing mean the same model."""
    model = fields.text("model")
    if not model:
        return None
    if model != limits.model and model not in limits.model_aliases:
        raise ApiError(Code.MODEL_NOT_FOUND, param="model")
    return limits.model


def _stop(fields: Fields, limits: ModelLimits) -> tuple[str, ...]:
    value = fields.value("stop")
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise invalid_type("stop", "a string or a list of strings")
    if len(items) > limits.max_stop_strings:
        raise invalid_value("stop", f"a list of at most {limits.max_stop_strings} items")
    return check_strings("stop", items, limits.max_stop_chars)


def _logit_bias(fields: Fields, limits: ModelLimits) -> tuple[tuple[int, float], ...] | None:
    """Return (token id, bias) by the width of the logits, which may be above the tokenizer's vocabulary."""
    given = fields.mapping("logit_bias")
    if given is None:
        return None
    pairs = []
    for token, bias in given.items():
        if not _TOKEN_ID.fullmatch(token) or int(token) >= limits.vocabulary:
            raise invalid_value("logit_bias", f"keyed by token ids from 0 to {limits.vocabulary - 1}")
        if not is_number(bias):
            raise invalid_type("logit_bias", "an object of numbers")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise invalid_value("logit_bias", f"made of numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        pairs.append((int(token), float(bias)))
    if sum(bias == -MAX_BIAS for _, bias in pairs) >= limits.vocabulary:
        raise invalid_value("logit_bias", "leaving at least one token that can be drawn")
    return tuple(pairs)


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream = bool(fields.boolean("stream"))
    options = fields.nested("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise ApiError(
            Code.INVALID_REQUEST, param="stream_options", rule="`stream_options` needs `stream` to be true"
        )
    include_usage = bool(options.boolean("include_usage"))
    if options.boolean("include_obfuscation"):
        raise unsupported("stream_options.include_obfuscation")
    options.finish()
    return stream, include_usage
