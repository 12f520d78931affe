"""Everything at once: mutated bodies raise nothing but ApiError, and no error tells what was sent."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.dialects.presenter import MAX_ERROR_BYTES, error_body, status_of
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest
from tests.sagemaker_entry.dialect_samples import (
    CHAT_BODY,
    COMPLETION_BODY,
    LIMITS,
    TGI_BODY,
    chat,
    parse_bytes,
    parsed,
    refused,
)

MUTATIONS = 20_000
CANARY = "xyzzy canary \u00e9"
TOOL_BODY = {
    "messages": [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "none",
}
VALID: list[tuple[Route, dict[str, Any]]] = [
    (Route.INVOCATIONS, TGI_BODY),
    (Route.GENERATE, {**TGI_BODY, "stream": False}),
    (Route.CHAT, CHAT_BODY),
    (Route.CHAT, TOOL_BODY),
    (Route.INVOCATIONS, CHAT_BODY),
    (Route.COMPLETIONS, COMPLETION_BODY),
    (Route.INVOCATIONS, {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 2}),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    -0.0,
    1e308,
    2**31,
    2**64 - 1,
    "",
    "none",
    "auto",
    "a\x00b",
    "\u2028",
    CANARY,
    [],
    [None],
    [[]],
    {},
    {"type": "text"},
    {"": 0},
]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"\xff",
    b"\x00",
    b"null",
    b"-",
    b"9" * 30,
    b'"inputs":',
    b'"messages":',
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def mutate_value(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Replace, drop, rename or wrap one to three values anywhere in the body."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        found = list(places(body))
        if not found:
            break
        container, key = rng.choice(found)
        kind = rng.randrange(4)
        if kind == 0:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 1:
            del container[key]
        elif kind == 2:
            container[key] = [container[key]]
        elif isinstance(container, dict):
            container[rng.choice([CANARY, f"{key}s", "__class__", "k", "suffix"])] = container.pop(key)
    return json.dumps(body).encode()


def mutate_bytes(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Cut, repeat or insert at one to four places of the encoded body."""
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            data[at : at + rng.randint(1, 8)] = b""
        elif kind == 1:
            data[at:at] = rng.choice(TOKENS)
        else:
            data[at:at] = data[at : at + rng.randint(1, 40)]
    return bytes(data)


def check_request(request: GenerationRequest) -> None:
    """What the engine relies on holds for every request that was accepted."""
    assert 1 <= len(request.prompts) <= LIMITS.max_prompts
    assert 1 <= request.choices <= request.best_of <= LIMITS.max_choices
    assert len(request.prompts) * request.best_of <= LIMITS.max_sequences
    assert request.max_tokens is None or 1 <= request.max_tokens <= LIMITS.sequence_tokens
    assert request.min_tokens <= (request.max_tokens or LIMITS.sequence_tokens)
    assert all(0 < len(stop) <= LIMITS.max_stop_chars for stop in request.stop)
    sampling = request.sampling
    assert sampling.temperature == 0 or 1e-8 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1 and 0 < sampling.typical_p <= 1 and 0 <= sampling.min_p <= 1
    assert 0 <= sampling.top_k < 2**31
    assert 0.01 <= sampling.repetition_penalty <= 100
    assert abs(sampling.frequency_penalty) <= 2 and abs(sampling.presence_penalty) <= 2
    assert all(0 <= token < LIMITS.vocabulary and abs(bias) <= 100 for token, bias in sampling.logit_bias)
    assert (sampling.top_logprobs or 0) <= 20 and (sampling.prompt_logprobs or 0) <= 20
    assert request.best_of == request.choices or sampling.top_logprobs is not None
    assert not (request.stream and request.best_of > request.choices)


@pytest.mark.parametrize(("route", "body"), VALID)
def test_the_unmutated_bodies_are_valid(route: Route, body: dict[str, Any]) -> None:
    check_request(parsed(route, body).request)


