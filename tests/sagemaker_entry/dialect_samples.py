"""Bodies, limits and events the dialect tests share, and the one way they all parse: from bytes.

Owns: samples. Must not know: expectations. Nothing here is collected as a test.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagemaker_entry import strict_json
from sagemaker_entry.dialects.choose import Route, choose
from sagemaker_entry.dialects.parse import parse
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions, Presenter
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    EndReason,
    Event,
    GenerationRequest,
    GenerationResult,
    ModelLimits,
    PromptInfo,
    ReplyContext,
    TextDelta,
    TokenPiece,
)

LIMITS = ModelLimits(model="smol", sequence_tokens=2048, input_tokens=2000, vocabulary=1000)
OPTIONS = ParseOptions(limits=LIMITS)
CONTEXT = ReplyContext(id="reply-1", created_s=1_700_000_000, model="smol", special_token_ids=frozenset({2}))

TGI_BODY: dict[str, Any] = {
    "inputs": "What is the capital of France?",
    "parameters": {
        "do_sample": True,
        "max_new_tokens": 20,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "return_full_text": False,
        "stop": ["\n\n"],
        "seed": 7,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "truncate": 100,
        "typical_p": 0.95,
        "best_of": None,
        "watermark": False,
        "details": True,
        "decoder_input_details": False,
        "top_n_tokens": 2,
        "grammar": None,
    },
    "stream": True,
}
CHAT_BODY: dict[str, Any] = {
    "model": "smol",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Name a colour."},
    ],
    "max_tokens": 16,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "seed": 3,
    "stop": ["x", "yz"],
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "logit_bias": {"5": -3, "7": 1.5},
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"enable_thinking": False},
    "user": "someone",
}
COMPLETION_BODY: dict[str, Any] = {
    "model": "smol",
    "prompt": ["one", "two"],
    "max_tokens": 4,
    "temperature": 0,
    "n": 1,
    "best_of": 2,
    "logprobs": 1,
    "echo": True,
    "stop": "!",
    "seed": 1,
    "min_p": 0.1,
    "top_k": 5,
}


def parse_bytes(route: Route, body: bytes, options: ParseOptions = OPTIONS) -> Parsed:
    value = strict_json.loads(body)
    return parse(choose(route, value), route, value, options)


def parsed(route: Route, body: Any, options: ParseOptions = OPTIONS) -> Parsed:
    return parse_bytes(route, json.dumps(body).encode(), options)


def requested(route: Route, body: Any, options: ParseOptions = OPTIONS) -> GenerationRequest:
    return parsed(route, body, options).request


def refused(route: Route, body: Any, options: ParseOptions = OPTIONS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(route, body, options)
    return caught.value


def chat(**fields: Any) -> dict[str, Any]:
    """A minimal chat body with `fields` on top."""
    return {"messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", **fields}


def tgi(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": parameters}


def piece(token: int, text: str, logprob: float | None = -0.5, **more: Any) -> TokenPiece:
    return TokenPiece(id=token, text=text, logprob=logprob, **more)


def events(
    texts: list[str],
    *,
    prompt: int = 0,
    choice: int = 0,
    reason: EndReason = EndReason.EOS,
    with_info: bool = True,
) -> list[Event]:
    """The events of one choice, one piece per text, token ids from 10."""
    made: list[Event] = []
    if with_info:
        made.append(PromptInfo(prompt=prompt, prompt_tokens=5, cached_tokens=2))
    for number, text in enumerate(texts):
        made.append(
            TextDelta(prompt=prompt, choice=choice, text=text, pieces=(piece(10 + number, text),)),
        )
    made.append(
        ChoiceEnd(prompt=prompt, choice=choice, reason=reason, completion_tokens=len(texts), seed=99),
    )
    return made


def result(texts: list[str], **more: Any) -> GenerationResult:
    """A whole answer of one prompt, one choice per text."""
    choices = tuple(
        Choice(
            prompt=0,
            choice=number,
            text=text,
            pieces=(piece(10, text),),
            reason=EndReason.EOS,
            completion_tokens=1,
            seed=99,
        )
        for number, text in enumerate(texts)
    )
    infos = (PromptInfo(prompt=0, prompt_tokens=5, cached_tokens=2),)
    return GenerationResult(prompts=infos, choices=choices, **more)


def stream(presenter: Presenter, made: list[Event]) -> list[bytes]:
    """Every SSE event of a stream that goes well."""
    sent = presenter.open(CONTEXT)
    for event in made:
        sent.extend(presenter.event(event))
    sent.extend(presenter.close())
    return sent


def payloads(sent: list[bytes]) -> list[Any]:
    """The JSON of each event, [DONE] left out; each must be one whole event."""
    values = []
    for event in sent:
        assert event.startswith(b"data:") and event.endswith(b"\n\n") and event.count(b"\n") == 2
        data = event[5:].strip()
        if data != b"[DONE]":
            values.append(json.loads(data))
    return values
