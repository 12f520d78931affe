"""The log: one escaped line per event, and never anything a client sent."""

from __future__ import annotations

import http.client
import json
import logging
import os
from pathlib import Path

import pytest

from sagemaker_entry import log
from tests.sagemaker_entry.harness import Server, post

CANARY = "ZQcanaryZQ"


def written(
    level: str, event: str, threshold: str = "info", **values: str | int | float | bool | None
) -> bytes:
    """Return what one `write` writes."""
    ours, theirs = os.pipe()
    try:
        log.set_level(threshold, theirs)
        log.write(level, event, **values)
        os.close(theirs)
        with os.fdopen(ours, "rb") as reader:
            return reader.read()
    finally:
        log.set_level("info")


def test_a_line_is_one_line_whatever_a_value_holds() -> None:
    hostile = 'a\nb\rc\x1b[31m"}{\x00\x7f\u2028\x85é'
    line = written("info", "test", name=hostile)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert json.loads(line)["name"] == hostile


def test_long_values_are_cut_and_low_levels_are_dropped() -> None:
    assert len(json.loads(written("info", "test", name="x" * 10_000))["name"]) == log.MAX_VALUE_CHARS
    assert written("debug", "test") == b""
    assert written("debug", "test", threshold="debug") != b""
    assert written("warning", "test", threshold="error") == b""


def test_a_log_that_nobody_reads_does_not_stop_the_server() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        log.set_level("info", theirs)
        log.write("info", "test")  # a broken pipe
        assert log._state["level"] > max(log.LEVELS.values()), "it is tried again at every line"
        log.write("info", "test")
    finally:
        os.close(theirs)
        log.set_level("info")


def test_an_exception_is_logged_by_type_and_place_without_its_text() -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        assert CANARY not in log.exception_name()
        assert log.exception_name().startswith("ValueError")


def test_library_loggers_write_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.lastResort, logging.raiseExceptions
    try:
        log.silence_libraries()
        logging.getLogger("gunicorn.error").error(CANARY)
        logging.getLogger("werkzeug").warning(CANARY)
    finally:
        root.handlers[:], logging.lastResort, logging.raiseExceptions = before[0], before[2], before[3]
        root.setLevel(before[1])
    assert CANARY not in "".join(capfd.readouterr())


def test_nothing_a_client_sends_reaches_log_metrics_or_error_bodies(server: Server) -> None:
    c = CANARY
    bodies: list[object] = [
        {"prompt": c, "max_tokens": 2},
        {"prompt": c, "max_tokens": 2, "stream": True},
        {"messages": [{"role": "user", "content": c}], "max_tokens": 2, "stop": [c], "user": c},
        {"messages": [{"role": c, "content": c}]},
        {"inputs": c, "parameters": {"max_new_tokens": c}},
        {"prompt": c + " error=internal ", "max_tokens": 2},
        {"prompt": c + " error=kv_exhausted at=1 ", "max_tokens": 4, "stream": True},
        {"prompt": c, "model": c},
        {"prompt": c, "temperature": c, "cache_salt": c + "!"},
        {"prompt": c * 8000, "max_tokens": 1},
    ]
    headers = {
        "X-Amzn-SageMaker-Inference-Id": f"{c} {c}",
        "X-Amzn-SageMaker-Custom-Attributes": f"{c};{c}",
        "X-Amzn-SageMaker-Target-Model": f"../{c}",
        "Authorization": f"Bearer {c}",
        "X-Custom": c,
    }
    for body in bodies:
        try:
            status, _, reply = server.request("POST", "/invocations", body, headers)
        except http.client.IncompleteRead:
            assert isinstance(body, dict)
            assert body.get("stream"), "only a failed stream breaks off"
            continue
        if status != 200:
            assert c.encode() not in reply, (body, reply)
    raw = [
        f"GET /{c} HTTP/1.1\r\nHost: {c}\r\nConnection: close\r\n\r\n",
        f"GET /ping?{c} HTTP/1.1\r\nHost: x\r\n{c} : bad\r\n\r\n",
        f"{c} /ping HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /ping {c}\r\n\r\n",
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {c}\r\n\r\n",
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {c}\r\n\r\n",
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nExpect: {c}\r\n\r\n",
        f"POST /{c} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{c}\r\n",
    ]
    for data in [*(text.encode() for text in raw), post("/invocations", f'{{"{c}": "{c}'.encode())]:
        assert c.encode() not in server.raw(data, 2)
    assert c not in server.log
    assert c.encode() not in server.request("GET", "/metrics")[2]
    assert c not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def test_a_request_is_one_line_with_route_status_counts_and_a_hashed_client_id(server: Server) -> None:
    before = len(server.events("request"))
    server.invoke(
        {"prompt": "abc", "max_tokens": 2},
        "/openai/v1/completions",
        **{"X-Amzn-SageMaker-Inference-Id": "run-1"},
    )
    line = next(e for e in server.events("request")[before:] if e["route"] == "/v1/completions")
    assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 3, 2)
    assert len(line["client_id"]) == 16
    assert "run-1" not in json.dumps(line)