@pytest.mark.parametrize("mutate", [mutate_value, mutate_bytes])
def test_twenty_thousand_mutations_raise_nothing_but_api_errors(
    mutate: Callable[[random.Random, dict[str, Any]], bytes],
) -> None:
    rng = random.Random(43)
    outcomes = {"accepted": 0, "refused": 0}
    for number in range(MUTATIONS // 2):
        route, body = VALID[number % len(VALID)]
        data = mutate(rng, body)
        try:
            request = parse_bytes(route, data).request
        except ApiError as error:
            outcomes["refused"] += 1
            assert 400 <= error.status < 500
            assert CANARY not in error.message
            assert CANARY not in (error.param or "")
        else:
            outcomes["accepted"] += 1
            check_request(request)
    assert min(outcomes.values()) > 100  # the mutations are neither all harmless nor all fatal


def canary_values() -> list[Any]:
    return [CANARY, [CANARY], {CANARY: CANARY}, {"type": CANARY}, [[CANARY]], [{CANARY: 1}]]


@pytest.mark.parametrize(("route", "body"), VALID)
def test_no_error_tells_what_was_sent(route: Route, body: dict[str, Any]) -> None:
    failures = 0
    paths = [list(path) for path in key_paths(body)]
    for path in paths:
        for value in canary_values():
            changed = copy.deepcopy(body)
            target = changed
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
            try:
                parsed(route, changed)
            except ApiError as error:
                failures += 1
                for dialect in Dialect:
                    told, _ = error_body(dialect, error, "id")
                    assert len(told) <= MAX_ERROR_BYTES
                    assert b"xyzzy" not in told and b"canary" not in told
                assert "xyzzy" not in str(error) and "xyzzy" not in repr(error)
                assert error.__cause__ is None and "xyzzy" not in repr(error.__context__)
    assert failures > len(paths)


def key_paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*before, key)
        if isinstance(inner, (dict, list)):
            yield from key_paths(inner, (*before, key))


@pytest.mark.parametrize("name", [CANARY, "xyzzy\ncanary", "<xyzzy>", "x" * 65, "\u202exyzzy"])
@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS, Route.GENERATE])
def test_an_unknown_name_is_not_echoed_unless_plain(route: Route, name: str) -> None:
    base = {Route.CHAT: chat(), Route.COMPLETIONS: {"prompt": "x"}, Route.GENERATE: {"inputs": "x"}}
    error = refused(route, {**base[route], name: 1})
    assert error.code is Code.UNKNOWN_FIELD
    assert error.param == "(unprintable)"


@pytest.mark.parametrize(
    ("row", "body"),
    [
        ("A39", {"messages": [{"role": "user", "content": "x"}] * 20_000}),
        ("A39", {"messages": [{"role": "user", "content": ["x"] * 60_000}]}),
        ("A39", {"messages": [{"role": "x" * 10_000_000, "content": "x"}]}),
        ("A40", {}),
        ("A40", {"messages": []}),
        ("A40", {"messages": [{"role": "system", "content": "x"}]}),
        ("A40", {"prompt": ""}),
        ("A40", {"inputs": ""}),
        ("A44", {"inputs": [""] * 60_000}),
        ("A44", {"inputs": ["x", 1]}),
        ("A46", {"prompt": "x", "best_of": 10**9}),
        ("A47", {"inputs": "x", "parameters": {"max_new_tokens": 2**31}}),
        ("A52", {"inputs": "x", "parameters": {"top_n_tokens": 10**6}}),
        ("A54", {"inputs": "x", "parameters": {"stop": ["x"] * 10_000}}),
        ("A55", {"inputs": "x", "parameters": {"seed": -1}}),
        ("A60", {"inputs": "x", "prompt_embeds": "gASV"}),
        ("A61", {"inputs": "x", "parameters": {"kv_transfer_params": {}}}),
    ],
)
def test_rows_of_the_attack_list_are_refused_on_invocations(row: str, body: dict[str, Any]) -> None:
    error = refused(Route.INVOCATIONS, body)
    assert status_of(Dialect.OPENAI_CHAT, error) == 400
    assert status_of(Dialect.TGI, error) in (400, 422)


@pytest.mark.parametrize("body", [b"[]", b'""', b"1", b"null", b"true", b'[{"inputs":"x"}]'])
@pytest.mark.parametrize("route", list(Route))
def test_documents_that_are_no_objects_are_refused_on_every_route(route: Route, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_bytes(route, body)
    assert caught.value.status == 400
