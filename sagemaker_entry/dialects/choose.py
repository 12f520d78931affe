"""Which dialect a request speaks, from its route and, on /invocations, from the keys of its body.

Owns: routes, dialects and the table of shapes. Must not know: what any field means.
Invariant: the first row that matches decides; a body no row matches is refused, never guessed.

    row  keys present                             dialect
    1    requestType                              session control: refused, sessions are off
    2    inputs                                   TGI
    3    message (a string)                       Cohere v1 chat
    4    query and documents                      Cohere rerank: known, to be refused in its own words
    5    texts or images                          Cohere embed (with model_id: classify), likewise
    6    messages                                 OpenAI chat; Cohere v2 chat by a key only Cohere has
    7    prompt                                   OpenAI completion; Cohere generate likewise

A Cohere client strips what would tell its plainest v2 chat and generate bodies from OpenAI's. The setting
`cohere` reads rows 6 and 7 as Cohere's throughout.
"""

from __future__ import annotations

import enum
from typing import Any, Final, Literal

from sagemaker_entry.errors import ApiError, Code

DialectSetting = Literal["auto", "openai", "tgi", "cohere"]


class Dialect(enum.StrEnum):
    """Whose request and reply shapes apply."""

    OPENAI_CHAT = "openai_chat"
    OPENAI_COMPLETION = "openai_completion"
    TGI = "tgi"
    COHERE = "cohere"


class Route(enum.StrEnum):
    """Paths that take a generation body; the `/openai/v1/...` aliases map onto the `/v1/...` members."""

    INVOCATIONS = "/invocations"
    ROOT = "/"
    GENERATE = "/generate"
    GENERATE_STREAM = "/generate_stream"
    TOKENIZE = "/tokenize"
    CHAT_TOKENIZE = "/chat_tokenize"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


# Path -> the template it is counted and logged as, and parsed as.
GENERATING: Final = {
    "/invocations": Route.INVOCATIONS,
    "/": Route.ROOT,
    "/generate": Route.GENERATE,
    "/generate_stream": Route.GENERATE_STREAM,
    "/v1/chat/completions": Route.CHAT,
    "/v1/completions": Route.COMPLETIONS,
    "/openai/v1/chat/completions": Route.CHAT,
    "/openai/v1/completions": Route.COMPLETIONS,
}
_ROUTE_DIALECT: Final = {
    Route.ROOT: Dialect.TGI,
    Route.GENERATE: Dialect.TGI,
    Route.GENERATE_STREAM: Dialect.TGI,
    Route.TOKENIZE: Dialect.TGI,
    Route.CHAT_TOKENIZE: Dialect.OPENAI_CHAT,
    Route.CHAT: Dialect.OPENAI_CHAT,
    Route.COMPLETIONS: Dialect.OPENAI_COMPLETION,
}
_COHERE_CHAT_KEYS: Final = frozenset(
    {"k", "p", "stop_sequences", "citation_options", "safety_mode", "strict_tools", "thinking"}
)
_COHERE_GENERATE_KEYS: Final = frozenset(
    {
        "k",
        "p",
        "num_generations",
        "stop_sequences",
        "end_sequences",
        "return_likelihoods",
        "truncate",
        "preset",
        "raw_prompting",
    }
)


def error_dialect(route: Route | None, setting: DialectSetting = "auto") -> Dialect:
    """Return the dialect of an error raised before a body was understood."""
    if route is Route.CHAT_TOKENIZE or (route is Route.INVOCATIONS and setting == "tgi"):
        return Dialect.TGI
    if route is Route.INVOCATIONS and setting == "cohere":
        return Dialect.COHERE
    return _ROUTE_DIALECT.get(route, Dialect.OPENAI_CHAT) if route is not None else Dialect.OPENAI_CHAT


def choose(route: Route, body: Any, setting: DialectSetting = "auto") -> Dialect:
    """Return the dialect that parses `body` on `route`.

    Raises ApiError: UNKNOWN_SHAPE when no row matches, SESSIONS_OFF for session control.
    """
    if not isinstance(body, dict):
        raise ApiError(Code.UNKNOWN_SHAPE)
    if route is not Route.INVOCATIONS:
        return _ROUTE_DIALECT[route]
    if "requestType" in body:
        raise ApiError(Code.SESSIONS_OFF)
    if setting == "tgi":
        return Dialect.TGI
    if setting == "cohere":
        return Dialect.COHERE
    if setting == "auto" and "inputs" in body:
        return Dialect.TGI
    if setting == "auto" and cohere_shape(body) is not None:
        return Dialect.COHERE
    if "messages" in body:
        return Dialect.OPENAI_CHAT
    if "prompt" in body:
        return Dialect.OPENAI_COMPLETION
    raise ApiError(Code.UNKNOWN_SHAPE)


def cohere_shape(body: dict[str, Any]) -> str | None:
    """Return what a Cohere client calls this body, or None where it is not one of theirs."""
    keys = body.keys()
    if isinstance(body.get("message"), str):
        return "Cohere chat"
    if "query" in keys and "documents" in keys:
        return "Cohere rerank"
    if "texts" in keys or "images" in keys:
        return "Cohere classify" if "model_id" in keys else "Cohere embed"
    if "messages" in keys:
        upper = body.get("tool_choice") in ("REQUIRED", "NONE")
        return "Cohere v2 chat" if upper or keys & _COHERE_CHAT_KEYS else None
    if "prompt" in keys and keys & _COHERE_GENERATE_KEYS:
        return "Cohere generate"
    return None
