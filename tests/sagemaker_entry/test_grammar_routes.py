"""Structured output over HTTP, with the real checker beside a fake engine that repeats the prompt."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from typing import Any

import pytest

from tests.sagemaker_entry.harness import Server

NESTED = "(((a{9}){9}){9}){80}"


def tgi(inputs: str, grammar: Any, stream: bool = False, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"grammar": grammar, **parameters}, "stream": stream}


def chat(content: str, form: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "response_format": form, **fields}


def counted(server: Server, name: str) -> float:
    page = server.request("GET", "/metrics")[2].decode()
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_an_answer_that_follows_its_grammar_is_returned(server: Server) -> None:
    grammar = {"type": "json", "value": {"properties": {"a": {"type": "integer"}}}}
    status, body = server.invoke(tgi('{"a":1} eos=7', grammar, details=True), "/generate")
    assert status == 200
    assert json.loads(body["generated_text"]) == {"a": 1}
    assert body["details"]["finish_reason"] == "eos_token"


def test_an_answer_that_breaks_its_grammar_is_an_error_in_the_dialects_words(server: Server) -> None:
    before = counted(server, "strongroom_grammar_violations_total")
    status, body = server.invoke(tgi("nonsense eos=8", {"type": "regex", "value": "[0-9]+"}), "/generate")
    assert status == 424
    assert body["error_type"] == "generation"
    # the chat template's first token is a control token: nothing JSON begins with
    status, body = server.invoke(chat("x eos=3", {"type": "json_object"}), "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (500, "grammar_violated")
    assert counted(server, "strongroom_grammar_violations_total") == before + 2


def test_a_stream_that_breaks_its_grammar_ends_with_an_error_event(server: Server) -> None:
    body = chat("x eos=3", {"type": "json_object"}, stream=True)
    with pytest.raises(http.client.IncompleteRead) as caught:  # the stream breaks off by design
        server.request("POST", "/v1/chat/completions", body)
    partial = caught.value.partial
    assert b'"code":"grammar_violated"' in partial
    assert b"[DONE]" not in partial


def test_an_answer_cut_by_its_length_comes_as_it_is(server: Server) -> None:
    grammar = {"type": "json", "value": {"properties": {"a": {"type": "integer"}}}}
    status, body = server.invoke(tgi('{"a":1}', grammar, max_new_tokens=4, details=True), "/generate")
    assert status == 200
    assert body["generated_text"] == '{"a"'
    assert body["details"]["finish_reason"] == "length"


def test_the_engines_grammar_error_is_worded_before_and_inside_a_stream(server: Server) -> None:
    grammar = {"type": "regex", "value": "e+"}
    status, body = server.invoke(tgi("error=grammar_error at=0", grammar), "/generate")
    assert (status, body["error_type"]) == (424, "generation")
    form = {"type": "regex", "value": "e+"}
    status, body = server.invoke(chat("error=grammar_error at=0", form), "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (422, "grammar_failed")
    streamed = chat("error=grammar_error at=2", form, stream=True)
    with pytest.raises(http.client.IncompleteRead) as caught:  # the stream breaks off by design
        server.request("POST", "/v1/chat/completions", streamed)
    assert b'"code":"grammar_failed"' in caught.value.partial


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {}}, "`not`: a keyword of it is not supported"),
        ({"type": "string", "pattern": "a(?=b)"}, "`pattern`: look-around and back-references are"),
        ({"$ref": "http://169.254.169.254/latest"}, "`$ref`: it refers to something outside"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no finished text can follow it"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_before_the_engine(
    server: Server, schema: Any, reason: str
) -> None:
    adds = server.engine["adds"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    status, body = server.invoke(chat("x", form), "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (400, "invalid_grammar")
    assert body["error"]["message"].partition(" cannot be followed: ")[2].startswith(reason)
    status, body = server.invoke(tgi("x", {"type": "regex", "value": "a("}), "/generate")
    assert status == 422
    assert body["error"] == (
        "Input validation error: grammar is not valid: it holds an invalid regular expression"
    )
    assert server.engine["adds"] == adds


def test_grammars_that_explode_do_not_hold_up_other_requests(server: Server) -> None:
    answers: list[int] = []

    def attack(number: int) -> None:
        grammar = {"type": "regex", "value": NESTED + "b" * number}
        answers.append(server.invoke(tgi("x", grammar), "/generate")[0])

    threads = [threading.Thread(target=attack, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    slowest_s = 0.0
    while any(thread.is_alive() for thread in threads):
        started_s = time.monotonic()
        assert server.invoke({"inputs": "hi", "parameters": {"max_new_tokens": 2}}, "/generate")[0] == 200
        slowest_s = max(slowest_s, time.monotonic() - started_s)
    for thread in threads:
        thread.join()
    # A quiet machine builds these within the limits; then they are followed as any other.
    assert set(answers) <= {200, 422, 429} and len(answers) == 4
    assert slowest_s < 1.0
