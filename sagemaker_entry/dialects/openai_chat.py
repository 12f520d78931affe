"""OpenAI's chat request to a generation request, with the vLLM extensions worth having.

Owns: fields of /v1/chat/completions. Must not know: how the reply looks, templates.
Invariant: a field is honoured, listed as asking nothing, or refused by name; `chat_template` is never read.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from sagemaker_entry.dialects.fields import Fields, invalid_type, invalid_value
from sagemaker_entry.dialects.openai_chat_reply import ChatPresenter
from sagemaker_entry.dialects.openai_fields import read_sampling, read_shared
from sagemaker_entry.dialects.openai_messages import read_messages
from sagemaker_entry.dialects.openai_tool_reply import ToolChatPresenter
from sagemaker_entry.dialects.openai_tools import ToolUse, read_tools
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions
from sagemaker_entry.dialects.response_format import check_combination, read_response_format
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ChatPrompt, GenerationRequest, ModelLimits

UNSUPPORTED: Final = (
    "audio",
    "prediction",
    "web_search_options",
    "moderation",
    "functions",
    "function_call",
    "structured_outputs",
)
REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh")
MAX_TEMPLATE_KWARGS: Final = 32
# What the renderer itself passes to the template, and what would turn data into a template.
RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "conversation",
        "chat_template",
        "tokenize",
        "tokenizer",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "raise_exception",
        "strftime_now",
        "namespace",
        "self",
        "kwargs",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
    }
)
_KWARG_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_KWARG_TEXT: Final = re.compile(r"[A-Za-z0-9 _.,:+-]{0,64}")  # cannot spell a control token or a template


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    limits = options.limits
    fields.refuse(UNSUPPORTED)
    _refuse_modalities(fields)
    tools = read_tools(fields, options)
    grammar = read_response_format(fields)
    max_tokens = _max_tokens(fields, limits)
    shared = read_shared(fields, limits, max_tokens)
    top_logprobs = _top_logprobs(fields, limits)
    request = GenerationRequest(
        prompts=(_prompt(fields, options, tools),),
        sampling=dataclasses.replace(
            read_sampling(fields, limits, top_logprobs=top_logprobs), grammar=grammar
        ),
        seed=shared.seed,
        model=shared.model,
        max_tokens=max_tokens,
        min_tokens=shared.min_tokens,
        choices=shared.choices,
        best_of=shared.choices,
        stop=shared.stop,
        include_stop=shared.include_stop,
        stop_token_ids=shared.stop_token_ids,
        ignore_eos=shared.ignore_eos,
        skip_special_tokens=shared.skip_special_tokens,
        cache_salt=shared.cache_salt,
        stream=shared.stream,
    )
    fields.finish()
    check_combination(request)
    wording: dict[str, Any] = {
        "choices": shared.choices,
        "logprobs": top_logprobs is not None,
        "include_usage": shared.include_usage,
    }
    if tools is None:
        return Parsed(request, ChatPresenter(**wording))
    return Parsed(tools.hold(request), ToolChatPresenter(**wording, tools=tools))


def _prompt(fields: Fields, options: ParseOptions, tools: ToolUse | None) -> ChatPrompt:
    messages = read_messages(fields, options)
    continues = bool(fields.boolean("continue_final_message"))
    adds = fields.boolean("add_generation_prompt")
    if continues and adds:
        raise ApiError(
            Code.INVALID_REQUEST,
            param="continue_final_message",
            rule="`continue_final_message` and `add_generation_prompt` cannot both be true",
        )
    if continues and (messages[-1]["role"] != "assistant" or not messages[-1]["content"]):
        raise invalid_value("continue_final_message", "used with a last message of `assistant` that has text")
    return ChatPrompt(
        messages=messages,
        tools=() if tools is None else tools.shown,
        add_generation_prompt=not continues if adds is None else adds,
        continue_final_message=continues,
        template_kwargs=_template_kwargs(fields),
    )


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    """Return flat, plain values for the template; `reasoning_effort` is one of them."""
    given = fields.mapping("chat_template_kwargs") or {}
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise invalid_value("chat_template_kwargs", f"an object of at most {MAX_TEMPLATE_KWARGS} keys")
    for name, value in given.items():
        if not _KWARG_NAME.fullmatch(name) or name in RESERVED_TEMPLATE_KWARGS:
            raise invalid_value("chat_template_kwargs", "keyed by names the template alone defines")
        if not isinstance(value, (bool, int, float, str)):
            raise invalid_type("chat_template_kwargs", "an object of strings, numbers and booleans")
        if isinstance(value, str) and not _KWARG_TEXT.fullmatch(value):
            raise invalid_value("chat_template_kwargs", "made of plain words of at most 64 characters")
    effort = fields.choice("reasoning_effort", REASONING_EFFORTS)
    return dict(given) if effort is None else {**given, "reasoning_effort": effort}


def _max_tokens(fields: Fields, limits: ModelLimits) -> int | None:
    older = fields.integer("max_tokens", low=1, high=limits.sequence_tokens)
    newer = fields.integer("max_completion_tokens", low=1, high=limits.sequence_tokens)
    return older if newer is None else newer


def _top_logprobs(fields: Fields, limits: ModelLimits) -> int | None:
    wanted = bool(fields.boolean("logprobs"))
    top = fields.integer("top_logprobs", low=0, high=limits.max_top_logprobs)
    if top and not wanted:
        raise ApiError(
            Code.INVALID_REQUEST, param="top_logprobs", rule="`top_logprobs` needs `logprobs` to be true"
        )
    return (top or 0) if wanted else None


def _refuse_modalities(fields: Fields) -> None:
    modalities = fields.items("modalities", high=8)
    if modalities is not None and modalities != ["text"]:
        raise invalid_value("modalities", "a list of `text` alone")
