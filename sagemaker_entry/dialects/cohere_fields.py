"""Fields that Cohere's calls share: sampling, stops, answer formats, how to stream.

Owns: their types, ranges and defaults. Must not know: prompts, replies.
Invariant: what is taken here is honoured; a value that asks for something this server does not do is refused.

Ranges are Cohere's own (API reference, 2025). What is absent comes from the model's generation defaults, not
from Cohere's, which belong to its models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from container.engine.request import Grammar, SamplingParams
from container.text.schema import ANY_OBJECT
from sagemaker_entry.dialects.bounds import MIN_PROBABILITY, MIN_TEMPERATURE
from sagemaker_entry.dialects.cohere_frames import Frames
from sagemaker_entry.dialects.fields import Fields, check_strings, invalid_value, missing, unsupported
from sagemaker_entry.dialects.presenter import ParseOptions
from sagemaker_entry.dialects.response_format import schema_grammar
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest, ModelLimits

MAX_TEMPERATURE: Final = 5.0
MAX_K: Final = 500
MAX_PENALTY: Final = 1.0
MAX_SEED: Final = 2**63 - 1
SAFETY_MODES: Final = ("CONTEXTUAL", "STRICT", "OFF", "NONE")
SAFETY_WARNING: Final = "`safety_mode` adds no preamble here: what the model refuses is its own doing"


def read_sampling(fields: Fields, limits: ModelLimits, *, top_logprobs: int | None = None) -> SamplingParams:
    """Take the sampling fields; `k` 0 turns it off. Raises ApiError."""
    base = limits.default_sampling
    temperature = fields.number("temperature", low=0, high=MAX_TEMPERATURE)
    if temperature is not None and 0 < temperature < MIN_TEMPERATURE:
        raise invalid_value("temperature", f"0 or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
    k = fields.integer("k", low=0, high=MAX_K)
    p = fields.number("p", low=MIN_PROBABILITY, high=1)
    frequency = fields.number("frequency_penalty", low=0, high=MAX_PENALTY)
    presence = fields.number("presence_penalty", low=0, high=MAX_PENALTY)
    return SamplingParams(
        temperature=base.temperature if temperature is None else temperature,
        top_k=base.top_k if k is None else k,
        top_p=base.top_p if p is None else p,
        min_p=base.min_p,
        typical_p=base.typical_p,
        repetition_penalty=base.repetition_penalty,
        frequency_penalty=base.frequency_penalty if frequency is None else frequency,
        presence_penalty=base.presence_penalty if presence is None else presence,
        logit_bias=base.logit_bias,
        top_logprobs=top_logprobs,
    )


def read_max_tokens(fields: Fields, limits: ModelLimits) -> int | None:
    return fields.integer("max_tokens", low=1, high=limits.sequence_tokens)


def read_seed(fields: Fields) -> int | None:
    return fields.integer("seed", low=0, high=MAX_SEED)


def read_stops(fields: Fields, name: str, limits: ModelLimits) -> tuple[str, ...]:
    """Take a list of strings that end the answer."""
    items = fields.items(name, high=limits.max_stop_strings)
    return () if items is None else check_strings(name, items, limits.max_stop_chars)


def read_format(fields: Fields, schema_field: str) -> Grammar | None:
    """Take `response_format`, whose schema is in `schema_field`; None for plain text."""
    wanted = fields.nested("response_format")
    if wanted is None:
        return None
    kind = wanted.choice("type", ("text", "json_object"))
    if kind is None:
        raise missing("response_format.type")
    schema = wanted.mapping(schema_field)
    wanted.finish()
    name = f"response_format.{schema_field}"
    if kind == "text":
        if schema is not None:
            raise invalid_value(name, "used with the type `json_object`")
        return None
    return schema_grammar(ANY_OBJECT if schema is None else schema, name, closed=False)


def in_format(request: GenerationRequest, grammar: Grammar | None, *, with_tools: bool) -> GenerationRequest:
    """Return `request` held to the grammar of its `response_format`; raises ApiError beside tools."""
    if grammar is None:
        return request
    if with_tools:
        rule = "`response_format` cannot be combined with `tools`"
        raise ApiError(Code.INVALID_REQUEST, param="response_format", rule=rule)
    return request.following(grammar)


def read_safety(fields: Fields) -> tuple[str, ...]:
    """Take `safety_mode`; return what the reply must say about it."""
    mode = fields.choice("safety_mode", SAFETY_MODES)
    return (SAFETY_WARNING,) if mode in ("CONTEXTUAL", "STRICT") else ()


def read_frames(fields: Fields, options: ParseOptions) -> Frames | None:
    """Return how to write a v1 stream, None for a whole answer.

    One of Cohere's clients says `stream`; the other leaves it out and calls the platform's stream operation,
    which the platform tells of in a header. The second reads objects wrapped as the platform wraps them.
    """
    stream = fields.boolean("stream")
    if stream is None:
        return Frames.WRAPPED if options.forwarded_stream else None
    return Frames.BARE if stream else None


def refuse_unless(fields: Fields, name: str, harmless: Iterable[object]) -> None:
    """Refuse a field by name, unless its value asks for nothing."""
    value = fields.value(name)
    if value is None:
        return
    if not any(type(value) is type(each) and value == each for each in harmless):
        raise unsupported(name)
