"""Bodies as Cohere's clients send them, and ways to read what comes back.

The bodies are those of `cohere` 7.3.1 (`SagemakerClient`, which strips `model` and `stream`) and of
`cohere-aws` 0.8.18 (`Client`, which keeps `stream`). Nothing here is collected as a test.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.dialects.presenter import ParseOptions
from sagemaker_entry.errors import ApiError
from sagemaker_entry.generation import ChatPrompt, GenerationRequest
from tests.sagemaker_entry.dialect_samples import OPTIONS, refused, requested

STREAMED = dataclasses.replace(OPTIONS, forwarded_stream=True)

CHAT: dict[str, Any] = {
    "message": "And of Italy?",
    "preamble": "Be brief.",
    "chat_history": [
        {"role": "USER", "message": "What is the capital of France?"},
        {"role": "CHATBOT", "message": "Paris."},
    ],
    "temperature": 0.5,
    "max_tokens": 20,
    "k": 40,
    "p": 0.9,
    "seed": 7,
    "stop_sequences": ["\n\n"],
    "frequency_penalty": 0.25,
    "presence_penalty": 0.5,
}
GENERATE: dict[str, Any] = {
    "prompt": "The capital of France is",
    "num_generations": 2,
    "max_tokens": 8,
    "temperature": 0.75,
    "k": 0,
    "p": 0.75,
    "stop_sequences": ["."],
    "return_likelihoods": "GENERATION",
}
# cohere-aws fills in its own defaults and says `stream`
AWS_GENERATE: dict[str, Any] = {
    "prompt": "The capital of France is",
    "max_tokens": 400,
    "temperature": 1.0,
    "k": 0,
    "p": 0.75,
    "stream": True,
    "num_generations": 1,
}
CHAT_V2: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    ],
    "max_tokens": 20,
    "stop_sequences": ["\n\n"],
    "temperature": 0.5,
    "seed": 7,
    "k": 40,
    "p": 0.9,
    "safety_mode": "OFF",
}
LOOK_V1 = {
    "name": "look",
    "description": "Looks at a place.",
    "parameter_definitions": {
        "place": {"type": "str", "description": "where", "required": True},
        "times": {"type": "List[int]"},
    },
}
LOOK_V2 = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def request_of(body: dict[str, Any], options: ParseOptions = OPTIONS) -> GenerationRequest:
    return requested(Route.INVOCATIONS, body, options)


def refusal_of(body: dict[str, Any], options: ParseOptions = OPTIONS) -> ApiError:
    return refused(Route.INVOCATIONS, body, options)


def chat_prompt(body: dict[str, Any], options: ParseOptions = OPTIONS) -> ChatPrompt:
    (prompt,) = request_of(body, options).prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt


def unwrapped(piece: bytes) -> dict[str, Any]:
    """Return the object in one piece of a wrapped stream."""
    assert piece.endswith(b"\n") and piece.count(b"\n") == 1
    outer = json.loads(piece)
    assert list(outer) == ["bytes"]
    inner: dict[str, Any] = json.loads(base64.b64decode(outer["bytes"]))
    return inner


def bare(piece: bytes) -> dict[str, Any]:
    """Return the object that is one piece of a bare stream."""
    assert piece.endswith(b"\n") and piece.count(b"\n") == 1
    found: dict[str, Any] = json.loads(piece)
    return found
