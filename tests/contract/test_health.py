"""`/ping` tells the truth: loading, hung, dead, draining, and stays green under any load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.contract.calls import call, chat, metric, raw_request, wait_for
from tests.contract.conftest import ROOT, Running

pytestmark = pytest.mark.real_model


def children(pid: int) -> list[int]:
    """Return the ids of the direct children of `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def find(pid: int, word: str) -> int | None:
    """Return the id of the descendant of `pid` whose command line holds `word`."""
    for child in children(pid):
        if word in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
            return child
        deeper = find(child, word)
        if deeper is not None:
            return deeper
    return None


def engine_of(running: Running) -> int:
    assert running.process is not None
    modules = ("container.ranks", "sagemaker_entry.sealed.rank")  # of a plain model, of a sealed one
    found = [pid for module in modules if (pid := find(running.process.pid, module)) is not None]
    assert found
    return found[0]


def status(port: int) -> int:
    return call(port, "GET", "/ping", timeout_s=2).status


def test_ping_is_empty_and_answers_get_and_post(endpoint: Running) -> None:
    for method in ("GET", "POST"):
        reply = call(endpoint.port, method, "/ping")
        assert (reply.status, reply.body) == (200, b"")


def test_the_port_answers_503_while_the_model_loads(demo_checkpoint: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("STRONGROOM_")}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "sagemaker_entry", "serve"],
        cwd=ROOT,
        env=kept
        | {
            "STRONGROOM_MODEL": str(demo_checkpoint),
            "STRONGROOM_ALLOW_PLAINTEXT": "on",
            "STRONGROOM_PORT": str(port),
            "STRONGROOM_HOST": "127.0.0.1",
        },
        stderr=subprocess.DEVNULL,
    )
    seen = []
    try:
        while time.monotonic() - began < 120:
            try:
                seen.append(status(port))
            except OSError:
                time.sleep(0.02)
                continue
            if seen[-1] == 200:
                break
            early = call(port, "POST", "/invocations", chat())
            assert early.status in (200, 503)
            time.sleep(0.2)
        assert seen[0] == 503
        assert seen[-1] == 200
        assert call(port, "POST", "/invocations", chat()).status == 200  # ready means it answers
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_killed_engine_turns_ping_red_at_once_and_comes_back(own_endpoint: Running) -> None:
    port = own_endpoint.port
    expected = call(port, "POST", "/invocations", chat()).json()["choices"][0]["message"]
    waiting: list[int] = []
    clients = [
        threading.Thread(
            target=lambda: waiting.append(
                call(port, "POST", "/invocations", chat("Tell a long story.", max_tokens=400)).status
            )
        )
        for _ in range(4)
    ]
    for client in clients:
        client.start()
    wait_for(lambda: metric(port, "vllm:num_requests_running") >= 4, 20)
    os.kill(engine_of(own_endpoint), signal.SIGKILL)
    assert wait_for(lambda: status(port) == 503, 1.5) < 1.5
    for client in clients:
        client.join(5)
        assert not client.is_alive()
    assert waiting == [503] * 4
    wait_for(lambda: status(port) == 200, 60)
    assert call(port, "POST", "/invocations", chat()).json()["choices"][0]["message"] == expected


def test_a_stopped_engine_is_found_and_replaced(own_endpoint: Running) -> None:
    port = own_endpoint.port
    engine = engine_of(own_endpoint)
    os.kill(engine, signal.SIGSTOP)
    wait_for(lambda: status(port) == 503, 15)
    wait_for(lambda: status(port) == 200, 90)
    assert engine_of(own_endpoint) != engine
    assert call(port, "POST", "/invocations", chat()).status == 200


def test_a_killed_front_leaves_the_socket_and_the_engine(own_endpoint: Running) -> None:
    port, engine = own_endpoint.port, engine_of(own_endpoint)
    assert own_endpoint.process is not None
    front = find(own_endpoint.process.pid, "sagemaker_entry.front")
    assert front is not None
    for worker in children(front):
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: answers(port), 10)
    assert engine_of(own_endpoint) == engine


def test_sigterm_finishes_what_runs_and_refuses_what_comes(own_endpoint: Running) -> None:
    port = own_endpoint.port
    assert own_endpoint.process is not None
    server = find(own_endpoint.process.pid, "sagemaker_entry")
    assert server is not None
    done: list[bytes] = []

    def read_stream() -> None:
        with raw_request(port, "/invocations", CHAT_STREAM) as connection:
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
            done.append(data)

    client = threading.Thread(target=read_stream)
    client.start()
    wait_for(lambda: metric(port, "vllm:num_requests_running") >= 1, 20)
    began = time.monotonic()
    os.kill(server, signal.SIGTERM)
    wait_for(lambda: refuses(port), 1.5)
    client.join(30)
    assert b"data: [DONE]" in done[0] and done[0].endswith(b"0\r\n\r\n")
    own_endpoint.process.wait(30)
    assert time.monotonic() - began < 28
    assert own_endpoint.process.returncode == 0


def refuses(port: int) -> bool:
    try:
        return call(port, "POST", "/invocations", chat(), timeout_s=5).status == 503
    except OSError:
        return True


def answers(port: int) -> bool:
    try:
        return call(port, "POST", "/invocations", chat(), timeout_s=20).status == 200
    except OSError:
        return False


CHAT_STREAM = json.dumps(chat("Count to fifty.", max_tokens=100, stream=True)).encode()
