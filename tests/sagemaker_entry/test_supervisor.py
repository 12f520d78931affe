"""The supervisor with real processes: loading, draining, dying and hanging engines, dying fronts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from container.ranks.heartbeat import HealthLimits
from sagemaker_entry import children
from sagemaker_entry.settings import Settings, read
from sagemaker_entry.supervisor import EXIT_KEY, engine_config
from sagemaker_entry.worker import QUIET_S
from tests.sagemaker_entry.harness import ROOT, Server, post, read_all, status_of, wait_until

HELLO = {"inputs": "hello ", "parameters": {"max_new_tokens": 4}}


def slow(tokens: int, wait_ms: int = 50, *, stream: bool = False) -> bytes:
    body = {"inputs": f"ab wait={wait_ms} ", "parameters": {"max_new_tokens": tokens}, "stream": stream}
    return json.dumps(body).encode()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, step_s=1.5, STRONGROOM_WORKERS="1") as running:
        yield running


class Caller(threading.Thread):
    """Sends one request in the background and keeps what came back."""

    def __init__(self, server: Server, data: bytes) -> None:
        super().__init__()
        self._client = server.connect()
        self._client.sendall(data)
        self.reply = b""
        self.done_at = 0.0
        self.start()

    def run(self) -> None:
        self.reply = read_all(self._client)
        self.done_at = time.monotonic()
        self._client.close()


def test_the_port_answers_at_once_and_ping_tells_the_load_phase(tmp_path: Path) -> None:
    server = Server(tmp_path, load_s=1.5, STRONGROOM_WORKERS="1").start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.25):
            pass  # accepted, although nothing is loaded
        wait_until(lambda: server.ping() == 503, 5, "a red ping")
        wait_until(lambda: b"weights" in server.request("GET", "/ping")[2], 5, "the phase")
        _, headers, reply = server.request("GET", "/ping")
        assert headers["Retry-After"] == "5"
        body = json.loads(reply)
        assert (body["error"]["code"], body["phase"]) == ("loading", "weights")
        status, answer = server.invoke(HELLO)
        assert (status, answer["error"]["code"]) == (503, "loading")
        server.wait_ready()
        assert server.invoke(HELLO)[0] == 200
    finally:
        assert server.stop() == 0


def test_a_drain_refuses_new_requests_at_once_and_lets_running_ones_finish(own_server: Server) -> None:
    running = Caller(own_server, post("/invocations", slow(60)))
    streaming = Caller(own_server, post("/invocations", slow(50, stream=True)))
    idle = own_server.connect()
    idle.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status_of(idle.recv(1000)) == 200
    wait_until(lambda: own_server.engine["running"] == 2, what="two running requests")
    own_server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    wait_until(lambda: own_server.ping() == 503, 0.3, "a red ping")
    assert own_server.invoke(HELLO)[0] == 503
    idle.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status_of(idle.recv(1000)) == 503
    idle.close()
    running.join(10)
    streaming.join(10)
    assert status_of(running.reply) == 200
    assert streaming.reply.endswith(b"0\r\n\r\n"), "the stream did not end properly"
    assert b"generated_text" in streaming.reply
    assert own_server.process.wait(10) == 0
    assert time.monotonic() - began < 9


def test_a_worker_with_nothing_to_do_refuses_until_the_others_are_done(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS="2") as server, ExitStack() as closing:
        wait_until(lambda: len(server.events("text_model_loaded")) == 2, 20, "both workers")
        running = Caller(server, post("/invocations", slow(60)))
        kept = [closing.enter_context(server.connect()) for _ in range(12)]  # some at either worker
        for connection in kept:
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status_of(connection.recv(1000)) == 200
        wait_until(lambda: server.engine["running"] == 1, what="a running request")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(QUIET_S * 3)
        for connection in kept:
            connection.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status_of(connection.recv(1000)) == 503
        running.join(10)
        assert server.process.wait(10) == 0
    assert status_of(running.reply) == 200


def test_what_cannot_finish_in_the_drain_time_gets_an_error(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_DRAIN_S="1", STRONGROOM_WORKERS="1") as server:
        running = Caller(server, post("/invocations", slow(2000)))
        streaming = Caller(server, post("/invocations", slow(2000, stream=True)))
        wait_until(lambda: server.engine["running"] == 2, what="two running requests")
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # a second one changes nothing
        running.join(10)
        streaming.join(10)
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 5
    assert status_of(running.reply) == 503
    assert b'"error_type"' in streaming.reply
    assert not streaming.reply.endswith(b"0\r\n\r\n"), "a failed stream must break off"


def test_a_killed_engine_is_replaced_and_nobody_waits_for_it(own_server: Server) -> None:
    running = Caller(own_server, post("/invocations", slow(500)))
    streaming = Caller(
        own_server, post("/v1/completions", json.dumps({"prompt": "ab wait=50 ", "stream": True}).encode())
    )
    wait_until(lambda: own_server.engine["running"] == 2, what="two running requests")
    pid = own_server.engine["pid"]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    running.join(5)
    streaming.join(5)
    assert max(running.done_at, streaming.done_at) - began < 1.0
    assert status_of(running.reply) in (424, 503)
    assert b'"engine_down"' in streaming.reply
    assert b"[DONE]" not in streaming.reply
    own_server.wait_ready(5)
    wait_until(lambda: own_server.engine["pid"] != pid, 5, "the new engine's own word")
    assert own_server.invoke(HELLO) == (200, [{"generated_text": "hello hell"}])
    assert own_server.metric("strongroom_engine_restarts_total") == 1


def test_a_stopped_engine_is_noticed_ended_and_replaced(own_server: Server) -> None:
    pid = own_server.engine["pid"]
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: own_server.ping() == 503, 4, "a red ping")
    own_server.wait_ready(10)
    assert time.monotonic() - began < 10
    assert own_server.engine["pid"] != pid
    assert own_server.events("engine_hangs")
    assert own_server.invoke(HELLO)[0] == 200


def test_an_engine_that_failed_but_does_not_end_is_ended(tmp_path: Path) -> None:
    server = Server(tmp_path, fault="LINGERS", STRONGROOM_WORKERS="1").start()
    try:
        wait_until(lambda: server.events("child_died"), 12, "its end")
        assert server.events("engine_hangs")[0]["verdict"] == "failed"
        wait_until(lambda: len(server.events("child_started")) == 3, 5, "another engine")
        assert server.ping() in (0, 503)
    finally:
        server.stop()


def test_three_dead_engines_within_a_minute_end_the_container(own_server: Server) -> None:
    for round_number in range(3):
        own_server.wait_ready(10)
        pid = own_server.engine["pid"]
        os.kill(pid, signal.SIGKILL)
        if round_number < 2:
            wait_until(lambda: own_server.engine["pid"] != pid, 10, "a new engine")  # noqa: B023
    assert own_server.process.wait(10) == 70
    assert own_server.events("giving_up")


def test_a_dead_front_is_replaced_behind_the_same_port(own_server: Server) -> None:
    front = own_server.events("child_started")[0]
    assert front["child"] == "front"
    os.kill(front["child_pid"], signal.SIGKILL)
    wait_until(lambda: len(own_server.events("child_started")) == 3, 5, "a new front")
    own_server.wait_ready(10)
    assert own_server.invoke(HELLO)[0] == 200
    assert own_server.metric("strongroom_front_restarts_total") == 1


def test_a_dead_worker_is_replaced_and_its_gauges_are_reset(own_server: Server) -> None:
    worker = own_server.events("worker_started")[0]["pid"]
    running = Caller(own_server, post("/invocations", slow(500)))
    wait_until(lambda: own_server.engine["running"] == 1, what="the running request")
    os.kill(worker, signal.SIGKILL)
    running.join(5)
    assert running.reply == b""
    wait_until(lambda: len(own_server.events("text_model_loaded")) == 2, 10, "the new worker")
    assert own_server.metric("strongroom_requests_in_flight") == 0
    wait_until(lambda: own_server.engine["running"] == 0, what="an idle engine")
    assert own_server.invoke(HELLO)[0] == 200


def test_workers_start_one_after_another_each_when_the_last_one_serves(tmp_path: Path) -> None:
    with Server(tmp_path, load_s=1.0, STRONGROOM_WORKERS="3") as server:
        assert len(server.events("worker_started")) == 1, "they took the engine's time"
        wait_until(lambda: len(server.events("text_model_loaded")) == 3, 20, "three workers")
        time.sleep(QUIET_S)
        assert len(server.events("worker_started")) == 3


def test_a_dead_worker_is_replaced_by_one_and_no_more(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS="2") as server:
        wait_until(lambda: len(server.events("text_model_loaded")) == 2, 20, "both workers")
        for number, worker in enumerate(server.events("worker_started"), 3):
            os.kill(worker["pid"], signal.SIGKILL)
            wait_until(lambda: len(server.events("text_model_loaded")) == number, 10, "the new worker")  # noqa: B023
        time.sleep(QUIET_S)
        assert len(server.events("worker_started")) == 4


def test_a_worker_that_dies_before_it_serves_does_not_leave_the_next_one_out(tmp_path: Path) -> None:
    server = Server(tmp_path, load_s=2.0, STRONGROOM_WORKERS="2").start()
    try:
        wait_until(lambda: server.events("worker_started"), 10, "the first worker")
        os.kill(server.events("worker_started")[0]["pid"], signal.SIGKILL)
        server.wait_ready()
        wait_until(lambda: len(server.events("worker_started")) == 3, 20, "the second worker")
    finally:
        server.process.terminate()
        server.process.wait(30)


def test_nothing_is_left_running_when_the_supervisor_is_killed(own_server: Server) -> None:
    pids = [own_server.engine["pid"], *(e["pid"] for e in own_server.events("worker_started"))]
    own_server.process.kill()
    own_server.process.wait()

    def gone(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    wait_until(lambda: all(gone(pid) for pid in pids), 5, "the end of all children")


def test_children_see_only_the_allowed_environment() -> None:
    given = {
        "PATH": "/bin",
        "WEB_CONCURRENCY": "9",
        "GUNICORN_CMD_ARGS": "--bind x",
        "AWS_SECRET_ACCESS_KEY": "k",
    }
    assert children.environment(given) == {"PATH": "/bin"} | children.ADDED


def test_what_a_dead_child_leaves_behind_is_ended_and_reaped_before_it_counts_as_gone() -> None:
    leaves = "import subprocess as s, sys; s.Popen(['sleep', '60']); print(flush=True); sys.stdin.read()"
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from sagemaker_entry import children\nfrom sagemaker_entry.supervisor import Child\n"
        "children.adopt_orphans()\n"
        f"child = Child('engine', [{sys.executable!r}, '-c', {leaves!r}], [], 3)\n"
        "read, write = os.pipe()\nos.dup2(write, 1)\n"
        "child.start({'PATH': os.environ['PATH']})\nos.read(read, 1)\n"
        "left = [int(p) for p in Path(f'/proc/{child.pid}/task/{child.pid}/children').read_text().split()]\n"
        "assert child.cleared() and len(left) == 1\n"
        "child.kill(signal.SIGKILL)\nos.waitpid(child.pid, 0)\nchild.died(0.0)\n"
        "until = time.monotonic() + 10\n"
        "while not child.cleared():\n    assert time.monotonic() < until\n    time.sleep(0.001)\n"
        "assert not Path(f'/proc/{left[0]}').exists(), 'it is still there'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_child_inherits_only_the_named_descriptors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import os; fds = os.listdir('/proc/self/fd'); n = '/proc/self/fd/';"
        f"open({str(out)!r}, 'w').write(' '.join(os.readlink(n + f) for f in fds if os.path.exists(n + f)))"
    )
    script = (
        "import os\nfrom sagemaker_entry import children\n"
        "kept, dropped = os.memfd_create('kept'), os.memfd_create('dropped')\n"
        "os.set_inheritable(dropped, True)\n"
        f"pid = children.spawn([{sys.executable!r}, '-c', {program!r}], {{}}, [kept])\n"
        "assert os.waitpid(pid, 0)[1] == 0\nprint(kept)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert "memfd:kept" in out.read_text()
    assert "memfd:dropped" not in out.read_text()


def test_the_engine_is_told_what_the_operator_set() -> None:
    settings = Settings(model="/m", max_sequence_tokens=512, max_running=3, prefix_cache="off", compat="off")
    config = engine_config(dataclasses.replace(settings, speculate="off"))
    assert (config.model_dir, config.sequence_tokens, config.running_limit) == ("/m", 512, 3)
    assert (config.prefix_cache, config.compat) == (False, False)
    assert engine_config(Settings()).prefix_cache
    assert (engine_config(Settings()).speculate, config.speculate) == ("auto", "off")
    together = engine_config(Settings(tensor_parallel=4, quantize="bnb-nf4", surgery="off"))
    assert (together.tensor_parallel, together.quantize, together.surgery) == (4, "bnb-nf4", "off")


def test_the_bounds_of_the_queue_reach_the_engine() -> None:
    config = engine_config(read({"STRONGROOM_MAX_WAITING": "0", "STRONGROOM_MAX_WAIT_S": "0.1"})[0])
    assert (config.waiting_limit, config.waiting_s) == (0, 0.1)
    derived = engine_config(Settings())
    assert (derived.waiting_limit, derived.waiting_s) == (None, 5.0)


def run_entry(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STRONGROOM_", "SAGEMAKER_"))}
    return subprocess.run(
        [sys.executable, "-m", "sagemaker_entry", *arguments],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_entry_refuses_what_it_cannot_do_with_a_hint() -> None:
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("train",), {}, "`train`"),
        ((), {}, "one argument"),
        (("serve",), {"STRONGROOM_PORTS": "1"}, "did you mean STRONGROOM_PORT?"),
        (("serve",), {"STRONGROOM_PORT": "eighty"}, "`STRONGROOM_PORT=eighty`"),
    ]
    for arguments, environment, said in cases:
        result = run_entry(*arguments, **environment)
        assert result.returncode == 2
        assert said in result.stderr
        assert result.stderr.startswith("error: ")
        assert "\nhint: " in result.stderr
        assert "Traceback" not in result.stderr


def test_a_start_without_key_or_leave_stops_with_one_clear_line(tmp_path: Path) -> None:
    result = run_entry("serve", STRONGROOM_MODEL=str(tmp_path), STRONGROOM_PORT="0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: `STRONGROOM_KEY` is not set")
    assert "\nhint: " in result.stderr and "STRONGROOM_ALLOW_PLAINTEXT=on" in result.stderr


def test_a_key_that_is_given_once_and_is_not_there_stops_the_start(tmp_path: Path) -> None:
    result = run_entry(
        "serve",
        STRONGROOM_MODEL=str(tmp_path),
        STRONGROOM_PORT="0",
        STRONGROOM_KEY=f"file:{tmp_path}/absent?unlink",
        STRONGROOM_VENDOR_ROOTS="ed25519:" + "0f" * 32,
    )
    assert result.returncode == EXIT_KEY == 77
    assert result.stderr.startswith("error: the key is not where the key source says\nhint: ")


def test_a_port_in_use_stops_the_start_with_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        plain = {"STRONGROOM_ALLOW_PLAINTEXT": "on"}
        result = run_entry("serve", STRONGROOM_PORT=port, STRONGROOM_HOST="127.0.0.1", **plain)
    assert result.returncode == 2
    assert f"port {port}" in result.stderr


def test_an_engine_that_can_never_start_ends_the_container_with_the_cause(tmp_path: Path) -> None:
    server = Server(tmp_path, fault="MODEL_NOT_FOUND", STRONGROOM_WORKERS="1").start()
    assert server.process.wait(10) == 70
    assert server.events("engine_cannot_start")[0]["cause"] == "model_not_found"
    assert len(server.events("child_died")) == 1, "it was tried again"


def test_the_default_deadlines_are_those_of_the_specification() -> None:
    limits = HealthLimits()
    assert (limits.step_s, limits.first_step_s) == (10.0, 120.0)
