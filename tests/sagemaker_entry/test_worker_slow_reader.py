"""Row A17: clients that ask for much and read nothing, or little (a front with a write deadline of 1 s)."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.sagemaker_entry.harness import Server, post, status_of, wait_until
from tests.sagemaker_entry.quick_front import WRITE_S

# 16 choices of 4,000 tokens: more than the kernel's buffers take, and some seconds of work for the engine
MUCH = {"prompt": "abcdefg wait=2 ", "max_tokens": 4000, "n": 16, "logprobs": 20}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("impatient"), front="quick", STRONGROOM_WORKERS="1") as running:
        yield running
        assert running.engine["running"] == 0
        assert "greenlet_failed" not in running.log


def never_reading(server: Server, body: bytes) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    client.sendall(post("/v1/completions", body))
    return client


def ended(server: Server) -> dict[str, float]:
    names = ("accepted", "completed", "failed", "cancelled")
    return {name: server.metric(f"strongroom_requests_{name}_total") for name in names}


def test_a17_a_stream_that_nobody_reads_is_cancelled_at_the_write_deadline(impatient: Server) -> None:
    before, cancels = ended(impatient), impatient.engine["cancels"]
    client = never_reading(impatient, json.dumps(MUCH | {"stream": True}).encode())
    wait_until(lambda: impatient.engine["running"] == 1, 5, "the running request")
    wait_until(lambda: impatient.engine["cancels"] > cancels, WRITE_S + 10, "the cancel")
    wait_until(lambda: impatient.engine["running"] == 0, 2, "an idle engine")
    wait_until(lambda: impatient.metric("strongroom_connections_open") == 1, 5, "the connection's end")
    after = ended(impatient)
    assert after["accepted"] - before["accepted"] == 1
    assert after["cancelled"] - before["cancelled"] == 1
    assert impatient.metric("strongroom_requests_in_flight") == 0
    assert impatient.ping() == 200
    client.close()


def test_a17_ping_and_other_requests_are_served_while_a_stream_is_stuck(impatient: Server) -> None:
    client = never_reading(impatient, json.dumps(MUCH | {"stream": True}).encode())
    wait_until(lambda: impatient.engine["running"] == 1, 5, "the running request")
    began = time.monotonic()
    status, answer = impatient.invoke({"inputs": "hello ", "parameters": {"max_new_tokens": 4}})
    assert (status, answer) == (200, [{"generated_text": "hello hell"}])
    assert impatient.ping() == 200
    assert time.monotonic() - began < 5
    client.close()
    wait_until(lambda: impatient.engine["running"] == 0, 5, "an idle engine")


def test_a_client_that_reads_slowly_but_steadily_keeps_its_stream(impatient: Server) -> None:
    body = {"prompt": "ab wait=100 ", "max_tokens": 15, "stream": True}
    client = never_reading(impatient, json.dumps(body).encode())
    received = b""
    while data := client.recv(512):
        received += data
        time.sleep(0.05)
    client.close()
    assert status_of(received) == 200
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "a stream of 1.5 s was cut at 1 s"


def test_an_answer_nobody_takes_gives_its_connection_back(impatient: Server) -> None:
    many = [never_reading(impatient, json.dumps(MUCH | {"max_tokens": 300}).encode()) for _ in range(3)]
    wait_until(lambda: impatient.engine["adds"] >= 3, 5, "the requests")
    wait_until(lambda: impatient.metric("strongroom_connections_open") == 1, 20, "the connections' end")
    assert impatient.metric("strongroom_requests_in_flight") == 0
    for client in many:
        client.close()
