"""Routes, dialects on routes, keys, headers, listings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sagemaker_entry.harness import Server, wait_until

HELLO = {"inputs": "hello ", "parameters": {"max_new_tokens": 4}}
CHAT = {"messages": [{"role": "user", "content": "hi eos=2"}], "max_tokens": 8}
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"


def test_every_generating_route_answers_in_its_dialect(server: Server) -> None:
    assert server.invoke(HELLO) == (200, [{"generated_text": "hello hell"}])
    assert server.invoke(HELLO, "/") == (200, [{"generated_text": "hello hell"}])
    assert server.invoke(HELLO, "/generate") == (200, {"generated_text": "hell"})
    for path in ("/invocations", "/v1/chat/completions", "/openai/v1/chat/completions"):
        status, answer = server.invoke(CHAT, path)
        assert (status, answer["object"]) == (200, "chat.completion")
        assert answer["id"].startswith("chatcmpl-")
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 3
    for path in ("/invocations", "/v1/completions", "/openai/v1/completions"):
        status, answer = server.invoke({"prompt": "hello ", "max_tokens": 4}, path)
        assert (status, answer["choices"][0]["text"]) == (200, "hell")
        assert answer["id"].startswith("cmpl-")


def test_an_empty_model_name_is_the_served_model_and_another_is_not_found(server: Server) -> None:
    assert server.invoke(CHAT | {"model": ""}, "/v1/chat/completions")[1]["model"] == "model"
    status, answer = server.invoke(CHAT | {"model": "gpt-x"}, "/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_ping_answers_get_and_post_with_an_empty_body(server: Server) -> None:
    for method in ("GET", "POST"):
        status, headers, body = server.request(method, "/ping")
        assert (status, body) == (200, b"")
        assert headers["Content-Type"] is None
    assert server.request("GET", "/health")[0] == 200
    assert server.request("GET", "/")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/openapi.json",
        "/sleep",
        "/v1/embeddings",
        "/models",
        "/adapters",
        "/console",
        "/static/x",
        "/v1/",
    ],
)
def test_a_path_that_is_not_listed_does_not_exist(server: Server, path: str) -> None:
    status, _, body = server.request("GET", path)
    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/invocations"), ("DELETE", "/v1/models/model"), ("PUT", "/ping"), ("OPTIONS", "/generate")],
)
def test_a_method_that_is_not_listed_is_refused(server: Server, method: str, path: str) -> None:
    status, _, body = server.request(method, path)
    assert status == 405
    assert b"method" in body


def test_models_are_listed_by_their_served_name_only(server: Server) -> None:
    for prefix in ("", "/openai"):
        listing = json.loads(server.request("GET", prefix + "/v1/models")[2])
        assert [model["id"] for model in listing["data"]] == ["model"]
        assert server.request("GET", prefix + "/v1/models/model")[0] == 200
        assert server.request("GET", prefix + "/v1/models/other")[0] == 404


def test_info_and_execution_parameters_come_from_the_engine_and_the_settings(server: Server) -> None:
    info = json.loads(server.request("GET", "/info")[2])
    assert (info["max_total_tokens"], info["max_concurrent_requests"]) == (4096, 128)
    assert str(server.directory) not in json.dumps(info)
    parameters = json.loads(server.request("GET", "/execution-parameters")[2])
    assert parameters == {"MaxConcurrentTransforms": 8, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": 6}
    assert parameters["MaxConcurrentTransforms"] * parameters["MaxPayloadInMB"] <= 100


def test_tokenize_shows_the_tokens_and_their_places(server: Server) -> None:
    status, spans = server.invoke({"inputs": "hi!"}, "/tokenize")
    assert status == 200
    assert [(span["id"], span["text"], span["start"], span["stop"]) for span in spans] == [
        (104, "h", 0, 1),
        (105, "i", 1, 2),
        (33, "!", 2, 3),
    ]


def test_chat_tokenize_shows_the_rendered_text(server: Server) -> None:
    status, answer = server.invoke(
        {"messages": [{"role": "user", "content": "<|im_end|>"}]}, "/chat_tokenize"
    )
    assert status == 200
    assert answer["templated_text"].startswith("<|im_start|>user\n<|im_end|><|im_end|>")
    ids = [span["id"] for span in answer["tokenize_response"]]
    assert ids.count(257) == 1, "a control token came from the user's text"


def test_errors_come_in_the_dialect_of_the_route_or_the_body(server: Server) -> None:
    status, answer = server.invoke({"inputs": "", "parameters": {}}, "/generate")
    assert (status, answer["error_type"]) == (422, "validation")
    status, answer = server.invoke({"inputs": "x", "parameters": {"max_new_tokens": 0}})
    assert (status, answer["error_type"]) == (422, "validation")
    status, answer = server.invoke({"messages": []}, "/v1/chat/completions")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    status, answer = server.invoke({"nothing": 1})
    assert (status, answer["error"]["code"]) == (400, "unknown_shape")
    assert len(answer["error"]["request_id"]) == 24


def test_the_request_id_of_an_error_is_the_clients_when_it_is_harmless(server: Server) -> None:
    for sent, shown in (("run-7.a_b", True), ("a b", False), ("x" * 65, False), ("<script>", False)):
        _, answer = server.invoke({"nothing": 1}, **{"X-Amzn-SageMaker-Inference-Id": sent})
        assert (answer["error"]["request_id"] == sent) is shown


def test_custom_attributes_are_echoed_only_when_they_are_harmless(server: Server) -> None:
    for sent, echoed in (("trace=1.a_b-c", True), ("a;b", False), ('"q"', False), ("a b", False)):
        _, headers, _ = server.request("GET", "/ping", headers={ATTRIBUTES: sent})
        assert headers[ATTRIBUTES] == (sent if echoed else None)


def test_replies_carry_no_headers_but_the_specified(server: Server) -> None:
    _, headers, _ = server.request("POST", "/invocations", HELLO)
    expected = {"date", "connection", "content-type", "content-length", "x-content-type-options"}
    assert {name.lower() for name in headers} == expected


def test_unknown_fields_are_refused_by_name(server: Server) -> None:
    status, answer = server.invoke(CHAT | {"max_token": 5})
    assert (status, answer["error"]["param"]) == (400, "max_token")


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(server: Server) -> None:
    status, answer = server.invoke({"prompt": "a" * 60_000, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = server.invoke({"prompt": "a" * 5000, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "5000" in answer["error"]["message"]
    status, answer = server.invoke({"prompt": "a" * 4000, "max_tokens": 97})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_control_ids_are_refused_in_token_prompts(server: Server) -> None:
    for ids in ([104, 257], [-1], [260], [2**40]):
        status, _ = server.invoke({"prompt": ids, "max_tokens": 1})
        assert status == 400


KEY = "k-" + "0" * 30


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory: Path = tmp_path_factory.mktemp("guarded")
    (directory / "key").write_text(KEY + "\n")
    with Server(
        directory,
        STRONGROOM_API_KEY_FILE=str(directory / "key"),
        STRONGROOM_WORKERS="1",
        STRONGROOM_MAX_CONCURRENT_REQUESTS="2",
        STRONGROOM_REQUEST_DEADLINE_S="1",
        STRONGROOM_STREAM_DEADLINE_S="1",
        STRONGROOM_STREAM_ERROR="event",
        STRONGROOM_UNKNOWN_FIELDS="ignore",
        STRONGROOM_BODY_LIMIT_BYTES="2048",
    ) as running:
        yield running


def key(value: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def test_a_configured_key_is_required_everywhere_but_on_the_health_routes(guarded: Server) -> None:
    assert guarded.invoke(HELLO, **key())[0] == 200
    for header in ({}, key("wrong"), key(KEY[:-1]), key(KEY + "0"), {"Authorization": KEY}):
        status, answer = guarded.invoke(HELLO, **header)
        assert (status, answer["error"]["code"]) == (401, "unauthorized")
    for path in ("/info", "/metrics", "/v1/models", "/execution-parameters", "/nothing"):
        assert guarded.request("GET", path)[0] == 401
    for path in ("/ping", "/health", "/"):
        assert guarded.request("GET", path)[0] == 200
    assert guarded.request("GET", f"/info?key={KEY}")[0] == 401
    assert KEY not in guarded.log


def test_unknown_fields_are_ignored_where_the_operator_said_so(guarded: Server) -> None:
    assert guarded.invoke(CHAT | {"max_token": 5}, **key())[0] == 200


def test_the_body_limit_is_the_configured_one(guarded: Server) -> None:
    for size, expected in ((2048, 200), (2049, 413)):
        body = json.dumps(HELLO).encode()
        body += b" " * (size - len(body))
        status, _, _ = guarded.request("POST", "/", body, key() | {"Content-Type": "application/json"})
        assert status == expected


def test_the_deadline_of_a_request_is_504_and_stops_the_engine(guarded: Server) -> None:
    body = {"prompt": "ab wait=50 ", "max_tokens": 500}
    status, answer = guarded.invoke(body, **key())
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    wait_until(lambda: guarded.engine["running"] == 0, what="the cancel")


def test_a_failed_stream_ends_normally_where_the_operator_said_so(guarded: Server) -> None:
    body = {"prompt": "ab wait=50 ", "max_tokens": 500, "stream": True}
    status, _, reply = guarded.request("POST", "/v1/completions", body, key())
    assert status == 200
    assert b'"deadline_exceeded"' in reply.split(b"\n\n")[-2]
    assert b"[DONE]" not in reply


def test_while_the_engine_has_no_room_requests_are_refused_without_asking_it(guarded: Server) -> None:
    crowd = {"prompt": "ab crowd=9 wait=50 ", "max_tokens": 20}
    thread = threading.Thread(target=guarded.invoke, args=(crowd,), kwargs=key())
    thread.start()
    while guarded.engine["running"] < 1:
        time.sleep(0.01)
    time.sleep(0.2)  # the page is written between two steps
    asked = guarded.engine["adds"]
    status, headers, reply = guarded.request("POST", "/invocations", {"inputs": "ab"}, key())
    assert (status, headers["Retry-After"]) == (429, "9")
    assert json.loads(reply)["error_type"] == "overloaded", "not in the words of the dialect that asked"
    status, _, _ = guarded.request("POST", "/invocations", {"inputs": "ab", "parameters": 3}, key())
    assert status == 422, "what is wrong with a request is said all the same"
    assert guarded.engine["adds"] == asked
    assert guarded.ping() == 200
    thread.join()
    deadline = time.monotonic() + 5
    while guarded.request("POST", "/invocations", {"inputs": "ab"}, key())[0] != 200:
        assert time.monotonic() < deadline, "there is room again, and nobody is let in"


def test_more_requests_than_places_are_answered_429_at_once(guarded: Server) -> None:
    body = {"prompt": "ab wait=50 ", "max_tokens": 10}
    threads = [threading.Thread(target=guarded.invoke, args=(body,), kwargs=key()) for _ in range(2)]
    for thread in threads:
        thread.start()
    while guarded.engine["running"] < 2:
        time.sleep(0.01)
    began = time.monotonic()
    status, headers, reply = guarded.request("POST", "/v1/completions", body, key())
    assert (status, headers["Retry-After"]) == (429, "1")
    assert json.loads(reply)["error"]["code"] == "overloaded"
    assert time.monotonic() - began < 0.5
    assert guarded.ping() == 200, "overload must not turn the ping red"
    for thread in threads:
        thread.join()
