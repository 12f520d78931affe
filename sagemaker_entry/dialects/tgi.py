"""TGI's generate body to a generation request, with its traps and its words.

Owns: fields, defaults and validation texts of text-generation-inference. Must not know: how the reply looks.
Invariant: every accepted field is honoured; texts are TGI's where TGI has the rule, status 422 by presenter.

Traps kept: no `parameters` means sampling, `parameters: {}` means greedy; any of temperature != 1, top_k,
top_p < 1, typical_p < 1 means sampling whatever `do_sample` says; a matched stop string stays in the text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from container.engine.request import SamplingParams
from sagemaker_entry.dialects.bounds import (
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_PROBABILITY,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    check_prompt_bytes,
    utf8_bytes,
)
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.dialects.fields import Fields, check_strings, invalid_type, invalid_value, unsupported
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions
from sagemaker_entry.dialects.response_format import check_combination, read_grammar
from sagemaker_entry.dialects.tgi_reply import TgiPresenter
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest, ModelLimits, TextPrompt

MAX_SEED: Final = 2**64 - 1
_PIPELINE_ROUTES: Final = frozenset({Route.ROOT, Route.INVOCATIONS})  # list reply, full text by default


@dataclass(frozen=True, slots=True)
class _Parameters:
    """`parameters`, read and checked one by one."""

    sampling: SamplingParams
    seed: int | None
    max_tokens: int | None
    best_of: int
    stop: tuple[str, ...]
    truncate: int | None
    details: bool
    prefill: bool
    top_tokens: int
    return_full_text: bool | None


def parse(route: Route, body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    inputs = fields.text("inputs")
    given = fields.mapping("parameters")
    stream = bool(fields.boolean("stream")) or route is Route.GENERATE_STREAM
    fields.finish()
    if inputs is None:
        raise ApiError(Code.MISSING_FIELD, param="inputs")
    read = _parameters(
        Fields(given or {}, options.unknown_fields), options, sample_always=given is None, stream=stream
    )
    if not inputs:
        raise _rule("inputs", "`inputs` cannot be empty")
    check_prompt_bytes(utf8_bytes(inputs), options.limits)
    full_text = read.return_full_text
    if full_text is None:
        full_text = options.full_text_by_default and route in _PIPELINE_ROUTES
    request = GenerationRequest(
        prompts=(TextPrompt(inputs),),
        sampling=read.sampling,
        seed=read.seed,
        max_tokens=read.max_tokens,
        best_of=read.best_of,
        stop=read.stop,
        include_stop=True,
        truncate_tokens=read.truncate,
        stream=stream,
        prompt_pieces=read.prefill,
        grammar_field="grammar",
    )
    check_combination(request)
    presenter = TgiPresenter(
        prompt=inputs if full_text else "",
        listed=route in _PIPELINE_ROUTES,
        details=read.details,
        prefill=read.prefill,
        top_tokens=read.top_tokens > 0,
        max_tokens=read.max_tokens,
    )
    return Parsed(request, presenter)


def _parameters(fields: Fields, options: ParseOptions, *, sample_always: bool, stream: bool) -> _Parameters:
    limits = options.limits
    _refuse_unserved(fields)
    do_sample = bool(fields.boolean("do_sample")) or sample_always
    best_of = _best_of(fields, limits, do_sample=do_sample, stream=stream)
    prefill = bool(fields.boolean("decoder_input_details"))
    details = bool(fields.boolean("details")) or prefill
    if prefill and stream:
        raise _rule(
            "decoder_input_details",
            "`decoder_input_details` == true is not supported when streaming tokens",
        )
    top_tokens = _top_tokens(fields, limits)
    reports_logprobs = details or stream or best_of > 1
    seed = fields.integer("seed", low=0, high=MAX_SEED)
    if seed is not None and best_of > 1:
        raise _rule("seed", "`seed` must not be set when `best_of` > 1")
    read = _Parameters(
        sampling=dataclasses.replace(
            _sampling(
                fields,
                do_sample=do_sample,
                top_logprobs=top_tokens if reports_logprobs else None,
                prompt_logprobs=0 if prefill else None,
            ),
            grammar=read_grammar(fields),
        ),
        seed=seed,
        max_tokens=_max_new_tokens(fields, limits),
        best_of=best_of,
        stop=_stop(fields, limits),
        truncate=_truncate(fields, limits),
        details=details,
        prefill=prefill,
        top_tokens=top_tokens,
        return_full_text=fields.boolean("return_full_text"),
    )
    fields.finish()
    return read


def _refuse_unserved(fields: Fields) -> None:
    if fields.boolean("watermark"):
        raise unsupported("watermark")
    fields.refuse(("adapter_id",))


def _sampling(
    fields: Fields, *, do_sample: bool, top_logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    temperature = _positive(fields, "temperature", MIN_TEMPERATURE, MAX_TEMPERATURE)
    repetition = _positive(fields, "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    frequency = fields.number("frequency_penalty")
    if frequency is not None and not -MAX_PENALTY <= frequency <= MAX_PENALTY:
        raise invalid_value("frequency_penalty", ">= -2.0 and <= 2.0")
    top_k = fields.integer("top_k")
    if top_k is not None and top_k <= 0:
        raise invalid_value("top_k", "strictly positive")
    if top_k is not None and top_k > MAX_TOP_K:
        raise invalid_value("top_k", f"<= {MAX_TOP_K}")
    top_p = _open_unit(fields, "top_p")
    typical_p = _open_unit(fields, "typical_p")
    reshaped = temperature not in (None, 1.0) or top_k is not None or top_p is not None
    samples = do_sample or reshaped or typical_p is not None
    return SamplingParams(
        temperature=(temperature or 1.0) if samples else 0.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        typical_p=1.0 if typical_p is None else typical_p,
        repetition_penalty=1.0 if repetition is None else repetition,
        frequency_penalty=frequency or 0.0,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _positive(fields: Fields, name: str, low: float, high: float) -> float | None:
    value = fields.number(name)
    if value is None:
        return None
    if value <= 0:
        raise invalid_value(name, "strictly positive")
    if not low <= value <= high:
        raise invalid_value(name, f">= {low:g} and <= {high:g}")
    return value


def _open_unit(fields: Fields, name: str) -> float | None:
    value = fields.number(name)
    if value is not None and not MIN_PROBABILITY <= value < 1.0:
        raise invalid_value(name, "> 0.0 and < 1.0")
    return value


def _best_of(fields: Fields, limits: ModelLimits, *, do_sample: bool, stream: bool) -> int:
    best_of = fields.integer("best_of")
    if best_of is None:
        return 1
    if best_of > 1 and limits.max_best_of == 1:
        raise _rule("best_of", "`best_of` != 1 is not allowed for this endpoint")
    if not 0 < best_of <= limits.max_best_of:
        raise invalid_value("best_of", f"> 0 and <= {limits.max_best_of}. Given: {best_of}")
    if best_of > 1:
        reshaping = ("temperature", "top_k", "top_p", "typical_p")
        if not do_sample and all(fields.value(name) is None for name in reshaping):
            raise _rule("best_of", "you must use sampling when `best_of` is > 1")
        if stream:
            raise _rule("best_of", "`best_of` != 1 is not supported when streaming tokens")
    return best_of


def _top_tokens(fields: Fields, limits: ModelLimits) -> int:
    top = fields.integer("top_n_tokens")
    if top is None:
        return 0
    if top != 0 and limits.max_top_tokens == 0:
        raise _rule("top_n_tokens", "`top_n_tokens` != 0 is not allowed for this endpoint")
    if not 0 <= top <= limits.max_top_tokens:
        raise invalid_value("top_n_tokens", f">= 0 and <= {limits.max_top_tokens}. Given: {top}")
    return top


def _max_new_tokens(fields: Fields, limits: ModelLimits) -> int | None:
    tokens = fields.integer("max_new_tokens")
    if tokens is not None and tokens <= 0:
        raise invalid_value("max_new_tokens", "strictly positive")
    if tokens is not None and tokens > limits.sequence_tokens:
        raise invalid_value("max_new_tokens", f"<= {limits.sequence_tokens}. Given: {tokens}")
    return tokens


def _stop(fields: Fields, limits: ModelLimits) -> tuple[str, ...]:
    items = fields.value("stop")
    if items is None:
        return ()
    if not isinstance(items, list):
        raise invalid_type("stop", "a list of strings")
    most = limits.max_tgi_stop_strings
    if len(items) > most:
        raise _rule("stop", f"`stop` supports up to {most} stop sequences. Given: {len(items)}")
    return check_strings("stop", items, limits.max_stop_chars)


def _truncate(fields: Fields, limits: ModelLimits) -> int | None:
    tokens = fields.integer("truncate")
    if tokens is not None and not 0 < tokens <= limits.input_tokens:
        raise invalid_value(
            "truncate", f"strictly positive and less than {limits.input_tokens}. Given: {tokens}"
        )
    return tokens


def _rule(param: str, rule: str) -> ApiError:
    """Return the error for a rule TGI words as a whole sentence."""
    return ApiError(Code.INVALID_REQUEST, param=param, rule=rule)
