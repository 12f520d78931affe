"""Attack rows A31 to A62 as a client sends them, through the whole front."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.sagemaker_entry.harness import Server

JSON = {"Content-Type": "application/json"}
CHAT, COMPLETION, TGI = "/v1/chat/completions", "/v1/completions", "/generate"
WINDOW, VOCABULARY = 4096, 260  # of the fake engine

Row = tuple[str, str, Any, set[int], str | None, str | None]


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 2} | fields


def tgi(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": {"max_new_tokens": 2} | parameters}


def with_value(name: str, literal: bytes) -> bytes:
    """Return a completion request in which `name` has `literal` as its value, as it stands."""
    return b'{"prompt": "hi", "max_tokens": 2, "' + name.encode() + b'": ' + literal + b"}"


def refused(row: str, path: str, body: Any, code: str, param: str | None = None, status: int = 400) -> Row:
    return row, path, body, {status}, code, param


def served(row: str, path: str, body: Any) -> Row:
    return row, path, body, {200}, None, None


NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty")
WORDS = ("max_tokens", "n", "seed", "top_k", "min_tokens", "logprobs", "best_of")

BODIES: list[Row] = [
    refused("A31 100,000 lists", COMPLETION, b"[" * 100_000, "too_deep"),
    refused("A31 2,000 objects", COMPLETION, b'{"a":' * 2000, "too_deep"),
    refused("A31 65 levels closed", COMPLETION, b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "too_deep"),
    *(
        refused(f"A32 {name} {value.decode()}", COMPLETION, with_value(name, value), "invalid_number")
        for name in NUMBERS
        for value in (b"NaN", b"-Infinity", b"1e999")
    ),
    refused("A33 5,000 digits", COMPLETION, with_value("seed", b"1" * 5000), "invalid_number"),
    refused("A33 2^63", COMPLETION, text(seed=2**63), "invalid_value", "seed"),
    refused("A33 2^65", COMPLETION, text(seed=2**65), "invalid_number"),
    refused("A33 1e400", COMPLETION, with_value("temperature", b"1e400"), "invalid_number"),
    served("A33 minus zero", COMPLETION, with_value("temperature", b"-0.0")),
    refused("A34 model twice", COMPLETION, with_value("max_tokens", b"3"), "duplicate_key"),
    refused("A34 messages twice", CHAT, b'{"messages":[],"messages":[]}', "duplicate_key"),
    refused("A35 lone surrogate", COMPLETION, b'{"prompt":"\\ud800"}', "lone_surrogate"),
    refused("A35 halves swapped", COMPLETION, b'{"prompt":"\\udc00\\ud800"}', "lone_surrogate"),
    served("A35 NUL", COMPLETION, b'{"prompt":"a\\u0000b","max_tokens":2}'),
    refused("A35 BOM", COMPLETION, b"\xef\xbb\xbf" + json.dumps(text()).encode(), "invalid_json"),
    refused("A35 UTF-16", COMPLETION, json.dumps(text()).encode("utf-16"), "invalid_utf8"),
    *(
        refused(f"A36 {name}", COMPLETION, b'{"prompt":"' + raw + b'"}', "invalid_utf8")
        for name, raw in (
            ("ff fe", b"\xff\xfe"),
            ("overlong", b"\xc0\x80"),
            ("truncated", b"\xe2\x82"),
            ("CESU-8", b"\xed\xa0\x80\xed\xb0\x80"),
        )
    ),
    *(
        refused(f"A37 {name} {value!r}", COMPLETION, text(**{name: value}), "invalid_type", name)
        for name in WORDS
        for value in ("1", True, 1.0, [1], {})
    ),
    refused("A37 list for prompt text", COMPLETION, text(prompt=[True]), "invalid_type", "prompt"),
    refused("A37 content", CHAT, {"messages": [{"role": "user", "content": 5}]}, "invalid_type"),
    refused("A37 tgi", TGI, tgi(max_new_tokens="2"), "", status=422),
    refused("A38 typo", CHAT, said(max_token=2), "unknown_field", "max_token"),
    refused("A38 __class__", CHAT, said(__class__={}), "unknown_field", "__class__"),
    refused("A38 constructor", COMPLETION, text(constructor=1), "unknown_field", "constructor"),
    refused("A38 10,000 keys", COMPLETION, {f"k{i}": 0 for i in range(10_000)}, "too_many_keys"),
    refused(
        "A39 100,000 messages",
        CHAT,
        said(messages=[{"role": "user", "content": "x"}] * 100_000),
        "too_many_values",
    ),
    refused(
        "A39 60,000 parts",
        CHAT,
        said(messages=[{"role": "user", "content": ["x"] * 60_000}]),
        "invalid_value",
    ),
    refused("A39 10 MB role", CHAT, said(messages=[{"role": "x" * 10**7, "content": "x"}]), "invalid_value"),
    *(
        refused(f"A40 {body!r}", "/invocations", body, "unknown_shape")
        for body in ({}, [], b'""', b"null", b"7")
    ),
    refused("A40 no prompt", COMPLETION, {"max_tokens": 1}, "missing_field", "prompt"),
    refused("A40 empty prompt", COMPLETION, text(prompt=""), "invalid_value", "prompt"),
    refused("A40 no messages", CHAT, said(messages=[]), "invalid_value", "messages"),
    refused("A40 only system", CHAT, said(messages=[{"role": "system", "content": "x"}]), "invalid_value"),
    refused("A40 tgi", TGI, {"inputs": ""}, "", status=422),
    *(
        refused(f"A41 {name}", COMPLETION, raw, "invalid_json")
        for name, raw in (
            ("two documents", b'{"prompt":"a"}\n{"prompt":"b"}'),
            ("trailing junk", b'{"prompt":"a"} x'),
            ("comment", b'{"prompt":"a" /* b */}'),
            ("single quotes", b"{'prompt':'a'}"),
            ("trailing comma", b'{"prompt":"a",}'),
            ("nothing", b" "),
        )
    ),
    refused("A42 200,000 keys", COMPLETION, {f"{i:08x}": 0 for i in range(200_000)}, "too_many_keys"),
    refused("A44 a million inputs", "/invocations", {"inputs": [""] * 10**6}, "too_many_values"),
    refused("A44 mixed batch", COMPLETION, text(prompt=["a", [1]]), "invalid_type", "prompt"),
]
PARAMETERS: list[Row] = [
    *(refused(f"A45 n {n}", CHAT, said(n=n), "invalid_value", "n") for n in (10**9, 0, -1, 17)),
    refused("A45 n 2.5", CHAT, said(n=2.5), "invalid_type", "n"),
    served("A45 n at its cap", COMPLETION, text(n=16)),
    refused("A46 best_of", COMPLETION, text(best_of=10**9), "invalid_value", "best_of"),
    refused("A46 best_of below n", COMPLETION, text(best_of=1, n=2), "invalid_value", "best_of"),
    *(
        refused(f"A47 {name} {value}", path, body(**{name: value}), "invalid_value", name)
        for path, body, name in ((CHAT, said, "max_tokens"), (COMPLETION, text, "max_tokens"))
        for value in (2**31, -1, 0, WINDOW + 1)
    ),
    refused("A47 over the window", COMPLETION, text(max_tokens=WINDOW - 1), "context_length_exceeded"),
    refused("A47 tgi", TGI, tgi(max_new_tokens=0), "", status=422),
    refused("A48 6 MB", COMPLETION, text(prompt="a" * 6_000_000), "context_length_exceeded"),
    refused("A48 ten windows", CHAT, said(messages=[{"role": "user", "content": "ab " * 14_000}]), ""),
    *(
        refused(f"A49 {name} {value}", COMPLETION, text(**{name: value}), "invalid_value", name)
        for name, values in {
            "temperature": (-1, 1e308, 1e-300),
            "top_p": (0, 1.1),
            "top_k": (-5, 2**31),
            "min_p": (2, -0.1),
            "typical_p": (0, 2),
            "repetition_penalty": (0, 1e9),
            "frequency_penalty": (1e9, -1e9),
            "presence_penalty": (1e9, -1e9),
        }.items()
        for value in values
    ),
    *(
        refused(f"A51 id {token!r}", COMPLETION, text(logit_bias={token: 1}), "invalid_value", "logit_bias")
        for token in (str(VOCABULARY), str(VOCABULARY + 1), "-1", str(2**31), "01", "1e1", "")
    ),
    refused("A51 257 biases", COMPLETION, text(logit_bias={str(i): 0 for i in range(257)}), "too_many_keys"),
    refused("A51 bias 101", COMPLETION, text(logit_bias={"1": 101}), "invalid_value", "logit_bias"),
    refused("A51 bias true", COMPLETION, text(logit_bias={"1": True}), "invalid_type", "logit_bias"),
    served("A51 all that fit are banned", COMPLETION, text(logit_bias={str(i): -100 for i in range(256)})),
    refused("A51 bad_words", COMPLETION, text(bad_words=["x"]), "unknown_field", "bad_words"),
    *(
        refused(f"A52 {top}", CHAT, said(logprobs=True, top_logprobs=top), "invalid_value", "top_logprobs")
        for top in (21, 10**6, -1)
    ),
    refused("A52 without logprobs", CHAT, said(top_logprobs=2), "invalid_request", "top_logprobs"),
    refused("A52 completion", COMPLETION, text(logprobs=21), "invalid_value", "logprobs"),
    served("A53 every cap at once", COMPLETION, text(n=16, logprobs=20, echo=True)),
    served("A53 every cap in a stream", COMPLETION, text(n=16, logprobs=20, stream=True)),
    refused("A53 64 prompts of 16", COMPLETION, text(prompt=["a"] * 64, n=16), "invalid_value", "prompt"),
    *(
        refused(f"A54 {name}", COMPLETION, text(stop=stop), "invalid_value", "stop")
        for name, stop in (
            ("10,000", ["x"] * 10_000),
            ("empty", ""),
            ("1 MB", "x" * 10**6),
            ("257", "x" * 257),
        )
    ),
    served("A54 at the caps", COMPLETION, text(stop=["x" * 256] * 16)),
    refused("A54 surrogate", COMPLETION, with_value("stop", b'"\\ud800"'), "lone_surrogate"),
    *(
        refused(f"A55 {seed}", COMPLETION, text(seed=seed), code, param)
        for seed, code, param in ((2**64, "invalid_number", None), (-1, "invalid_value", "seed"))
    ),
    refused("A55 text", COMPLETION, text(seed="abc"), "invalid_type", "seed"),
    *(
        refused(f"A56 {salt[:3]!r}", COMPLETION, text(cache_salt=salt), "invalid_value", "cache_salt")
        for salt in ("", "x" * 10**6, "a\nb", "\u00e9", "x" * 65)
    ),
    served("A57 priority asks for nothing", COMPLETION, text(priority=-(10**9))),
    refused("A58 stream yes", CHAT, said(stream="yes"), "invalid_type", "stream"),
    refused(
        "A58 usage", CHAT, said(stream_options={"include_usage": True}), "invalid_request", "stream_options"
    ),
    *(
        refused(f"A59 {ids}", COMPLETION, text(prompt=ids), code, "prompt")
        for ids, code in (
            ([VOCABULARY], "invalid_value"),
            ([-1], "invalid_value"),
            ([2**40], "invalid_value"),
            ([104, 257], "control_token"),
            ([], "invalid_value"),
            ([[]], "invalid_value"),
        )
    ),
    refused("A59 half a million ids", COMPLETION, text(prompt=[1] * 500_000), "context_length_exceeded"),
    refused("A60", COMPLETION, text(prompt_embeds="gASVAAAA"), "unknown_field", "prompt_embeds"),
    *(
        refused(f"A61 {name}", CHAT, said(**{name: {}}), "unknown_field", name)
        for name in ("mm_hashes", "kv_transfer_params", "extra_args", "vllm_xargs", "lora_request")
    ),
]


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize(
    ("path", "body", "statuses", "code", "param"),
    [pytest.param(*row[1:], id=row[0]) for row in [*BODIES, *PARAMETERS]],
)
def test_a_hostile_body_gets_the_designed_answer(
    server: Server, path: str, body: Any, statuses: set[int], code: str | None, param: str | None
) -> None:
    status, _, reply = server.request("POST", path, encoded(body), JSON)
    assert status in statuses, reply[:300]
    if status != 200:
        assert len(reply) <= 4096
        error = json.loads(reply)["error"]
        if path != TGI and code:
            assert error["code"] == code
        if path != TGI and param is not None:
            assert error["param"] == param
    assert server.ping() == 200


def test_no_row_reached_the_engine_unless_it_was_served(server: Server) -> None:
    before = server.engine["adds"]
    for row in [*BODIES, *PARAMETERS]:
        if row[3] != {200} and len(encoded(row[2])) < 10_000:
            server.request("POST", row[1], encoded(row[2]), JSON)
    assert server.engine["adds"] == before


def test_a_large_hostile_body_is_no_failure_of_the_server_in_its_log(server: Server) -> None:
    for body in (b"[" * 300_000, encoded(said(messages=[{"role": "x" * 300_000, "content": "x"}]))):
        assert server.request("POST", CHAT, body, JSON)[0] == 400
    assert server.request("POST", COMPLETION, encoded(text(prompt="a" * 20_000)), JSON)[0] == 400
    assert not server.events("greenlet_failed")
    assert not server.events("request_failed")
