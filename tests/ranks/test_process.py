"""The engine process as a whole: start, readiness, refusals to start, hardening, signals, silence.

The process is the real one with a runner of ours in place of a model (tests.ranks.model_process).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from container.engine.request import SamplingParams
from container.ranks.assembly import StartFailed, warm_up
from container.ranks.client import EngineClient
from container.ranks.config import EngineConfig, encode
from container.ranks.door import make_door
from container.ranks.heartbeat import EngineState, HeartbeatReader, LoadPhase, StartFault, make_page
from container.ranks.submission import EngineGone
from tests.ranks.doubles import collect, submit, tokens_of, wait_until
from tests.ranks.model_process import CAPACITY

CANARY = "canary-c0ffee"


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    page: HeartbeatReader
    client: EngineClient

    def state(self) -> int:
        return self.page.read().state

    def end(self) -> tuple[int, str]:
        """Return exit status and stderr once the process has ended."""
        _, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stderr.decode()


@contextmanager
def started(
    mode: str = "good", config: str | None = None, double: str = "tests.ranks.model_process"
) -> Iterator[Started]:
    """Run the engine process with the loader `mode` of model_process, or of another double."""
    front_fd, engine_fd = make_door()
    page_fd = make_page()
    config_fd = os.memfd_create("config")
    os.write(config_fd, (encode(EngineConfig(model_dir=".")) if config is None else config).encode())
    os.lseek(config_fd, 0, os.SEEK_SET)
    fds = {"--config-fd": config_fd, "--door-fd": engine_fd, "--heartbeat-fd": page_fd}
    module = ["container.ranks"] if mode == "real" else [double, mode]
    command = [sys.executable, "-m", *module, *(str(part) for pair in fds.items() for part in pair)]
    process = subprocess.Popen(
        command, pass_fds=list(fds.values()), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    page, client = HeartbeatReader(page_fd), EngineClient(front_fd)
    try:
        yield Started(process, page, client)
    finally:
        client.close()
        process.kill()
        process.communicate()
        page.close()
        for fd in (front_fd, *fds.values()):
            os.close(fd)


def ready(s: Started) -> Started:
    wait_until(lambda: s.state() == EngineState.READY, 20.0)
    return s


def test_it_is_ready_only_after_a_generated_token_and_then_serves():
    with started() as s:
        seen = set()
        while s.state() != EngineState.READY:
            seen.add((s.state(), s.page.read().load_phase))
        page = ready(s).page.read()
        # The warm-up was nobody's request.
        assert (page.accepted, page.completed, page.steps) == (0, 0, 0)
        assert (page.prompt_tokens, page.generated_tokens, page.prefix_queried_tokens) == (0, 0, 0)
        assert (page.starts, page.pid) == (1, s.process.pid)
        assert (EngineState.LOADING, LoadPhase.WEIGHTS) in seen
        assert s.client.welcome().runner == "native"
        deltas = collect(submit(s.client, [3, 4, 5], 4))
        assert len(tokens_of(deltas)) == 4
        assert deltas[-1].finish == "length"
        wait_until(lambda: s.page.read().completed == 1)
        page = s.page.read()
        assert (page.accepted, page.prompt_tokens, page.generated_tokens) == (1, 3, 4)


@pytest.mark.parametrize(
    ("mode", "config", "fault", "line"),
    [
        ("good", "{}", StartFault.BAD_CONFIG, "the configuration does not fit its schema"),
        ("good", '{"model_dir": ".", "x": 1}', StartFault.BAD_CONFIG, "does not fit its schema"),
        ("good", "\xff", StartFault.BAD_CONFIG, "does not fit its schema"),
        ("good", " " * 65_000 + "{}" + " " * 999, StartFault.BAD_CONFIG, "exceeds 65536 bytes"),
        ("good", '{"model_dir": ".", "waiting_limit": -1}', StartFault.BAD_CONFIG, "`waiting` must be"),
        ("real", '{"model_dir": "/nowhere/canary-c0ffee"}', StartFault.MODEL_NOT_FOUND, "`config.json`"),
        ("refused", None, StartFault.MODEL_REFUSED, "not for this engine"),
        ("memory", None, StartFault.OUT_OF_MEMORY, "MemoryError at "),
        ("allocator", None, StartFault.OUT_OF_MEMORY, "RuntimeError at "),
        ("raises", None, StartFault.INTERNAL, "KeyError at container.ranks.assembly:"),
        ("broken", None, StartFault.WARMUP_FAILED, "the first token failed: internal"),
        ("nan", None, StartFault.WARMUP_FAILED, "the first token failed: numerical_error"),
    ],
)
def test_a_start_that_fails_says_why_in_exactly_one_line(mode, config, fault, line):
    with started(mode, config) as s:
        status, stderr = s.end()
        assert status == 2
        assert stderr.count("\n") == 1
        assert stderr.startswith(f"engine cannot start: {fault.name.lower()}: ")
        assert line in stderr
        assert CANARY not in stderr
        page = s.page.read()
        assert (page.state, page.fault) == (EngineState.FAILED, fault)


def test_an_engine_that_never_comes_to_its_first_token_is_not_waited_for():
    class Barren:
        capacity = CAPACITY
        has_work = True

        def submit(self, request: object) -> None:
            return

        def step(self) -> list[object]:
            return []

    with pytest.raises(StartFailed, match="0 of 2 warm-up tokens were made") as failed:
        warm_up(Barren())
    assert failed.value.fault is StartFault.WARMUP_FAILED


def test_it_leaves_no_core_file_and_lets_the_front_go_first():
    with started() as s:
        ready(s)
        with open(f"/proc/{s.process.pid}/limits") as limits:
            core = next(row for row in limits if row.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        assert os.getpriority(os.PRIO_PROCESS, s.process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5


def test_it_may_not_be_dumped_and_dies_with_its_parent():
    program = (
        "import ctypes, signal\n"
        "from container.ranks.process import dumpable, harden\n"
        "before = dumpable()\n"
        "fd = harden()\n"
        "got = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(got), 0, 0, 0)\n"
        "from container.ranks.process import say\n"
        "print('nobody reads this', flush=True)\n"
        "say(fd, f'{before} {dumpable()} {got.value == signal.SIGKILL}')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stderr == "True False True\n"
    assert run.stdout == ""


def test_the_engine_dies_with_its_supervisor():
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; "
        "from container.ranks.process import harden; harden(); print(flush=True); time.sleep(60)"
        "'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, pid) >= 5)
        time.sleep(0.1)
        parent.kill()
    wait_until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_sigterm_finishes_what_runs_and_exits_0():
    with started("slow") as s:
        ready(s)
        submission = submit(s.client, [1, 2], 10)
        submission.next(5.0)
        s.process.send_signal(signal.SIGTERM)
        s.process.send_signal(signal.SIGTERM)
        assert collect(submission)[-1].finish == "length"
        assert s.end() == (0, "")
        assert s.state() == EngineState.STOPPED


def test_sigquit_ends_what_runs_with_an_error_and_exits_0():
    with started("slow") as s:
        ready(s)
        submission = submit(s.client, [1, 2], 1000)
        submission.next(5.0)
        s.process.send_signal(signal.SIGTERM)
        s.process.send_signal(signal.SIGQUIT)
        assert collect(submission)[-1].error == "draining"
        assert s.end() == (0, "")


def test_ctrl_c_is_the_supervisor_s_business():
    with started() as s:
        ready(s)
        s.process.send_signal(signal.SIGINT)
        assert len(tokens_of(collect(submit(s.client, [1], 3)))) == 3


def test_a_parent_that_blocks_signals_does_not_pass_that_on():
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with started() as s:
            ready(s)
            s.process.send_signal(signal.SIGTERM)
            assert s.end()[0] == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def test_an_engine_that_breaks_while_serving_says_so_and_exits_1():
    with started("breaks") as s:
        ready(s)
        submission = s.client.submit(
            array("i", [1] * 9), max_tokens=3, sampling=SamplingParams(seed=9), cache_salt="c0ffee"
        )
        with pytest.raises(EngineGone):
            submission.next(5.0)
        status, stderr = s.end()
        assert status == 1
        assert stderr.count("\n") == 1
        assert stderr.startswith("engine stopped serving: internal: RuntimeError at container.")
        assert CANARY not in stderr
        assert s.state() == EngineState.FAILED


def test_what_libraries_print_reaches_nobody():
    with started("noisy") as s:
        ready(s)
        s.process.send_signal(signal.SIGTERM)
        stdout, stderr = s.process.communicate(timeout=10)
        assert stdout == stderr == b""


def test_a_wrong_command_line_is_refused():
    run = subprocess.run([sys.executable, "-m", "container.ranks"], capture_output=True, check=False)
    assert run.returncode == 2
    assert b"--config-fd" in run.stderr
