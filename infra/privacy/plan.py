"""What is asked: mixed calls in a fixed order, some of which carry a canary that must be found nowhere later.

Owns: the kinds of calls, where in each a canary stands, what may be answered.
Must not know: how calls are sent, where canaries are looked for.
Invariant: every canary stands in one call; plans of one size differ in their canaries alone, which are new in
every run, so that what an earlier run left cannot be found.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MARK_HEX_CHARS: Final = 12
DIGITS: Final = 4
MAX_CALLS: Final = 10**DIGITS
JSON: Final = {"Content-Type": "application/json"}
PLAIN: Final = "harbour"  # what stands where another call has its canary
ANSWERED: Final = frozenset({200})
REFUSED: Final = frozenset({400, 401, 404, 405, 411, 413, 415, 422})
EITHER: Final = ANSWERED | REFUSED
INVOKE: Final = "/invocations"
NAMED, HEADERS = "unknown field", "headers"
# Whose own caller reads the canary again, in an error too: a field's name, attributes that are passed on.
ECHOED: Final = frozenset({NAMED, HEADERS})


@dataclass(frozen=True, slots=True)
class Call:
    """One request; `canary` is None where it carries none. `leave`: the caller goes before the answer."""

    kind: str
    method: str
    path: str
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    expected: frozenset[int]
    canary: str | None
    leave: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls, and `mark`: what every canary begins with."""

    mark: str
    calls: tuple[Call, ...]

    @property
    def canaries(self) -> tuple[str, ...]:
        return tuple(call.canary for call in self.calls if call.canary is not None)


def make(calls: int, canaries: int) -> Plan:
    """Return a plan in which `canaries` of `calls` calls carry one, spread evenly over every kind."""
    if not 0 < canaries <= calls <= MAX_CALLS:
        raise ValueError(f"a plan has 1 to {MAX_CALLS} calls, and at most as many canaries")
    mark = f"zq{secrets.token_hex(MARK_HEX_CHARS // 2)}"
    kinds = list(KINDS)
    made: list[Call] = []
    carried = 0
    for number in range(calls):
        # whole rounds through the kinds, and within them as many canaries as the share asks for
        canary = None
        if (number + 1) * canaries // calls > carried:
            canary = f"{mark}{carried:0{DIGITS}d}"
            carried += 1
        kind = kinds[number % len(kinds)]
        method, path, body, headers, expected, leave = KINDS[kind](canary or PLAIN)
        made.append(Call(kind, method, path, body, headers, expected, canary, leave))
    return Plan(mark, tuple(made))


Made = tuple[str, str, bytes, Mapping[str, str], frozenset[int], bool]


def _post(
    body: Any,
    path: str = INVOKE,
    expected: frozenset[int] = ANSWERED,
    headers: Mapping[str, str] = JSON,
    *,
    leave: bool = False,
) -> Made:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "POST", path, data, headers, expected, leave


def _chat(word: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Say the word {word} once."}]
    return {"messages": messages, "max_tokens": 4, "temperature": 0, **fields}


def _system(word: str) -> Made:
    messages = [
        {"role": "system", "content": f"Your secret is {word}."},
        {"role": "user", "content": "Good morning."},
    ]
    return _post(_chat(word, messages=messages))


def _tools(word: str) -> Made:
    schema = {"type": "object", "properties": {word: {"type": "string", "description": word}}}
    tool = {"type": "function", "function": {"name": f"f_{word}", "description": word, "parameters": schema}}
    return _post(_chat("hello", tools=[tool], tool_choice="none"), expected=EITHER)


def _headers(word: str) -> Made:
    told = {
        "X-Amzn-SageMaker-Inference-Id": word,
        "X-Amzn-SageMaker-Custom-Attributes": word,
        "Authorization": f"Bearer {word}",
        f"X-{word}": word,
    }
    return _post(_chat("hello"), expected=EITHER, headers={**JSON, **told})


def _lines(word: str) -> Made:
    lines = [json.dumps(_chat(word)), json.dumps({"inputs": word, "parameters": {"max_new_tokens": 2}})]
    headers = {"Content-Type": "application/jsonlines"}
    return _post("\n".join(lines).encode(), expected=EITHER, headers=headers)


KINDS: Final[Mapping[str, Callable[[str], Made]]] = {
    "chat": lambda word: _post(_chat(word)),
    "chat, streamed": lambda word: _post(_chat(word, stream=True)),
    "chat, by OpenAI's path": lambda word: _post(_chat(word), "/v1/chat/completions"),
    "system prompt": _system,
    "tool schema": _tools,
    "stop string": lambda word: _post(_chat(word, stop=[word])),
    "completion": lambda word: _post({"prompt": f"The {word} is", "max_tokens": 3, "temperature": 0}),
    "TGI": lambda word: _post({"inputs": word, "parameters": {"max_new_tokens": 3}}),
    "TGI, streamed": lambda word: _post(
        {"inputs": word, "parameters": {"max_new_tokens": 3}, "stream": True}
    ),
    "Cohere": lambda word: _post({"message": word, "max_tokens": 3}),
    "JSON lines": _lines,
    HEADERS: _headers,
    "adapter": lambda word: _post(
        {"inputs": "hi", "parameters": {"adapter_id": word, "max_new_tokens": 2}}, expected=EITHER
    ),
    "model name": lambda word: _post(_chat("hello", model=word), expected=EITHER),
    NAMED: lambda word: _post(_chat("hello", **{word: word}), expected=REFUSED),
    "wrong type": lambda word: _post(_chat("hello", temperature=word), expected=REFUSED),
    "no JSON": lambda word: _post(f'{{"inputs": "{word}'.encode(), expected=REFUSED),
    "other media type": lambda word: _post(
        word.encode(), expected=REFUSED, headers={"Content-Type": f"text/{word}"}
    ),
    "unknown route": lambda word: ("GET", f"/{word}", b"", {}, REFUSED, False),
    "health, asked with a query": lambda word: ("GET", f"/ping?{word}", b"", {}, EITHER, False),
    "metrics": lambda word: ("GET", f"/metrics?{word}", b"", {}, EITHER, False),
    "left during the stream": lambda word: _post(_chat(word, stream=True, max_tokens=64), leave=True),
    "left before the answer": lambda word: _post(_chat(word, max_tokens=64), leave=True),
}
