"""No process of a sealed endpoint can be dumped or read by its own user: looked at from outside, by /proc.

prctl(2), PR_SET_DUMPABLE: the /proc files of a process that cannot be dumped belong to root, and ptrace and
/proc/PID/mem are refused to all who have no CAP_SYS_PTRACE, its own user among them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sagemaker_entry import sealed_model
from tests.sagemaker_entry.as_service_user import command
from tests.sagemaker_entry.sealed_model import RealServer

# Tries, as whoever runs it, all ways into the memory of the processes named on its command line.
INTRUDER = """
import ctypes, json, os, sys
PTRACE_SEIZE = 0x4206
libc = ctypes.CDLL(None, use_errno=True)

class Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

def opened(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
        return True
    except OSError:
        return False

def copied(pid):
    here = ctypes.create_string_buffer(1)
    own = Part(ctypes.addressof(here), 1)
    libc.process_vm_readv(pid, ctypes.byref(own), 1, ctypes.byref(own), 1, 0)
    return ctypes.get_errno() != 1  # EPERM; another error comes of the address

def tried(pid):
    ways = {name: opened(f"/proc/{pid}/{name}") for name in ("mem", "environ", "maps", "auxv")}
    ways["copy"] = copied(pid)
    ways["trace"] = libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0
    return ways

print(json.dumps([tried(int(pid)) for pid in sys.argv[1:]]))
"""
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
SLEEPER = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    made = sealed_model.make(tmp_path_factory.mktemp("sealed"), [(2, "none")])
    if os.getuid() == 0:
        os.chown(made.key_path, 10001, 10001)
    two = {"STRONGROOM_TENSOR_PARALLEL": "2", "STRONGROOM_THREADS": "2", "STRONGROOM_QUANTIZE": "none"}
    server = made.server(tmp_path_factory.mktemp("running"), STRONGROOM_DTYPE="float32", **two)
    server.launcher, server._arguments = "tests.sagemaker_entry.as_service_user", []
    with server:
        server.answers()
        yield server


def intruded(pids: list[int]) -> list[dict[str, bool]]:
    """Return which ways into each process are open to the user that it runs as."""
    program = command([sys.executable, "-c", INTRUDER, *map(str, pids)])
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    ways: list[dict[str, bool]] = json.loads(done.stdout)
    return ways


def user_of(pid: int) -> int:
    found = re.search(r"^Uid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def roles(server: RealServer) -> dict[int, str]:
    """Return process -> what it was started as."""
    found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in server.processes()}
    assert len(found) >= 5, "supervisor, front, its worker, two ranks"
    assert sum("sealed.rank" in line for line in found.values()) == 2
    assert sum("sagemaker_entry.front" in line for line in found.values()) >= 2
    return found


def test_no_process_writes_a_core_file(running: RealServer) -> None:
    for pid, role in roles(running).items():
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE), role


def test_the_kernel_counts_every_process_as_one_that_cannot_be_dumped(running: RealServer) -> None:
    for pid, role in roles(running).items():
        assert user_of(pid) != 0
        owners = {Path(f"/proc/{pid}/{name}").stat().st_uid for name in ("mem", "environ", "coredump_filter")}
        assert owners == {0}, role


def test_the_same_user_gets_into_no_process_by_any_way(running: RealServer) -> None:
    pids = list(roles(running))
    shut = dict.fromkeys(("mem", "environ", "maps", "auxv", "copy", "trace"), False)
    assert intruded(pids) == [shut] * len(pids)


def test_the_same_ways_lead_into_an_ordinary_process(running: RealServer) -> None:
    """Else the tests above show nothing."""
    program = command([sys.executable, "-c", SLEEPER])
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()  # it runs
        user = user_of(running.process.pid)
        assert user_of(other.pid) == user
        (ways,) = intruded([other.pid])
        assert ways["environ"] and ways["maps"] and ways["auxv"]
        if not YAMA.exists() or YAMA.read_text().strip() == "0":  # else nobody traces but a parent
            assert ways["copy"] and ways["trace"] and ways["mem"]
        assert Path(f"/proc/{other.pid}/mem").stat().st_uid == user
        other.stdin.close()
