"""Cohere's bodies to a generation request: which of its calls a body is.

Owns: the dispatch among them, the calls that are known and not served. Must not know: any field's meaning.
Invariant: embed, rerank and classify are refused by name; the model behind this door generates text.
"""

from __future__ import annotations

from typing import Any

from sagemaker_entry.dialects import cohere_chat, cohere_chat_v2, cohere_generate
from sagemaker_entry.dialects.choose import cohere_shape
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions
from sagemaker_entry.errors import ApiError, Code


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    if "message" in body:
        return cohere_chat.parse(body, options)
    shape = cohere_shape(body)
    if shape in ("Cohere rerank", "Cohere embed", "Cohere classify"):
        raise ApiError(Code.UNSUPPORTED_SHAPE, shape=shape)
    if "messages" in body:
        return cohere_chat_v2.parse(body, options)
    if "prompt" in body:
        return cohere_generate.parse(body, options)
    raise ApiError(Code.UNKNOWN_SHAPE)
